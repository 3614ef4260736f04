"""What layer_megakernel.cu requires of a decoder's layers."""

from __future__ import annotations

import torch

from octavo.ops.contract import DenseParts, LayerParts, PackedWeight
from octavo.ops.gpu import PackedBlocks, PackedScaledMM, PackedWeightOnly
from octavo.ops.hopper.compile import missing

__all__ = ["has_blocks", "has_two_codes", "packed_weights", "unfit"]


def packed_weights(layer: LayerParts[PackedWeight]) -> list[PackedScaledMM | PackedBlocks]:
    """A layer's weights in execution order, if `unfit` accepts the layers, without what pairs its activations."""
    weights = [w.codes if isinstance(w, PackedWeightOnly) else w for w in layer.weights]
    found = [w for w in weights if isinstance(w, PackedScaledMM | PackedBlocks)]
    assert len(found) == len(layer.weights)
    return found


def has_blocks(parts: DenseParts) -> bool:
    """Whether the weights have a scale a tile."""
    return isinstance(parts.layers[0].qkv, PackedBlocks)


def has_two_codes(parts: DenseParts) -> bool:
    """Whether activations are not rounded to FP8, so that each is two codes."""
    return isinstance(parts.layers[0].qkv, PackedWeightOnly)


def unfit(parts: DenseParts, kinds: tuple[type[PackedWeight], ...]) -> str | None:
    """None, or the reason why no megakernel for such weights, all of one of these kinds, supports these layers."""
    if (reason := missing()) is not None:
        return reason
    if parts.ranks > 1:
        return "several ranks share each layer"
    weights = [w for layer in parts.layers for w in layer.weights]
    if not any(all(isinstance(w, kind) for w in weights) for kind in kinds):
        return "not every weight is FP8 with a scale a channel or matrix" + ", or a tile" * (PackedBlocks in kinds)
    if any(w.weight.shape != (w.n, w.k) for layer in parts.layers for w in packed_weights(layer)):
        return "weights with padding"
    if parts.layers[0].input_norm.dtype is not torch.bfloat16:
        return f"the model is {parts.layers[0].input_norm.dtype}"
    return None
