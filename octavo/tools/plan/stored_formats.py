"""How a checkpoint stores each weight of a model: by its safetensors headers, or by config.json's `quantization_config`."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

from octavo.tools.plan.headers import StoredTensor
from octavo.tools.plan.shapes import Model
from octavo.tools.plan.sizes import BLOCK, Format, Weight, dense

__all__ = ["FORMATS", "Stored", "from_config", "from_headers", "matches"]

FORMATS = {
    "bf16": dense(),
    "fp8": Format("fp8", 8, "row"),
    "ptpc_fp8": Format("ptpc_fp8", 8, "row"),
    "fp8_block": Format("fp8_block", 8, "tile"),
}
Headers = Mapping[str, StoredTensor]
Found = tuple[Format, int] | None  # format and parameters
_FP8, _DENSE = ("F8_E4M3", "F8_E5M2"), ("BF16", "F16", "F32")


@dataclass
class Stored:
    """What is on disk. formats: of each of the model's weights, in their order. problems: why it would not load."""

    formats: list[Format]
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # component -> parameters, by the headers
    nbytes: int = 0  # of all tensors, by the headers

    def problem(self, sentence: str) -> None:
        """Adds a sentence; the first few say enough."""
        if len(self.problems) < 3:
            self.problems.append(sentence)

    @property
    def quantized(self) -> bool:
        return any(form.quantized for form in self.formats)

    @property
    def scheme(self) -> str | None:
        """The scheme that all FP8 weights have, if there is one: --quantize-lm-head's where --quantization is not given."""
        names = {form.name for form in self.formats if form.bits == 8}
        return names.pop() if len(names) == 1 else None

    @property
    def label(self) -> str:
        """The format that most values are stored in."""
        names = Counter(form.name for form in self.formats if form.quantized)
        return names.most_common(1)[0][0] if names else "bf16"


def matches(pattern: str, name: str) -> bool:
    """Whether a --quantization-ignore pattern means the module `name` (as octavo.quant.rules, which imports torch, has it)."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if name == pattern or name.endswith("." + pattern):
        return True
    return any(sign in pattern for sign in "*?[") and fnmatch.fnmatchcase(name, pattern)


def expert_names(weight: Weight) -> Iterator[str]:
    """The checkpoint's module names, every expert's."""
    for name in weight.names:
        if "{}" in name:
            yield from (name.format(e) for e in range(weight.experts))
        else:
            yield name


# --- by config.json alone ---------------------------------------------------------------------------------------------


def from_config(model: Model, config: Mapping[str, Any]) -> Stored:
    """What `quantization_config` promises; layers that are kept by default are taken as BF16."""
    text = config.get("text_config") or {}
    keys = ("quantization_config", "compression_config")
    found: Mapping[str, Any] = next((c[key] for c in (config, text) for key in keys if c.get(key)), {})
    form = _promised(found)
    if isinstance(form, str):
        return Stored([dense()] * len(model.weights), [form])
    skip = [*(found.get("modules_to_not_convert") or ()), *(found.get("ignore") or ()), *(found.get("exclude") or ())]
    return Stored([dense() if form is None or w.kept or _left_out(w, skip) else form for w in model.weights])


def _promised(found: Mapping[str, Any]) -> Format | str | None:
    """The format, None for a BF16 checkpoint, or a sentence for one that is not known."""
    method = found.get("quant_method")
    if not found:
        return None
    if method in ("fp8", "fbgemm_fp8"):
        if method == "fp8" and found.get("weight_block_size"):
            return FORMATS["fp8_block"]
        return FORMATS["fp8" if method == "fp8" else "ptpc_fp8"]
    if method == "modelopt" and str(found.get("quant_algo", "FP8")).upper() == "FP8":
        return FORMATS["fp8"]
    if method == "quark":
        return _by_strategy(str((found.get("global_quant_config") or {}).get("weight", {}).get("qscheme", "per_tensor")))
    if method == "compressed-tensors":
        groups = list((found.get("config_groups") or {}).values())
        weights = (groups[0].get("weights") or {}) if groups else {}
        if weights.get("type") == "int" and weights.get("num_bits") == 4 and weights.get("group_size"):
            return _int4(int(weights["group_size"]))
        if weights.get("type") == "float" and weights.get("num_bits") == 8:
            return _by_strategy(str(weights.get("strategy", "tensor")))
    return f"the checkpoint's quantization_config (quant_method '{method}') is of a kind that Octavo does not read."


def _by_strategy(strategy: str) -> Format:
    channel = FORMATS["ptpc_fp8"] if "channel" in strategy else FORMATS["fp8"]
    return FORMATS["fp8_block"] if "block" in strategy else channel


def _int4(group: int) -> Format:
    return Format(f"int4 (groups of {group})", 4, "group", group)


def _left_out(weight: Weight, patterns: Sequence[str]) -> bool:
    """Whether a checkpoint's own list leaves the weight out: whole names, parents of them, or re:."""
    names = [name.format(0) for name in weight.names]
    return any(_names(pattern, name) for pattern in patterns for name in names)


