"""Attention over the paged cache: rotate, store this step's keys and values, then attend to all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.kvcache import Views
from octavo.layers.linear import QKVLinear
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.ops import reference
from octavo.platform import FP8_MAX
from octavo.weights import Loader

__all__ = ["PagedAttention"]

# Where checkpoints keep the scales of an FP8 cache, relative to the attention module; the newest spelling first.
_SPELLINGS = (("k_scale", "v_scale"), ("attn.k_scale", "attn.v_scale"), ("k_proj.k_scale", "v_proj.v_scale"),
              ("k_proj.output_scale", "v_proj.output_scale"), ("kv_scale", "kv_scale"))  # fmt: skip


class PagedAttention(nn.Module):
    """Grouped-query attention over the cache of this layer, which `bind_cache` gives it.

    `norms` are the layers that norm each query and key head before they are rotated, where the model has them.
    """

    reads_siblings = True

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        rotary: RotaryEmbedding,
        window: int | None = None,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ):
        super().__init__()
        self._shared = rotary, norms  # in a tuple: their weights are loaded at the paths that the model gives them
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.window = scale, window
        self.views: Views = {}
        self.k_scale = self.v_scale = 1.0
        self.scales_from_checkpoint = False
        self.observe = False  # while set, attend sets the scales from the largest key and value that it sees

    @property
    def rotary(self) -> RotaryEmbedding:
        return self._shared[0]

    @property
    def norms(self) -> ops.HeadNorms | None:
        layers = self._shared[1]
        return ops.HeadNorms(layers[0].weight, layers[1].weight, layers[0].eps) if layers else None

    def load(self, loader: Loader) -> None:
        for spelling in _SPELLINGS:
            if loader.has(spelling[0]) and not self.scales_from_checkpoint:
                # e4m3fnuz codes mean half as much, so the same value needs twice the scale
                factor = 2.0 if loader.platform.fp8_dtype is torch.float8_e4m3fnuz else 1.0
                self.k_scale, self.v_scale = (float(loader.read(name, None).max()) * factor for name in spelling)
                self.scales_from_checkpoint = True
            for name in (*spelling, "q_scale", "q_proj.output_scale"):
                loader.skip(name)

    def bind_cache(self, views: Views) -> None:
        self.views = views

    def forward(self, x: ops.Operand, qkv: QKVLinear, batch: ForwardBatch) -> Tensor:
        """[T, heads * D] of hidden states x [T, K], which `qkv` projects."""
        scales = self.k_scale, self.v_scale
        if qkv.bias is None and not self.observe:
            cache = self.views, batch, self.window, *scales
            turned = ops.project(x, qkv.weight, self.heads, self.norms, self.rotary.cos_sin, *cache)
            if turned is not None:
                return ops.attention(turned, self.views, batch, self.scale, self.window, *scales).flatten(1)
        q, k, v = qkv(x)
        return self.attend(q, k, v, batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, heads * D] of queries, keys and values [T, heads, D] as they were projected."""
        norms, cos_sin = self.norms, self.rotary.cos_sin
        if self.observe:
            limit = FP8_MAX[self.views["k"].dtype]
            _, turned = reference.normed_and_rotated(q, k, norms, cos_sin, batch.positions)
            self.k_scale, self.v_scale = (max(float(x.nan_to_num(0).abs().max()) / limit, 1e-6) for x in (turned, v))
        cache = self.views, batch, self.scale, self.window, self.k_scale, self.v_scale
        return ops.attend(q, k, v, norms, cos_sin, *cache).flatten(1)
