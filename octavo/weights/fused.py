"""Presents matrices that a checkpoint stacks, `qkv_proj` and `gate_up_proj`, as the parts that transformers stores apart.

Rows are in the order of the name, as vLLM reads such checkpoints: queries, keys, values; gate, up. A part is a range of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from octavo.errors import OctavoError
from octavo.quant.scheme import BLOCK
from octavo.weights.names import TEXT_MODELS
from octavo.weights.stored_tensor import Slab, StoredTensor

__all__ = ["unfused"]

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MATRICES, SCALES = ("weight", "weight_packed"), ("weight_scale", "weight_scale_inv")


def unfused(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """`tensors` with stacked matrices, their biases and scales in parts. Raises OctavoError where a scale is of two parts."""
    out = dict(tensors)
    if config.get("model_type") not in TEXT_MODELS:
        return out
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last not in PARTS or end not in MATRICES or len(tensor.shape) != 2 or parent.endswith(".experts"):
            continue
        heights = _heights(last, tensor.shape[0], config)
        if not heights or f"{parent}.{PARTS[last][0]}.{end}" in tensors:
            continue
        for beside in (end, "bias", *SCALES):
            if whole := out.pop(f"{module}.{beside}", None):
                out |= {part.name: part for part in _parts(whole, parent, last, beside, heights)}
        out.pop(f"{module}.weight_shape", None)  # of the whole matrix
    return out


def _heights(last: str, rows: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The rows of each part; none if `rows` are not of these parts."""
    if last == "gate_up_proj":
        return () if rows % 2 else (rows // 2, rows // 2)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
        return ()
    width, key_heads = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads") or heads
    found = (heads * width, key_heads * width, key_heads * width)
    return found if sum(found) == rows else ()


def _parts(t: StoredTensor, parent: str, last: str, end: str, heights: Sequence[int]) -> list[StoredTensor]:
    rows, names = sum(heights), PARTS[last]
    if end in SCALES and prod(t.shape) == 1:  # of the whole matrix, and so of each part
        unit = rows
        steps: Sequence[int] = (0,) * len(names)
    else:
        unit = 1 if t.shape[:1] == (rows,) else BLOCK
        steps = [height // unit for height in heights]
        if sum(steps) != t.shape[0] or any(height % unit for height in heights):
            raise OctavoError(
                f"{t.name} has shape {list(t.shape)}, of which no part is of {names[0]} alone, which has {heights[0]} of the "
                f"{rows} rows; store {', '.join(names)} apart."
            )
    row, columns, out, first = t.nbytes // max(1, t.shape[0] if t.shape else 1), prod(t.shape[1:]), [], 0
    for name, step in zip(names, steps, strict=True):
        shape = (step, *t.shape[1:]) if unit != rows else t.shape or (1,)
        slab = Slab(0, prod(t.shape[:1]), columns, first, transposed=False)
        nbytes = row * step if unit != rows else t.nbytes
        key = t.key or t.name
        out.append(StoredTensor(f"{parent}.{name}.{end}", t.dtype, shape, t.file, t.start + first * row, nbytes, key, slab))
        first += step
    return out
