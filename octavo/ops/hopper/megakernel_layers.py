"""What both megakernels require of a decoder's layers."""

from __future__ import annotations

import torch

from octavo.ops.contract import DecoderParts, LayerParts
from octavo.ops.gpu import PackedScaledMM
from octavo.ops.hopper.compile import missing

__all__ = ["packed_weights", "unfit"]


def packed_weights(layer: LayerParts) -> list[PackedScaledMM]:
    """A layer's weights in execution order, if `unfit` accepts the layers."""
    found = [w for w in layer.weights if isinstance(w, PackedScaledMM)]
    assert len(found) == len(layer.weights)
    return found


def unfit(parts: DecoderParts) -> str | None:
    """None, or the reason why neither megakernel supports these layers."""
    if (reason := missing()) is not None:
        return reason
    if parts.ranks > 1:
        return "several ranks share each layer"
    weights = [w for layer in parts.layers for w in layer.weights]
    if not all(isinstance(w, PackedScaledMM) and w.weight.shape == (w.n, w.k) for w in weights):
        return "not every weight is FP8 with a scale a channel or matrix"
    if parts.layers[0].input_norm.dtype is not torch.bfloat16:
        return f"the model is {parts.layers[0].input_norm.dtype}"
    return None
