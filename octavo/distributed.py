"""Tensor parallelism: this process's rank, and the group for collectives.

The group is torch.distributed's, or a group of threads in tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Collectives", "ProcessGroup", "TensorParallel"]


class Collectives(Protocol):
    """Collectives among ranks. Every rank makes the same calls in the same order, with tensors of one shape and dtype."""

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


@dataclass(frozen=True)
class TensorParallel:
    """This rank among `size`. With one rank every collective is the identity."""

    rank: int = 0
    size: int = 1
    group: Collectives | None = None

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
        """Largest `x` over ranks. Scales that span ranks are agreed on by it, so weight bytes do not depend on the size."""
        return x if self.size == 1 else self._exchange().max_reduce(x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `x`, concatenated along `dim` in rank order."""
        return x if self.size == 1 else torch.cat(self._exchange().all_gather(x), dim)
