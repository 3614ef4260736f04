"""Decode steps of a few requests in two launches a layer: attention with rotary and cache write, and everything between two
layers' attention, which a subclass launches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Generic

from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.ops import gpu
from octavo.ops.cache_writes import rope_write_kv
from octavo.ops.contract import DecoderParts, Layer, LayerParts, Rope
from octavo.ops.hopper import attention
from octavo.ops.hopper.compile import Kernel, compile_cubin
from octavo.platform import Platform, threads_on

__all__ = ["LayerByLayer"]


class LayerByLayer(Generic[Layer]):
    """A decoder's layers for steps of up to the last of `columns` one-token requests.

    columns: numbers of tokens that the kernel between attentions is compiled for. `parts` must have caches bound.
    """

    columns: Sequence[int]
    grid_barriers: Tensor  # of all layers' launches, zeros at a step's begin

    def __init__(self, parts: DecoderParts[Layer], platform: Platform):
        self.parts, self.platform, self.ctas = parts, platform, platform.multiprocessors

    def compiled(
        self, source: str, function: str, options: dict[str, int | float], variants: Mapping[int, dict[str, int]] | None = None
    ) -> dict[int, Kernel]:
        """csrc/`source` by the most tokens, ascending; variants: their further constants. Raises NoKernel."""
        variants = variants or {n: {"TOKENS": n} for n in self.columns}
        with threads_on(self.platform.device, len(variants), "octavo-compile") as pool:
            compile_for = partial(compile_cubin, source, f"{self.platform.arch}a")
            cubins = list(pool.map(lambda given: compile_for(options | given), variants.values()))
        return {n: Kernel(cubin, function) for n, cubin in sorted(zip(variants, cubins, strict=True))}

    def takes(self, requests: int, longest: int) -> bool:
        """Whether a step of this many one-token requests is supported, whatever the contexts."""
        return requests <= self.columns[-1]

    def variant(self, requests: int, longest: int) -> Hashable:
        """A key of what attention's launches differ in, beside `decode_variant`."""
        return None

    def run(self, x: Tensor, batch: ForwardBatch, between: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """The last layer's output, BF16 [requests, hidden], for embeddings x [requests, hidden].

        between(layer's number, attended, residual) gives the next layer's qkv and updates the residual in place.
        """
        first = self.parts.layers[0]
        self.grid_barriers.zero_()
        normed, _ = gpu.rms_norm(x, first.input_norm, self.parts.eps, None, [first.qkv])
        qkv, residual = first.qkv(normed), x.clone()
        if first.qkv_bias is not None:
            qkv += first.qkv_bias
        for at, layer in enumerate(self.parts.layers):
            attend = self._attend if layer.cache.key_rounding is None else self._write_and_attend
            qkv = between(at, attend(layer, qkv, batch), residual)
        return residual

    def _attend(self, layer: LayerParts[Any], qkv: Tensor, batch: ForwardBatch) -> Tensor:
        """Attention of a layer, [requests, heads * dim], for the product qkv; writes keys and values to the cache."""
        attend = attention.attend if attention.is_long(len(qkv), max(batch.context_lens)) else gpu.attend
        return attend(*self.attention_of(layer, qkv, batch)).flatten(1)

    def _write_and_attend(self, layer: LayerParts[Any], qkv: Tensor, batch: ForwardBatch) -> Tensor:
        """`_attend` where keys are not rounded to nearest, which no kernel that attends does."""
        q, k, v, rope, cache, batch, scale, window = self.attention_of(layer, qkv, batch)
        q = rope_write_kv(q, k, v, rope, cache, batch.slot_mapping)
        return attention.attention(q, cache, batch, scale, window).flatten(1)

    def attention_of(
        self, layer: LayerParts[Any], qkv: Tensor, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor, Tensor, Rope, LayerCache, ForwardBatch, float, int | None]:
        """The arguments of `ops.attend` for the product qkv."""
        p = self.parts
        q, k, v = qkv.unflatten(1, (-1, p.head_dim)).split((p.heads, p.kv_heads, p.kv_heads), dim=1)
        return q, k, v, Rope(layer.norms, p.cos_sin, batch.rotary_rows), layer.cache, batch, p.scale, layer.window
