"""Rotary position embedding, and the methods that extend it to longer contexts.

Dimension i of the first half of a head is rotated with dimension i of the second half by position * inv_freq[i].
Sources: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071); llama3 as published with Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.errors import OctavoError
from octavo.weights import Loader

__all__ = ["RotaryEmbedding", "longest_context", "rope_parameters", "stretch"]


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json in one form: rope_type, rope_theta and the values of that type.

    Older files have `rope_theta` and `rope_scaling` (with the type under `type` or `rope_type`), newer ones `rope_parameters`.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise OctavoError(f"config.json: rope_scaling must be an object, not {given!r}.")
    found = dict(given)
    kind = found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    for name in ("original_max_position_embeddings", "partial_rotary_factor"):
        found.setdefault(name, config.get(name))
    if not isinstance(kind, str) or kind not in _INV_FREQ:
        raise OctavoError(f"config.json asks for rope_type '{kind}'; Octavo knows {', '.join(_INV_FREQ)}.")
    for name in _NUMBERS:
        needed, value = name in _NEEDED[kind], found.get(name)
        if value is None and needed:
            raise OctavoError(f"config.json: rope_type '{kind}' needs {name}, which is not there.")
        if value is not None and not (
            isinstance(value, (int, float)) and (value > 0 or (value == 0 and not needed)) and value < 1e12
        ):
            raise OctavoError(f"config.json: {name} of the rotary embedding must be a positive number, not {value!r}.")
    if kind == "yarn" and found["rope_theta"] <= 1:
        raise OctavoError(f"config.json: rope_type 'yarn' needs a rope_theta over 1, not {found['rope_theta']!r}.")
    return found


def longest_context(positions: int, rope: Mapping[str, Any]) -> int:
    """The context length a model of `positions` was made for. YaRN and linear scaling extend the original context."""
    if (rope.get("rope_type") or rope.get("type")) not in ("yarn", "linear") or not rope.get("factor"):
        return positions
    return max(positions, int((rope.get("original_max_position_embeddings") or positions) * rope["factor"]))


def stretch(rope: Mapping[str, Any], positions: int) -> float:
    """The ratio of the context to the original one: `factor`, or else computed from `positions`."""
    return float(rope.get("factor") or positions / (rope.get("original_max_position_embeddings") or positions))


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions below `max_model_len`: `cos_sin`, FP32 [positions, R]. All layers share one table."""

    def __init__(self, head_dim: int, parameters: Mapping[str, Any], max_position_embeddings: int, max_model_len: int):
        super().__init__()
        self.head_dim, self.settings = head_dim, parameters
        self.max_position_embeddings, self.max_positions = max_position_embeddings, max_model_len

    def table(self, batch: ForwardBatch) -> Tensor:
        """What `batch.rotary_rows` are rows of."""
        return self.cos_sin if batch.rotary_table is None else batch.rotary_table

    def load(self, loader: Loader) -> None:
        frequencies = _INV_FREQ[self.settings["rope_type"]]
        inv_freq, factor = frequencies(self.head_dim, self.settings, self.max_position_embeddings)
        angles = torch.outer(torch.arange(self.max_positions).float(), inv_freq)
        self.cos_sin = (torch.cat([angles.cos(), angles.sin()], 1) * factor).to(loader.platform.device)


def _default(dim: int, p: Mapping[str, Any], _: int) -> tuple[Tensor, float]:
    return 1.0 / p["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim), 1.0


def _linear(dim: int, p: Mapping[str, Any], _: int) -> tuple[Tensor, float]:
    return _default(dim, p, _)[0] / p["factor"], 1.0


def _llama3(dim: int, p: Mapping[str, Any], _: int) -> tuple[Tensor, float]:
    """Long wavelengths are scaled by `factor`, short ones kept, those between interpolated."""
    base, original = _default(dim, p, _)[0], p["original_max_position_embeddings"]
    turns = original * base / (2 * math.pi)  # rotations within the original context
    keep = ((turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])).clamp(0, 1)
    return keep * base + (1 - keep) * base / p["factor"], 1.0


def _yarn(dim: int, p: Mapping[str, Any], max_positions: int) -> tuple[Tensor, float]:
    """Dimensions that rotate more than beta_fast times are kept, fewer than beta_slow scaled, those between interpolated."""
    base, original = _default(dim, p, 0)[0], p["original_max_position_embeddings"] or max_positions
    factor = stretch(p, max_positions)

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (max(turns, 1e-6) * 2 * math.pi)) / (2 * math.log(p["rope_theta"]))

    low, high = dimension_of(p.get("beta_fast") or 32), dimension_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return ramp * base / factor + (1 - ramp) * base, p.get("attention_factor") or _yarn_magnitude(factor, p)


def _yarn_magnitude(factor: float, p: Mapping[str, Any]) -> float:
    """The factor on cosines and sines that keeps the spread of attention logits."""

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)


_NEEDED = {
    "default": ("rope_theta",),
    "dynamic": ("rope_theta", "factor"),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("rope_theta",),
}
_NUMBERS = (
    *_NEEDED["llama3"], "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
)  # fmt: skip
# Within the context that the model was made for, "dynamic" keeps the base; it grows with longer ones, which are not served.
_INV_FREQ = {"default": _default, "dynamic": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
