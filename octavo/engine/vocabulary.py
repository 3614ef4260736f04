"""Logits whose vocabulary is split over ranks: the whole rows that sampling needs, and the argmax, for which two numbers do."""

from __future__ import annotations

from torch import Tensor

from octavo import ops
from octavo.distributed import TensorParallel

__all__ = ["Vocabulary"]


class Vocabulary:
    """The ranks' parts of `size` tokens, each as wide as the widest. With one rank there is nothing to exchange."""

    def __init__(self, size: int, tp: TensorParallel):
        self.size, self.tp = size, tp

    def whole(self, logits: Tensor) -> Tensor:
        """Logits [rows, size] of this rank's [rows, part]."""
        return ops.all_gather(logits, self.tp)[:, : self.size]

    def argmax(self, logits: Tensor) -> Tensor:
        """The token with the largest of all ranks' logits, the first of equal ones: int64 [rows], the same on every rank."""
        own = ops.argmax(logits)
        if self.tp.size == 1:
            return own
        own = own.unsqueeze(1)
        tokens = ops.all_gather(own + self.tp.rank * logits.shape[1], self.tp)
        values = ops.all_gather(logits.gather(1, own), self.tp)
        return tokens.gather(1, ops.argmax(values).unsqueeze(1)).squeeze(1)
