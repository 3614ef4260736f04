"""Tensors in a checkpoint that no layer of the model has read: those that it can do without, and those that it cannot.

The names are what llm-compressor, ModelOpt, Quark, AutoFP8, fbgemm and transformers write beside a model's own tensors, and
buffers that older versions of transformers saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.errors import OctavoError

__all__ = ["check_scaled", "skip_leftovers"]

# What may go unread, by the last part of the name. Activations are scaled by what they are when the model runs, and queries and
# probabilities stay in the model's dtype; an FP8 cache is symmetric, as the scales beside these zero points are meant to be.
SKIPPED = {
    "scales of activations, which are taken of each token here": (
        "input_scale", "input_zero_point", "input_scale_ub", "activation_scale", "act_scale", "output_scale",
        "output_zero_point", "weight_shape",
    ),
    "scales of queries and probabilities, which are not quantized here": (
        "q_scale", "q_zero_point", "prob_scale", "prob_output_scale", "softmax_scale",
    ),
    "offsets of an asymmetric cache, which is symmetric here": ("k_zero_point", "v_zero_point", "k_bias", "v_bias"),
    "maxima of a calibration": ("_amax",),
    "buffers that follow from config.json": ("masked_bias", "position_ids"),
}  # fmt: skip
WHY = {name: why for why, names in SKIPPED.items() for name in names}
# What means nothing if all of it is 0.
NOTHING_IF_ZERO = {
    "bias": "a bias that config.json does not announce",
    "weight_zero_point": "zero points of weights, which Octavo reads of symmetric formats, as 0, alone",
    "bias_scale": "a scale of a quantized bias",
    "bias_zero_point": "a zero point of a quantized bias",
}
# What changes the values of weights or activations, so that a model without it would be another.
NEEDED = {
    "pre_quant_scale": "factors on the activations (AWQ, SmoothQuant)",
    "weight_scale_2": "second scales, of FP4 weights",
    "weight_global_scale": "second scales, of FP4 weights",
    "weight_g_idx": "an order of the columns (act-order)",
    "bitmask": "the places of values that are not zero (sparse weights)",
}
# A transform at run time of compressed-tensors, such as R4_input.weight.
ROTATION = re.compile(r"\.[Ruv]\d*_(input|output|weight_input|weight_output|q_attn|k_cache)(\.weight|\.perm)?$")


def skip_leftovers(extra: Sequence[str], read: Callable[[str], Tensor], note: Callable[[str], None]) -> None:
    """Notes, kind by kind, what the model can do without of the names `extra`. Raises OctavoError for any other."""
    skipped: dict[str, dict[str, int]] = {}
    for name in extra:
        end = name.rpartition(".")[2]
        why = WHY.get(end)
        if why is None and end in NOTHING_IF_ZERO and _is_zero(read(name)):
            why = "zeros"
        if why is None:
            raise OctavoError(_refusal(name, end, len(extra)))
        kinds = skipped.setdefault(why, {})
        kinds[end] = kinds.get(end, 0) + 1
    for why, kinds in sorted(skipped.items()):
        listed = ", ".join(f"{count} {end}" for end, count in sorted(kinds.items()))
        note(f"skipped {listed}: {why}")


def check_scaled(name: str, read: Callable[[str], Tensor]) -> None:
    """Raises OctavoError for a tensor beside a quantized weight that gives its codes another meaning than code times scale."""
    end = name.rpartition(".")[2]
    if end in NEEDED or (end == "weight_zero_point" and not _is_zero(read(name))):
        raise OctavoError(_refusal(name, end, 1))


def _refusal(name: str, end: str, count: int) -> str:
    what = "rotations at run time" if ROTATION.search(name) else NEEDED.get(end) or NOTHING_IF_ZERO.get(end)
    if what is None:
        return (
            f"the checkpoint holds {count} tensor(s) that a model of this config.json does not have, "
            f"the first is {name}; they are of different models."
        )
    return f"the checkpoint holds {name}: {what}; without it the model would be another, so take a checkpoint that has none."


def _is_zero(values: Tensor) -> bool:
    """True for a tensor without memory, too: a plan reads no values."""
    return values.is_meta or not bool(values.view(torch.uint8).any() if values.dtype.itemsize == 1 else values.any())
