"""Threads of one process as ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from octavo.distributed import TensorParallel
from octavo.ops.contract import has_storage
from octavo.weights.in_place import held

T = TypeVar("T")


class ThreadGroup:
    """Threads of one process as ranks. Each thread has a member made by `members`; sums are taken in the order of ranks."""

    def __init__(self, rank: int, given: list[Tensor | None], barrier: threading.Barrier):
        self.rank, self._given, self._barrier = rank, given, barrier

    @classmethod
    def members(cls, size: int) -> list[ThreadGroup]:
        """One group's members, by rank."""
        given: list[Tensor | None] = [None] * size
        barrier = threading.Barrier(size, timeout=100)  # ranks that disagree on their calls must not hang
        return [cls(rank, given, barrier) for rank in range(size)]

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self._given[self.rank] = x.clone()
        self._barrier.wait()
        found = [one for one in self._given if one is not None]
        self._barrier.wait()  # nobody gives the next one before all have taken this
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        total, *others = self.all_gather(x)
        total = total.clone()
        for other in others:
            total += other
        return total

    def max_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.all_gather(x)).amax(0)

    def abort(self) -> None:
        """Wakes the other ranks with BrokenBarrierError: this one cannot go on."""
        self._barrier.abort()


def run_ranks(size: int, fn: Callable[[TensorParallel], T]) -> list[T]:
    """What `fn` gives on each of `size` ranks, which are threads of this process. Raises the first rank's error."""
    ranks = [TensorParallel(rank, size, member) for rank, member in enumerate(ThreadGroup.members(size))]

    def run(tp: TensorParallel) -> T:
        try:
            return fn(tp)
        except BaseException:
            assert isinstance(tp.group, ThreadGroup)
            tp.group.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(run, tp) for tp in ranks]
    failed = [error for job in jobs if (error := job.exception()) is not None]
    if failed:  # those that another rank's end woke tell nothing
        raise next((error for error in failed if not isinstance(error, threading.BrokenBarrierError)), failed[0])
    return [job.result() for job in jobs]


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all storages that the layers of a loaded model hold, packed weights and tables included, each once."""
    found: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            own = has_storage(value)  # not a library's own layout
            found[value.untyped_storage().data_ptr() if own else id(value)] = (
                value.untyped_storage().nbytes() if own else value.nbytes
            )
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        elif hasattr(value, "__dict__") and not isinstance(value, Enum):  # whose members lead to one another
            for one in vars(value).values():
                add(one)

    for module in model.modules():
        for value in held(module).values():
            add(value)
    return sum(found.values())
