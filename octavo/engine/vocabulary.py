"""Vocabulary-parallel logits: gathers whole rows for sampling; an argmax exchanges one (value, index) pair per rank."""

from __future__ import annotations

from torch import Tensor

from octavo import ops
from octavo.distributed import TensorParallel

__all__ = ["Vocabulary"]


class Vocabulary:
    """A vocabulary of `size` tokens split over ranks into equal, padded parts. One rank exchanges nothing."""

    def __init__(self, size: int, tp: TensorParallel):
        self.size, self.tp = size, tp

    def whole(self, logits: Tensor) -> Tensor:
        """All-gathers this rank's logits [rows, part] into [rows, size]."""
        return ops.all_gather(logits, self.tp)[:, : self.size]

    def argmax(self, logits: Tensor) -> Tensor:
        """Argmax over all ranks' logits, the first of equal ones: int64 [rows], the same on every rank."""
        return ops.argmax_over_ranks(logits, self.tp)
