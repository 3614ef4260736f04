"""Token embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.layers.linear import vocabulary_shard
from octavo.weights import Loader

__all__ = ["Embedding"]


class Embedding(nn.Module):
    """The embedding matrix [vocab, hidden] in the model's dtype, split over ranks by vocabulary.

    A lookup gains nothing from FP8. If a tied head is quantized, though, the embedding reads the head's codes.
    """

    def __init__(self, vocab: int, hidden: int, tp: TensorParallel):
        super().__init__()
        self.shape, self.tp, self.shard = (vocab, hidden), tp, vocabulary_shard(vocab, tp)

    def load(self, loader: Loader) -> None:
        self.weight, self.dtype = loader.embedding(self.shape, self.shard), loader.dtype

    def forward(self, ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self._rows(ids)
        local = self.shard.slice(self.shape[0])
        absent = (ids < local.start) | (ids >= local.stop)
        rows = self._rows((ids - local.start).masked_fill(absent, 0))
        return ops.all_reduce(rows.masked_fill(absent.unsqueeze(1), 0), self.tp)

    def _rows(self, ids: Tensor) -> Tensor:
        if isinstance(self.weight, ops.PackedWeight):
            return self.weight.rows(ids, self.dtype)
        return F.embedding(ids, self.weight)
