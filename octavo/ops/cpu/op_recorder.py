"""A decode step on a CPU recorded as a list of calls: the CPU's counterpart of a CUDA graph.

Between two steps of one shape only the contents of tensors change. So the calls of C kernels, with their addresses, and the
torch ops that compute something can be repeated without the Python code that issued them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.ops.contract import has_storage
from octavo.ops.cpu.library import REPLAYED, merged_call

__all__ = ["capture", "launch"]

T = TypeVar("T")
Call = tuple[Callable[..., object], tuple[Any, ...]]

CHUNK = 1 << 26  # bytes of an arena's chunk; pages that are never written take no memory
ALIGNMENT = 64

TILED_FOR_ANOTHER = -2  # status of octavo_linear: csrc/products.h

_state = threading.local()


def launch(function: Callable[..., int | None], *arguments: object) -> None:
    """Call a C kernel, and record the call if this thread is recording. Raises MemoryError if it could not allocate its
    workspace, RuntimeError if the instruction set was changed and cannot read the weight's layout.
    """
    _make(((function, arguments),))
    if (recorder := getattr(_state, "recorder", None)) is not None:
        recorder.calls.append((function, arguments))


def _make(calls: Iterable[Call]) -> None:
    """Make the calls; under a profiler, which sees only torch's operators by itself, with the C kernels' names."""
    if _profiler_enabled():
        calls = [(_named, call) for call in calls]
    for function, arguments in calls:
        if status := function(*arguments):
            if status == TILED_FOR_ANOTHER:
                raise RuntimeError("the weight was packed for matrix tiles, which the selected instruction set does not use")
            raise MemoryError("a kernel could not allocate its workspace")


def _named(function: Callable[..., object], arguments: tuple[object, ...]) -> object:
    with record_function(function.__name__):
        return function(*arguments)


class Arena:
    """Memory for the tensors of recorded steps. One step is replayed at a time, so all use the same memory from its start.

    Chunks are large, so that a larger step finds room in those of a smaller one.
    """

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    def places(self) -> Callable[[Sequence[int], torch.dtype], Tensor]:
        """An allocator that hands out a step's tensors one after another."""
        at = offset = 0

        def place(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            nonlocal at, offset
            size = prod(shape) * dtype.itemsize
            while at < len(self.chunks) and offset + size > self.chunks[at].numel():
                at, offset = at + 1, 0
            if at == len(self.chunks):
                self.chunks.append(torch.empty(max(CHUNK, size), dtype=torch.uint8))
            found = self.chunks[at][offset : offset + size].view(dtype).view(list(shape))
            offset += -(-size // ALIGNMENT) * ALIGNMENT
            return found

        return place


class _Recorder(TorchDispatchMode):
    """Intercepts torch ops: allocates tensors from the arena and records the ops that compute."""

    def __init__(self, arena: Arena):
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.seen: list[object] = []  # keeps tensors alive whose addresses the calls hold
        self.place = arena.places()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler to exclude this class: two seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.new_empty.default:
            return self.place(args[1], kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        if func.namespace == "profiler":  # begin and end of a name
            return out
        if func._schema.is_mutable:
            self.calls.append((_again, (func, args, kwargs)))
        elif not isinstance(out, Tensor):
            if not (isinstance(out, (list, tuple)) and all(_shares(part, args) for part in out)):
                raise RuntimeError(f"{func} gives what is no tensor, or several: a recorded step could not repeat it")
        elif not _shares(out, args) and "empty" not in func._schema.name:
            if out.is_contiguous():
                out = self.place(out.shape, out.dtype).copy_(out)
            self.calls.append((_compute, (out, func, args, kwargs)))
        self.seen.append((args, kwargs, out))
        return out


def _shares(out: Tensor, args: Sequence[object]) -> bool:
    """Whether `out` is a view of an argument."""
    stored = [arg for arg in args if isinstance(arg, Tensor) and has_storage(arg)]
    return any(arg.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for arg in stored)


def _again(func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    func(*args, **kwargs)


def _compute(out: Tensor, func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    out.copy_(func(*args, **kwargs))


def _joined(calls: Sequence[Call]) -> list[Call]:
    """The same calls, with adjacent C kernels merged into one replay call."""
    joined: list[Call] = []
    for native, group in groupby(calls, lambda call: getattr(call[0], "__name__", None) in REPLAYED):
        part = list(group)
        joined += [merged_call(part)] if native else part
    return joined


def capture(fn: Callable[[], T], arena: object = None) -> tuple[Callable[[], None], T, object]:
    """Run `fn` and record it: (replay, fn's result, the arena to pass to the next capture).

    A replay recomputes the result from the current contents of fn's input tensors; results of other recordings in the arena are
    lost. `fn` must not read a tensor's values in Python; C kernels and torch ops may.
    """
    assert arena is None or isinstance(arena, Arena)
    arena = arena or Arena()
    recorder = _Recorder(arena)
    _state.recorder = recorder
    try:
        with recorder:
            out = fn()
    finally:
        _state.recorder = None

    calls, joined = recorder.calls, _joined(recorder.calls)

    def replay() -> None:
        _make(calls if _profiler_enabled() else joined)

    return replay, out, arena
