"""Token embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from octavo.weights import Loader

__all__ = ["Embedding"]


class Embedding(nn.Module):
    """Rows of the embedding matrix [vocab, hidden], in the model's dtype: a look-up gains nothing from FP8."""

    def __init__(self, vocab: int, hidden: int):
        super().__init__()
        self.shape = (vocab, hidden)

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", self.shape)
        loader.shared[loader.prefix + "weight"] = self.weight  # for a head that is tied to it

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
