"""A decode step by nothing but what a model tells megakernels of its layers, in the order that `LayerParts` says."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.ops import DenseParts, ExpertLayerParts, MixtureParts, Operand

__all__ = ["AsTold"]


class AsTold:
    """Implements octavo.ops.FusedDecoder. steps: how many it computed."""

    name = "as told"

    def __init__(self, parts: DenseParts | MixtureParts):
        self.parts, self.steps = parts, 0

    def takes(self, requests: int, longest: int) -> bool:
        return True

    def variant(self, requests: int, longest: int) -> Hashable:
        return None

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        p = self.parts
        self.steps += 1
        for layer in p.layers:
            qkv = layer.qkv(ops.rms_norm(x, layer.input_norm, p.eps)[0])
            if layer.qkv_bias is not None:
                qkv = qkv + layer.qkv_bias
            q, k, v = qkv.unflatten(1, (-1, p.head_dim)).split((p.heads, p.kv_heads, p.kv_heads), dim=1)
            rope = ops.Rope(layer.norms, p.cos_sin, batch.rotary_rows)
            x = x + layer.o(ops.attend(q, k, v, rope, layer.cache, batch, p.scale, layer.window).flatten(1))
            normed = ops.rms_norm(x, layer.post_norm, p.eps)[0].values()
            if isinstance(layer, ExpertLayerParts):
                routed = ops.route(normed, layer.gate, layer.correction, layer.router, batch)
                x = x + ops.finished(ops.experts_uncombined(normed, routed, layer.gate_up, layer.down))
            else:
                x = x + layer.down(silu_mul(layer.gate_up(normed)))
        return x


def silu_mul(gate_up: Tensor) -> Operand:
    gate, up = gate_up.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up
