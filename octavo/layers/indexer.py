"""DeepSeek Sparse Attention: a lightweight indexer selects the tokens that each token attends to (arXiv:2512.02556)."""

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

__all__ = ["Indexer", "IndexerShape", "IndexerWeights", "SharedIndexer", "TopkIndices"]


@dataclass(frozen=True)
class IndexerShape:
    """heads: query heads, which score one key per token. dim: of each head. top_k: number of selected tokens."""

    heads: int
    dim: int
    top_k: int


class TopkIndices:
    """indices: the selection of the step's last indexer, in Indexer's format. One per model, because it takes 64 MiB for 8,192
    tokens."""

    indices: Tensor | None = None


class IndexerWeights(nn.Module):
    """The weight of each head's score. It is small and decides what is attended to, so it stays in the model's dtype."""

    reads_siblings = True

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.shape = (heads, hidden)

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weights_proj.weight", self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Indexer(nn.Module):
    """Writes its keys to its cache and selects the tokens that each token attends to. It is replicated on every rank.

    `topk`: where `forward` stores its result, if later layers reuse it.
    """

    cache: IndexCache

    def __init__(
        self, hidden: int, q_rank: int, shape: IndexerShape, rotary: RotaryEmbedding, topk: TopkIndices | None = None,
        *, interleaved: bool = False,
    ):  # fmt: skip
        super().__init__()
        whole = TensorParallel()
        self.wq_b = ColumnParallelLinear(["wq_b"], q_rank, [shape.heads * shape.dim], bias=False, tp=whole)
        self.wk = ColumnParallelLinear(["wk"], hidden, [shape.dim], bias=False, tp=whole)
        self.k_norm = LayerNorm(shape.dim, 1e-6)
        self.weights_proj = IndexerWeights(hidden, shape.heads)
        self._shared = (rotary,)  # in a tuple, so that torch does not register it: the model loads it
        self.shape, self.topk, self.interleaved = shape, topk, interleaved

    @property
    def input_readers(self) -> tuple[ops.Reader, ...]:
        """Readers of the layer's input."""
        return None, self.wk.weight

    @property
    def latent_readers(self) -> tuple[ops.Reader, ...]:
        """Readers of the query latent."""
        return (self.wq_b.weight,)

    def bind_cache(self, views: Views) -> None:
        """Binds the cache. Empty views drop it."""
        if views:
            self.cache = IndexCache.of(views)
        else:
            vars(self).pop("cache", None)

    def is_sparse(self, batch: ForwardBatch) -> bool:
        """Whether some token of the step has a context longer than top_k."""
        return max(batch.context_lens, default=0) > self.shape.top_k

    def forward(self, x: ops.Activation, q: Operand, batch: ForwardBatch) -> Tensor | None:
        """Writes this step's keys. INT32 [T, top_k] as `ops.select_keys`; None where every token attends to its whole context.

        x [T, hidden]: the layer's input. q [T, q_rank]: the normed query latent.
        """
        (rotary,) = self._shared
        rotation = ops.Rotation(rotary.table(batch), batch.rotary_rows, self.interleaved)
        ops.write_index_keys(self.wk(x), self.k_norm.norm, rotation, self.cache, batch.slot_mapping)
        chosen = None
        if self.is_sparse(batch):
            heads, weights = self.wq_b(q).unflatten(1, (self.shape.heads, -1)), self.weights_proj(x.values())
            chosen = ops.select_keys(heads, weights, rotation, self.cache, batch, self.shape.top_k)
        if self.topk is not None:
            self.topk.indices = chosen
        return chosen


class SharedIndexer(nn.Module):
    """Takes the place of an indexer and reuses the selection of the last one before it."""

    input_readers: tuple[ops.Reader, ...] = ()
    latent_readers: tuple[ops.Reader, ...] = ()

    def __init__(self, topk: TopkIndices):
        super().__init__()
        self.topk = topk

    def forward(self, x: ops.Activation, q: Operand, batch: ForwardBatch) -> Tensor | None:
        """As `Indexer.forward`."""
        return self.topk.indices
