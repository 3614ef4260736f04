"""Attention over the paged cache: rotates, writes this step's keys and values, then attends to all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.errors import OctavoError
from octavo.kvcache import KeyRounding, LayerCache, Views
from octavo.layers.linear import QKVLinear
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.ops import reference
from octavo.platform import FP8_MAX
from octavo.quant.formats import Shard
from octavo.weights import Loader

__all__ = ["SCALE_NAMES", "PagedAttention"]

# Names of an FP8 cache's scales in checkpoints, relative to the attention module, newest first.
_SPELLINGS = (("k_scale", "v_scale"), ("attn.k_scale", "attn.v_scale"), ("k_proj.k_scale", "v_proj.v_scale"),
              ("qkv_proj.k_scale", "qkv_proj.v_scale"), ("qkqkv_proj.k_scale", "qkqkv_proj.v_scale"),
              ("k_proj.output_scale", "v_proj.output_scale"), ("kv_scale", "kv_scale"))  # fmt: skip
SCALE_NAMES = (*dict.fromkeys(name for pair in _SPELLINGS for name in pair), "q_scale", "q_proj.output_scale")


class PagedAttention(nn.Module):
    """Grouped-query attention over this layer's cache, which `bind_cache` sets.

    `norms`: the query and key norms applied per head before rotation, if the model has them.
    """

    reads_siblings = True

    cache: LayerCache
    k_scale: Tensor  # as in LayerCache; updated in place, because graphs hold their addresses
    v_scale: Tensor
    key_influence: Tensor | None = None  # as in KeyRounding, of this rank's heads; None: keys are rounded to nearest
    key_order: Tensor | None = None

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
        self._shared = rotary, norms  # in a tuple, so that torch does not register them: the model loads them at its paths
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.window = scale, window
        self.scales_from_checkpoint = False
        self.observe = False  # while set, `attend` sets the scales from the largest key and value
        self.query_gram: Tensor | None = None  # FP32 [kv_heads, D, D]; where set, `attend` adds q q^T of its rotated queries

    @property
    def rotary(self) -> RotaryEmbedding:
        return self._shared[0]

    @property
    def norms(self) -> ops.HeadNorms | None:
        layers = self._shared[1]
        return ops.HeadNorms(layers[0].weight, layers[1].weight, layers[0].eps) if layers else None

    def load(self, loader: Loader) -> None:
        self.tp = loader.tp
        self.k_scale, self.v_scale = (torch.ones(1, dtype=torch.float32, device=loader.platform.device) for _ in range(2))
        self.scales_from_checkpoint = False
        for spelling in _SPELLINGS:
            k, v = spelling
            if (loader.has(k) or loader.has(v)) and not self.scales_from_checkpoint:
                # k_scale alone serves values too, as in vLLM; v_scale alone is an incomplete checkpoint
                self.k_scale, self.v_scale = (self._stored_scale(loader, name) for name in (k, v if loader.has(v) else k))
                self.scales_from_checkpoint = True
            for name in spelling:
                loader.skip(name)

    def _stored_scale(self, loader: Loader, name: str) -> Tensor:
        """One scale per KV head of this rank if the checkpoint has one per head, else the largest.

        No value is read on the host, because a loader on the meta device has none.
        """
        stored, tp = loader.read(name, None).float().flatten(), loader.tp
        count = stored.numel()
        if not count:
            raise OctavoError(f"tensor {loader.prefix}{name} is empty; download the checkpoint again.")
        shard = Shard(0, tp.rank, tp.size, copies=max(1, tp.size // count))  # as QKVLinear splits KV heads
        by_head = count > 1 and tp.part(count) == self.kv_heads and max(count, tp.size) % min(count, tp.size) == 0
        scale = stored[shard.slice(count)] if by_head else stored.amax().view(1)
        # an e4m3fnuz code means half as much, so the same value needs twice the scale
        return scale * (2.0 if loader.platform.fp8_dtype is torch.float8_e4m3fnuz else 1.0)

    def bind_cache(self, views: Views) -> None:
        rounding = None
        if views and views["k"].dtype in FP8_MAX and self.key_influence is not None and self.key_order is not None:
            rounding = KeyRounding(self.key_influence, self.key_order)
        self.cache = LayerCache(views, self.k_scale, self.v_scale, rounding)

    def own_rounding(self, influence: Tensor, order: Tensor) -> KeyRounding:
        """This rank's part of a KeyRounding of all KV heads. Raises OctavoError for other shapes than the layer's."""
        count, dim, tp = len(order), self.head_dim, self.tp
        by_heads = count and order.shape == (count, dim) and influence.shape == (count, dim, dim)
        at = Shard(0, tp.rank, tp.size, copies=max(1, tp.size // max(1, count))).slice(count)
        if not by_heads or len(order[at]) != self.kv_heads or (tp.size == 1 and count != self.kv_heads):
            raise OctavoError(
                f"the checkpoint's rounding of keys is for {count} KV heads of {order.shape[-1]}, and the model has others; "
                "calibrate it again."
            )
        device = self.k_scale.device
        return KeyRounding(influence[at].float().contiguous().to(device), order[at].int().contiguous().to(device))

    def set_key_rounding(self, new: KeyRounding) -> None:
        """Rounds keys by `new`: `bind_cache` hands it to FP8 caches. What was handed over is changed in place."""
        if self.key_influence is None or self.key_order is None:
            self.key_influence, self.key_order = new
        else:  # graphs hold their addresses
            self.key_influence.copy_(new.influence)
            self.key_order.copy_(new.order)

    def forward(self, x: ops.Operand, qkv: QKVLinear, batch: ForwardBatch) -> Tensor:
        """[T, heads * D] from hidden states x [T, K], which `qkv` projects."""
        if qkv.bias is None and not self.observe and self.query_gram is None:
            rotated = ops.project(x, qkv.weight, self.heads, self._rope(batch), self.cache, batch, self.window)
            if rotated is not None:
                return ops.attention(rotated, self.cache, batch, self.scale, self.window).flatten(1)
        q, k, v = qkv(x)
        return self.attend(q, k, v, batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, heads * D] from projected queries, keys and values [T, heads, D]."""
        rope = self._rope(batch)
        if self.observe:
            _, rotated = reference.normed_and_rotated(q, k, rope)
            self._fit(self.k_scale, rotated)
            self._fit(self.v_scale, v)
        if self.query_gram is not None:
            rotated = ops.rope_write_kv(q, k, v, rope, self.cache, batch.slot_mapping)
            for total, x in zip(self.query_gram, rotated.unflatten(1, (self.kv_heads, -1)).unbind(1), strict=True):
                ops.add_gram(total, x.flatten(0, 1))
            return ops.attention(rotated, self.cache, batch, self.scale, self.window).flatten(1)
        return ops.attend(q, k, v, rope, self.cache, batch, self.scale, self.window).flatten(1)

    def _rope(self, batch: ForwardBatch) -> ops.Rope:
        return ops.Rope(self.norms, self.rotary.table(batch), batch.rotary_rows)

    def _fit(self, scale: Tensor, x: Tensor) -> None:
        """Sets a scale in place so that the largest magnitude in x maps to the largest code, of all ranks' heads."""
        limit = FP8_MAX[self.cache.views["k"].dtype]
        peak = self.tp.max_reduce(x.nan_to_num(0).abs().amax().float().view(1))
        scale.copy_((peak / limit).clamp(min=1e-6))
