"""Tensor parallelism: which rank this is, and the collectives that layers call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TensorParallel"]


@dataclass(frozen=True)
class TensorParallel:
    """This rank among `size`. With one rank every collective is the identity."""

    rank: int = 0
    size: int = 1

    def part(self, n: int) -> int:
        """This rank's share of `n` heads or channels; at least one, for KV heads that are replicated."""
        return max(1, n // self.size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def max_reduce(self, x: Tensor) -> Tensor:
        """Largest `x` over ranks: a scale that spans ranks is agreed on, so weight bytes do not depend on the size."""
        if self.size > 1:
            torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX)
        return x
