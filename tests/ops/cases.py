"""Many cases in one test: a failure says of which it is, and the inputs of each do not depend on the cases before it."""

from __future__ import annotations

import functools
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ops.interpreter import HAS_GPU

from octavo.ops.cpu import library

__all__ = ["INSTRUCTION_SETS", "case", "combined", "instruction_sets", "on_each_instruction_set", "over", "pairwise"]

INSTRUCTION_SETS = ("portable", "avx2", "avx2_shift", "avx512", "avx512_bf16", "amx")

_path: list[str] = []


@contextmanager
def case(*what: object) -> Iterator[None]:
    """A case of the test that runs, or of the case around it: seeds torch, and adds to an error which case it is of."""
    _path.append(", ".join(map(_said, what)))
    torch.manual_seed(zlib.crc32("; ".join(_path).encode()))
    try:
        yield
    except Exception as error:
        error.add_note(f"case: {_path[-1]}")
        raise
    finally:
        _path.pop()


def _said(x: object) -> str:
    """A scheme's or an object's name, an FP8 format's dtype, else what it prints as."""
    said = x if isinstance(x, str) else getattr(x, "name", None) or getattr(x, "__name__", None) or getattr(x, "dtype", x)
    return str(said)[:100]


def over(names: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As pytest.mark.parametrize, but within one test: of several such decorators every combination is a case.

    A caller that gives `names` itself runs the test with that value alone.
    """
    keys, rows = [name.strip() for name in names.split(",")], list(values)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def each(*args: Any, **given: Any) -> None:
            if keys[0] in given:
                return test(*args, **given)
            for row in rows:
                with case(f"{names} = {_said(row)}"):
                    test(*args, **given, **dict(zip(keys, row if len(keys) > 1 else [row], strict=True)))

        return _without(each, test, keys)

    return decorate


def _without(each: Callable[..., None], test: Callable[..., None], keys: list[str]) -> Callable[..., None]:
    """`each`, whose other parameters are the fixtures that pytest fills in."""
    signature = inspect.signature(test)
    assert set(keys) <= set(signature.parameters), f"{test.__name__} takes no {keys}"
    others = [p for name, p in signature.parameters.items() if name not in keys]
    each.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    return each


def pairwise(*lists: Iterable[Any]) -> list[tuple[Any, ...]]:
    """So few of the lists' combinations that each two values of two lists meet in one."""
    held = [list(values) for values in lists]
    every = list(itertools.product(*(range(len(values)) for values in held)))
    pairs = [set(itertools.combinations(enumerate(row), 2)) for row in every]
    left, chosen = set().union(*pairs), []
    while left:
        best = max(range(len(every)), key=lambda i: len(pairs[i] & left))
        left -= pairs[best]
        chosen.append(tuple(values[i] for values, i in zip(held, every[best], strict=True)))
    return chosen


def combined(*lists: Iterable[Any]) -> list[tuple[Any, ...]]:
    """What Triton's kernels are tried over: every combination on a GPU, `pairwise` where numpy interprets them."""
    return list(itertools.product(*lists)) if HAS_GPU else pairwise(*lists)


def instruction_sets() -> Iterator[str]:
    """The C kernels' sets that this CPU has, each in use while it is given; then the best again (see conftest.py)."""
    for name in INSTRUCTION_SETS:
        if library.use(name) is not None:
            yield name
            assert library.used() == name
    library.use(None)


def on_each_instruction_set(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test of the C kernels with every set that this CPU has; test_native.py says which those are."""

    @functools.wraps(test)
    def each(*args: Any, **given: Any) -> None:
        for name in instruction_sets():
            with case(name):
                test(*args, **given)

    return each
