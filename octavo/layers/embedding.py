"""Token embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from octavo import ops
from octavo.weights import Loader

__all__ = ["Embedding"]


class Embedding(nn.Module):
    """Rows of the embedding matrix [vocab, hidden], in the model's dtype.

    A look-up gains nothing from FP8; but where a head that is tied to it is quantized, the one matrix is the head's codes.
    """

    def __init__(self, vocab: int, hidden: int):
        super().__init__()
        self.shape = (vocab, hidden)

    def load(self, loader: Loader) -> None:
        self.weight, self.dtype = loader.embedding(self.shape), loader.dtype

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.weight, ops.PackedWeight):
            return self.weight.rows(ids, self.dtype)
        return F.embedding(ids, self.weight)
