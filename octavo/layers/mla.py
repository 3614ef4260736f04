"""Multi-head latent attention (MLA): the cache holds a latent a token, of which all heads' keys and values are made.

Decoding multiplies queries by what would make keys of latents, and so attends to latents as they are (absorbed). A long prompt
makes keys and values of its context's latents instead, where that takes fewer products. Source: arXiv:2405.04434, section 2.1.
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

# Scales that checkpoints may have for a cache, and that no cache of latents takes.
_BESIDE = ("kv_a_proj_with_mqa", "kv_b_proj")
UNUSED_SCALES = (*SCALE_NAMES, *(f"{of}.{kind}_scale" for of in _BESIDE for kind in ("k", "v", "output")))


@dataclass(frozen=True)
class LatentShape:
    """heads: of the whole model. rank: of a latent. nope, rope: of a query, not rotated and rotated. v: of a value."""

    heads: int
    rank: int
    nope: int
    rope: int
    v: int

    @property
    def expanded_from(self) -> int:
        """New tokens of a request from which on it takes fewer products to make keys and values of its latents."""
        saved = 2 * self.rank - self.nope - self.v  # a pair of a query and a key
        made = self.rank * (self.nope + self.v)  # a latent
        return made // saved + 1 if saved > 0 else 1 << 62


class LatentAttention(nn.Module):
    """Attention over latents, by this rank's heads; the cache, which `bind_cache` gives it, is the same on every rank.

    `norm` is the latent's. What makes keys and values of latents, kv_b_proj, stays in the model's dtype: it is multiplied head
    by head, with queries and outputs that no scheme quantizes.
    """

    reads_siblings = True

    cache: LatentCache

    def __init__(
        self, shape: LatentShape, scale: float, rotary: RotaryEmbedding, norm: RMSNorm, tp: TensorParallel,
        *, interleaved: bool = True,
    ):  # fmt: skip
        super().__init__()
        self._shared = rotary, norm  # in a tuple: their weights are loaded at the paths that the model gives them
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
        """No views: gives up those that it has."""
        if views:
            self.cache = LatentCache.of(views)
        else:
            vars(self).pop("cache", None)

    def forward(self, q: Tensor, kv: Tensor, batch: ForwardBatch, chosen: Tensor | None = None) -> Tensor:
        """[T, heads * v] of queries q [T, heads, nope + rope] and kv [T, rank + rope] as they were projected.

        `chosen`: as `ops.latent_attention` has it.
        """
        rotary, norm = self._shared
        rotation = ops.Rotation(rotary.cos_sin, batch.rotary_rows, self.interleaved)
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
        """The first request whose keys and values are made; those behind it, which are prompts too, share its way."""
        lens, enough = batch.query_lens, self.shape.expanded_from
        return next((i for i, count in enumerate(lens) if count >= enough), len(lens))