def _names(pattern: str, name: str) -> bool:
    try:
        return matches(pattern, name) or name.startswith(pattern + ".")
    except re.error:
        return False


# --- by the headers ---------------------------------------------------------------------------------------------------


def from_headers(model: Model, tensors: Headers) -> Stored:
    """What the files hold, checked against what the model needs."""
    out = Stored([], nbytes=sum(t.nbytes for t in tensors.values()))
    seen: set[str] = set()
    for weight in model.weights:
        form = None
        for name, shape in _modules(weight, tensors):
            found = _vector(name, shape, tensors, out, seen) if weight.is_vector else _matrix(name, shape, tensors, out, seen)
            if found is not None:
                form = form or found[0]
                out.counts[weight.component] += 0 if weight.tied else found[1]
        out.formats.append(form or dense())
    extra = [n for n in tensors if n not in seen and not any(fnmatch.fnmatchcase(n, p) for p in (*model.extra, *_SIDE))]
    if extra:
        out.problems.append(
            f"the checkpoint holds {len(extra)} tensor(s) that a model of this config.json does not have, "
            f"the first is {min(extra)}; they are of different models."
        )
    return out


_SIDE = ("*.input_scale", "*.activation_scale", "*.input_scale_ub", "*.input_zero_point", "lm_head.weight")  # known, not needed


def _modules(weight: Weight, tensors: Headers) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each module; experts that are stored as one tensor of three dimensions come as that one."""
    stacked = weight.names[0].replace("{}.gate_proj", "gate_up_proj").replace("{}.down_proj", "down_proj")
    if weight.experts > 1 and (stacked in tensors or f"{stacked}.weight" in tensors):
        yield stacked, (weight.experts, sum(s[0] for s in weight.shapes), weight.shapes[0][1])
        return
    for name, shape in zip(weight.names, weight.shapes, strict=True):
        for one in [name.format(e) for e in range(weight.experts)] if "{}" in name else [name]:
            yield one, shape


def _vector(name: str, shape: tuple[int, ...], tensors: Headers, out: Stored, seen: set[str]) -> Found:
    seen.add(name)
    if name not in tensors:
        out.problem(f"the checkpoint has no tensor {name}, which the model needs; is it complete?")
        return None
    if tensors[name].shape != shape:
        out.problem(_mismatch(name, tensors[name].shape, shape))
    return dense(), prod(shape)


def _matrix(name: str, shape: tuple[int, ...], tensors: Headers, out: Stored, seen: set[str]) -> Found:
    weight, packed, scale, inverse = (f"{name}.{p}" for p in ("weight", "weight_packed", "weight_scale", "weight_scale_inv"))
    seen.update((name, weight, packed, scale, inverse, f"{name}.weight_shape"))
    scales = tensors.get(inverse) or tensors.get(scale)
    if packed in tensors:
        return _int4(shape[-1] // scales.shape[-1] if scales else 32), prod(tensors[packed].shape) * 8  # 8 values an I32
    tensor = tensors.get(weight) or tensors.get(name)
    if tensor is None:
        out.problem(f"the checkpoint has no tensor {weight}, which the model needs; is it complete?")
        return None
    turned = len(shape) == 3 and sorted(tensor.shape) == sorted(shape)  # stacked experts come either way round
    if tensor.shape != shape and not turned:
        out.problem(_mismatch(weight, tensor.shape, shape))
    if tensor.dtype in _DENSE:
        return dense(), prod(tensor.shape)
    if tensor.dtype not in _FP8 or scales is None:
        out.problem(f"{weight} is stored as {tensor.dtype} without a scale beside it, a format that Octavo does not read.")
        return dense(), prod(tensor.shape)
    tiles = len(scales.shape) == 2 and scales.shape == tuple(ceil(n / BLOCK) for n in shape)
    channels = prod(scales.shape) == shape[0] > 1
    return FORMATS["fp8_block" if tiles else "ptpc_fp8" if channels else "fp8"], prod(tensor.shape)


def _mismatch(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> str:
    return f"tensor {name} has shape {list(stored)}, but config.json makes it {list(shape)}: they are of different models."
