"""Multi-head latent attention (MLA). The cache holds one latent per token, from which all heads' keys and values are made.

Decoding multiplies queries by the key up-projection instead, and attends to the latents directly (absorbed). A long prompt
makes keys and values from its context's latents where that takes fewer products. Source: arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.kvcache import LatentCache, Views
from octavo.layers.attention import SCALE_NAMES
from octavo.layers.linear import query_heads
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.quant.formats import Shard
from octavo.weights import Loader

__all__ = ["LatentAttention", "LatentShape"]

# Cache scales that checkpoints may have, which a latent cache does not use.
_BESIDE = ("kv_a_proj_with_mqa", "kv_b_proj")
UNUSED_SCALES = (*SCALE_NAMES, *(f"{of}.{kind}_scale" for of in _BESIDE for kind in ("k", "v", "output")))


@dataclass(frozen=True)
class LatentShape:
    """heads: of the whole model. rank: of the latent. nope, rope: query dims without and with rotation. v: value dim."""

    heads: int
    rank: int
    nope: int
    rope: int
    v: int

    @property
    def expanded_from(self) -> int:
        """The number of new tokens of a request from which making keys and values takes fewer products than absorbing."""
        saved = 2 * self.rank - self.nope - self.v  # products per pair of query and key
        made = self.rank * (self.nope + self.v)  # products per latent
        return made // saved + 1 if saved > 0 else 1 << 62


class LatentAttention(nn.Module):
    """Attention over latents by this rank's heads. `bind_cache` sets the cache, which is replicated on every rank.

    `norm`: the latent's. The up-projection kv_b_proj stays in the model's dtype: it is multiplied head by head with queries
    and outputs, which no scheme quantizes.
    """

    reads_siblings = True

    cache: LatentCache

    def __init__(
        self, shape: LatentShape, scale: float, rotary: RotaryEmbedding, norm: RMSNorm, tp: TensorParallel,
        *, interleaved: bool = True,
    ):  # fmt: skip
        super().__init__()
        self._shared = rotary, norm  # in a tuple, so that torch does not register them: the model loads them at its paths
        self.shape, self.scale, self.tp, self.interleaved = shape, scale, tp, interleaved
        self.heads = query_heads(shape.heads, tp)

    def load(self, loader: Loader) -> None:
        s = self.shape
        matrix = loader.dense("kv_b_proj", (s.heads * (s.nope + s.v), s.rank), Shard(0, self.tp.rank, self.tp.size))
        self.up = matrix.view(self.heads, s.nope + s.v, s.rank)
        for name in filter(loader.has, UNUSED_SCALES):
            loader.report.note("the checkpoint's KV scales are not used: MLA's FP8 cache takes the scales of each token")
            loader.skip(name)

    @property
    def up_k(self) -> Tensor:
        """[heads, nope, rank]"""
        return self.up[:, : self.shape.nope]

    @property
    def up_v(self) -> Tensor:
        """[heads, rank, v]"""
        return self.up[:, self.shape.nope :].mT

    def bind_cache(self, views: Views) -> None:
        """Binds the cache. Empty views drop it."""
        if views:
            self.cache = LatentCache.of(views)
        else:
            vars(self).pop("cache", None)

    def forward(self, q: Tensor, kv: Tensor, batch: ForwardBatch, chosen: Tensor | None = None) -> Tensor:
        """[T, heads * v] from projected queries q [T, heads, nope + rope] and latents kv [T, rank + rope].

        `chosen`: as in `ops.latent_attention`.
        """
        rotary, norm = self._shared
        rotation = ops.Rotation(rotary.table(batch), batch.rotary_rows, self.interleaved)
        ops.write_latent(kv, ops.Norm(norm.weight, norm.eps), rotation, self.cache, batch.slot_mapping)
        first = self._first_expanded(batch) if chosen is None else len(batch.query_lens)
        split = sum(batch.query_lens[:first])
        parts = []
        if split:
            absorbed = ops.absorbed_queries(q[:split], self.up_k, rotation._replace(rows=rotation.rows[:split]))
            latent = ops.latent_attention(absorbed, self.cache, batch.part(0, first), self.scale, chosen)
            parts.append(ops.head_linear(latent, self.up_v))
        if split < len(q):
            rest = batch.part(first, len(batch.query_lens))
            later = rotation._replace(rows=rest.rotary_rows)
            parts.append(ops.expanded_attention(q[split:], self.up_k, self.up_v, later, self.cache, rest, self.scale))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _first_expanded(self, batch: ForwardBatch) -> int:
        """The first request that uses expanded attention. All requests behind it, which are prefills too, use it as well."""
        lens, enough = batch.query_lens, self.shape.expanded_from
        return next((i for i, count in enumerate(lens) if count >= enough), len(lens))
