"""Tensor parallelism: which rank this is, and the group through which ranks exchange.

Collectives go through a group object: one over torch.distributed, or a group of threads in one process, which tests use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Collectives", "ProcessGroup", "TensorParallel", "ThreadGroup", "run_ranks"]

T = TypeVar("T")


class Collectives(Protocol):
    """What ranks exchange; every rank calls the same in the same order, with tensors of one shape and dtype."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks, which may be written into `x`."""

    def max_reduce(self, x: Tensor) -> Tensor:
        """The largest `x` over ranks, element by element; it may be written into `x`."""

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, in the order of ranks."""


class ProcessGroup:
    """The processes of torch.distributed's default group."""

    def all_reduce(self, x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x)
        return x

    def max_reduce(self, x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(found, x.contiguous())
        return found


class ThreadGroup:
    """Threads of one process as ranks. Each thread has a member made by `members`; sums are taken in the order of ranks."""

    def __init__(self, rank: int, given: list[Tensor | None], barrier: threading.Barrier):
        self.rank, self._given, self._barrier = rank, given, barrier

    @classmethod
    def members(cls, size: int) -> list[ThreadGroup]:
        """One group's members, by rank."""
        given: list[Tensor | None] = [None] * size
        barrier = threading.Barrier(size)
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


@dataclass(frozen=True)
class TensorParallel:
    """This rank among `size`. With one rank every collective is the identity."""

    rank: int = 0
    size: int = 1
    group: Collectives | None = None

    @classmethod
    def of_threads(cls, size: int) -> list[TensorParallel]:
        """The ranks of a group of threads."""
        return [cls(rank, size, member) for rank, member in enumerate(ThreadGroup.members(size))]

    def part(self, n: int) -> int:
        """This rank's share of `n` heads or channels; at least one, for KV heads that are replicated."""
        return max(1, n // self.size)

    def _exchange(self) -> Collectives:
        assert self.group is not None, "ranks that exchange need a group"
        return self.group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over ranks."""
        return x if self.size == 1 else self._exchange().all_reduce(x)

    def max_reduce(self, x: Tensor) -> Tensor:
        """Largest `x` over ranks: a scale that spans ranks is agreed on, so weight bytes do not depend on the size."""
        return x if self.size == 1 else self._exchange().max_reduce(x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `x`, side by side along `dim`, in the order of ranks."""
        return x if self.size == 1 else torch.cat(self._exchange().all_gather(x), dim)


def run_ranks(size: int, fn: Callable[[TensorParallel], T]) -> list[T]:
    """What `fn` gives on each of `size` ranks, which are threads of this process. Raises the first rank's error."""
    ranks = TensorParallel.of_threads(size)

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
