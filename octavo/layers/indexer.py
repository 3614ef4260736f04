"""DeepSeek's sparse attention: a light indexer says which tokens of a context a token attends to (arXiv:2512.02556)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.kvcache import IndexCache, Views
from octavo.layers.linear import ColumnParallelLinear
from octavo.layers.norm import LayerNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.ops import Operand
from octavo.weights import Loader

__all__ = ["Indexer", "IndexerShape", "IndexerWeights"]


@dataclass(frozen=True)
class IndexerShape:
    """heads: of queries, which score one key a token. dim: of each. top_k: the tokens that are attended to."""

    heads: int
    dim: int
    top_k: int


class IndexerWeights(nn.Module):
    """What each head's score counts for. Small, and it decides what is attended to: kept in the model's dtype."""

    reads_siblings = True

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.shape = (heads, hidden)

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weights_proj.weight", self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Indexer(nn.Module):
    """Keys of its own in the cache, and the places that each token attends to. Every rank has all of it, and chooses alike.

    chosen: what `forward` gave in this step, for layers behind this one that share it.
    """

    cache: IndexCache
    chosen: Tensor | None = None

    def __init__(self, hidden: int, q_rank: int, shape: IndexerShape, rotary: RotaryEmbedding, *, interleaved: bool = False):
        super().__init__()
        whole = TensorParallel()
        self.wq_b = ColumnParallelLinear(["wq_b"], q_rank, [shape.heads * shape.dim], bias=False, tp=whole)
        self.wk = ColumnParallelLinear(["wk"], hidden, [shape.dim], bias=False, tp=whole)
        self.k_norm = LayerNorm(shape.dim, 1e-6)
        self.weights_proj = IndexerWeights(hidden, shape.heads)
        self._shared = (rotary,)  # in a tuple: it is loaded where the model has it
        self.shape, self.interleaved = shape, interleaved

    def bind_cache(self, views: Views) -> None:
        self.cache = IndexCache.of(views)

    def is_sparse(self, batch: ForwardBatch) -> bool:
        """Whether some token of the step may see more than is attended to."""
        return max(batch.context_lens, default=0) > self.shape.top_k

    def forward(self, x: ops.Activation, q: Operand, batch: ForwardBatch) -> Tensor | None:
        """Stores this step's keys; INT32 [T, top_k] as `ops.select_keys`, None where every token attends to all it sees.

        x [T, hidden], the layer's input; q [T, q_rank], the normed latent of queries.
        """
        (rotary,) = self._shared
        rotation = ops.Rotation(rotary.cos_sin, batch.rotary_rows, self.interleaved)
        ops.write_index_keys(self.wk(x), self.k_norm.norm, rotation, self.cache, batch.slot_mapping)
        self.chosen = None
        if self.is_sparse(batch):
            heads, weights = self.wq_b(q).unflatten(1, (self.shape.heads, -1)), self.weights_proj(x.values())
            self.chosen = ops.select_keys(heads, weights, rotation, self.cache, batch, self.shape.top_k)
        return self.chosen
