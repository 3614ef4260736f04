"""One test for one rule, whatever the number of its cases: a failure names each case that broke the rule."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = ["cases"]

Test = Callable[..., None]
Case = tuple[str, dict[str, Any]]  # what to call it, and the arguments that it gives


def cases(
    names: str | Sequence[str], values: Iterable[Any], ids: Callable[[Any], Any] | Iterable[Any] = repr
) -> Callable[[Test], Test]:
    """As pytest.mark.parametrize, but all cases are one test: each runs, and all that failed are told. `ids`: what to call a
    value, or one name for each case.

    Of several on a function every combination runs. Each case has a `tmp_path` of its own and its own copy of any directory
    that a fixture made; its `monkeypatch` is undone when it ends, and `capsys` and `caplog` hold nothing of the cases before.
    All cases share what other fixtures made. A test counts as skipped if a case was skipped and the others have passed.
    """
    argnames = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    listed = [_case(argnames, value, ids if callable(ids) else repr) for value in values]
    if not callable(ids):
        listed = [(str(label), given) for label, (_, given) in zip(ids, listed, strict=True)]
    if not listed:
        raise ValueError(f"no cases of {', '.join(argnames)}")

    def decorate(test: Test) -> Test:
        inner, lists = getattr(test, "cases_of", (test, []))
        looped = _looped(inner, [listed, *lists])
        looped.__dict__ |= {"pytestmark": list(getattr(test, "pytestmark", []))}
        return looped

    return decorate


def _case(names: list[str], value: Any, label: Callable[[Any], Any]) -> Case:
    given = (value,) if len(names) == 1 else tuple(value)
    if len(given) != len(names):
        raise ValueError(f"{len(names)} names and {len(given)} values: {given!r}")
    told = (f"{name}={str(label(one))[:200]}" for name, one in zip(names, given, strict=True))
    return ", ".join(told), dict(zip(names, given, strict=True))


def _looped(test: Test, lists: list[list[Case]]) -> Test:
    every = [
        (", ".join(label for label, _ in chosen), {name: value for _, given in chosen for name, value in given.items()})
        for chosen in itertools.product(*lists)
    ]
    signature = inspect.signature(test)
    ours = every[0][1].keys()
    if unknown := ours - signature.parameters.keys():
        raise ValueError(f"{test.__name__} has no argument {', '.join(unknown)}")

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        __tracebackhide__ = True
        failed: list[BaseException] = []
        skipped: list[str] = []
        for label, given in every:
            try:
                with _fresh(fixtures) as own:
                    test(*args, **own, **given)
            except pytest.skip.Exception as skip:
                skipped.append(str(skip))
            except (Exception, pytest.fail.Exception) as error:
                error.add_note(f"in the case {label}")
                failed.append(error)
        if len(failed) == 1:
            raise failed[0]
        if failed:
            raise BaseExceptionGroup(f"{len(failed)} of {len(every)} cases failed", failed)
        if skipped:
            raise pytest.skip.Exception(f"{skipped[0]} ({len(skipped)} of {len(every)} cases)")

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would ask for the arguments of the cases
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[parameter for name, parameter in signature.parameters.items() if name not in ours]
    )
    run.cases_of = (test, lists)  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def _fresh(fixtures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a case is given of the test's fixtures."""
    own = dict(fixtures)
    with contextlib.ExitStack() as undone:
        if folders := {name: path for name, path in own.items() if isinstance(path, Path) and path.is_dir()}:
            place = Path(undone.enter_context(tempfile.TemporaryDirectory()))
            for name, path in folders.items():
                own[name] = place / name
                if name == "tmp_path":
                    own[name].mkdir()
                else:
                    shutil.copytree(path, own[name], symlinks=True)
        if "monkeypatch" in own:
            own["monkeypatch"] = undone.enter_context(own["monkeypatch"].context())
        if "capsys" in own:
            own["capsys"].readouterr()
        if "caplog" in own:
            own["caplog"].clear()
        yield own
