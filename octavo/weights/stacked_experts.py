"""Presents experts that a checkpoint stacks in 3-D tensors one by one, under the names of Hugging Face checkpoints.

    experts.gate_up_proj [E, 2I, H], gate's rows before up's, experts.down_proj [E, H, I]; or transposed: [E, H, 2I], [E, I, H]

The sizes in config.json tell which of the two it is. H may equal 2I or I, but not both, so one of the two tensors always
decides. Scales of FP8 codes stand beside them, `gate_up_proj_scale_inv` [E, ...], transposed if the weights are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.errors import OctavoError
from octavo.quant.scheme import BLOCK
from octavo.weights.stored_tensor import Slab, StoredTensor

__all__ = ["one_by_one"]

_STACK = re.compile(
    r"(?P<at>.+\.experts)\.(?P<part>gate_up_proj|down_proj)(?:[._]weight)?"
    r"(?:[._](?P<end>scale|scale_inv|input_scale|activation_scale))?"
)
_SUFFIXES = {None: "weight", "scale": "weight_scale", "scale_inv": "weight_scale_inv"}
# Names of an expert's gate, up and down projections, by model type. Stacks of other types are not split.
_LLAMA, _MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
_NAMES = {
    **dict.fromkeys(
        ("qwen3_moe", "qwen3_vl_moe", "glm4_moe", "glm_moe_dsa", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25"), _LLAMA
    ),
    **dict.fromkeys(("mixtral", "minimax_m2"), _MIXTRAL),
}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass
class _Layer:
    """The expert stacks of one layer: the weights by part, and the tensors beside them."""

    weights: dict[str, StoredTensor] = field(default_factory=dict)
    beside: list[tuple[str, str, StoredTensor]] = field(default_factory=list)  # part, end of the name, tensor


def one_by_one(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """`tensors` with each expert stack split into matrices. Raises OctavoError where they contradict `config`."""
    model_type = config.get("model_type")
    if model_type not in _NAMES:
        return dict(tensors)
    names, out = _NAMES[model_type], {}
    layers: dict[str, _Layer] = {}
    for name, tensor in tensors.items():
        if names is _MIXTRAL:  # transformers uses another name of the layer for stacked experts
            name = name.replace(".mlp.", ".block_sparse_moe.")
        found = _STACK.fullmatch(name)
        if found is None:
            out[name] = tensor if name == tensor.name else replace(tensor, name=name, key=tensor.key or tensor.name)
            continue
        layer, part, end = layers.setdefault(found["at"], _Layer()), found["part"], found["end"]
        if end is None:
            layer.weights[part] = tensor
        else:
            layer.beside.append((part, _SUFFIXES.get(end, end), tensor))
    if layers:
        sizes = _sizes(config)
        for at, layer in layers.items():
            out |= {tensor.name: tensor for tensor in _matrices(at, layer, names, *sizes)}
    return out


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Number of experts, hidden size and intermediate size."""
    text = config.get("text_config") or config
    count = next((text[name] for name in _COUNTS if text.get(name) is not None), None)
    inner = text.get("moe_intermediate_size") or text.get("intermediate_size")
    sizes = {"num_experts": count, "hidden_size": text.get("hidden_size"), "moe_intermediate_size": inner}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise OctavoError(f"config.json: {name} must be a positive integer, not {size!r}: the checkpoint stacks experts.")
    return count, sizes["hidden_size"], inner  # type: ignore[return-value]


def _matrices(at: str, layer: _Layer, names: tuple[str, ...], count: int, hidden: int, inner: int) -> Iterator[StoredTensor]:
    shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    either = {False, True}
    for part, tensor in layer.weights.items():
        plain = (count, *shapes[part])
        other = (plain[0], plain[2], plain[1])
        fits = {way for way, shape in ((False, plain), (True, other)) if tensor.shape == shape}
        if not fits:
            raise OctavoError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}, but config.json makes it {list(plain)} or, turned, "
                f"{list(other)}: they are of different models."
            )
        either &= fits
    if not either:
        raise OctavoError(
            f"{at}: gate_up_proj and down_proj stack their experts in different orders of dimensions; "
            "the checkpoint is of an unknown format."
        )
    transposed = either == {True}
    for part, tensor in layer.weights.items():
        yield from _split(at, part, "weight", tensor, names, count, shapes[part], transposed)
    for part, end, tensor in layer.beside:
        shape = _shape_beside(tensor, part, count, shapes[part], transposed)
        yield from _split(at, part, end, tensor, names, count, shape, transposed)


def _shape_beside(t: StoredTensor, part: str, count: int, weight: tuple[int, int], transposed: bool) -> tuple[int, ...]:
    """The untransposed shape of one expert's scales: none, [rows] or [rows, columns]. Raises OctavoError for others."""
    shape = t.shape[1:]
    if transposed and len(shape) == 2:
        shape = shape[1], shape[0]
    tiles = tuple(-(-n // BLOCK) for n in weight)
    if t.shape[:1] != (count,) or shape not in ((), (1,), (1, 1), weight[:1], (weight[0], 1), tiles):
        raise OctavoError(
            f"{t.name} has shape {list(t.shape)}, which is neither one scale for each of {count} experts' matrices "
            f"{list(weight)}, nor one for each of their channels, nor one for each 128x128 tile."
        )
    if part == "gate_up_proj" and shape == tiles and tiles[0] > 1 and weight[0] // 2 % BLOCK:
        raise OctavoError(
            f"{t.name}: a 128x128 tile holds rows of both gate and up, of {weight[0] // 2} rows each, which Octavo does not "
            "take apart; store the experts one by one."
        )
    return shape


def _split(
    at: str, part: str, end: str, t: StoredTensor, names: tuple[str, ...], count: int, shape: tuple[int, ...], transposed: bool
) -> Iterator[StoredTensor]:
    """Each expert's part of `t`, a weight or scale stack of `shape` per expert; gate and up get half of the rows each."""
    rows, columns = (*shape, 1, 1)[:2]
    parts = names[:2] if part == "gate_up_proj" else names[2:]
    each = max(1, rows // len(parts))  # a per-tensor scale belongs to both halves
    nbytes = t.nbytes // count
    transposed = transposed and min(rows, columns) > 1
    for expert in range(count):
        for i, name in enumerate(parts):
            first = i * each if rows > 1 else 0
            size = nbytes * each // rows
            yield StoredTensor(
                f"{at}.{expert}.{name}.{end}", t.dtype, (each, *shape[1:]) if shape else (1,), t.file,
                t.start + expert * nbytes + first * (nbytes // rows), size,
                key=t.name, slab=Slab(expert, rows, columns, first, transposed),
            )  # fmt: skip
