"""What config.json says of a quantized checkpoint: compressed-tensors' `quantization_config`.

One group of schemes is for all modules of class Linear but those that `ignore` names. Where packed INT4 stays beside FP8 the
format is `mixed-precision`, and each size of INT4's groups has a group of schemes more, whose targets are patterns of names:
they come before a class (https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

import re
from typing import Any

from octavo.convert.quantize_plan import Plan
from octavo.quant.checks import quantization_configs
from octavo.quant.scheme import BLOCK, Granularity

__all__ = ["quantization_config"]

_EIGHT: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
_FOUR: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
_STRATEGIES: dict[Granularity, tuple[dict[str, Any], dict[str, Any]]] = {  # of weights and of activations
    Granularity.TENSOR: ({"strategy": "tensor"}, {"strategy": "token"}),
    Granularity.ROW: ({"strategy": "channel"}, {"strategy": "token"}),
    Granularity.BLOCK: (
        {"strategy": "block", "block_structure": [BLOCK, BLOCK]},
        {"strategy": "group", "group_size": BLOCK},
    ),
}


def quantization_config(plan: Plan) -> dict[str, Any]:
    """Of what `plan` writes."""
    first = plan.quantized[0]
    strategy, activations = _STRATEGIES[first.granularity]
    weight_only = first.scheme is not None and first.scheme.activation is None
    fp8 = {
        "targets": ["Linear"],
        "weights": {**_EIGHT, **strategy, "dynamic": False},
        "input_activations": None if weight_only else {**_EIGHT, **activations, "dynamic": True},
        "output_activations": None,
    }
    int4 = _int4_groups(plan)
    groups = [fp8 | {"format": "float-quantized"}, *int4] if int4 else [fp8]
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if int4 else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": plan.ignored(),
        "kv_cache_scheme": _cache_scheme(plan),
    }


def _cache_scheme(plan: Plan) -> dict[str, Any] | None:
    """What is asked for, else the checkpoint's own. Of scales that are there without it, readers take none unasked: with it,
    vLLM's and transformers' caches are FP8 whatever their users say."""
    if plan.cache_scales is not None and plan.cache_scales.strategy is not None:
        return {**_EIGHT, "strategy": plan.cache_scales.strategy, "dynamic": False}
    found = (c for c in quantization_configs(plan.config) if c.get("quant_method") == "compressed-tensors")
    return next((c.get("kv_cache_scheme") for c in found), None)


def _int4_groups(plan: Plan) -> list[dict[str, Any]]:
    """Of the codes that are copied. A pattern stands for modules that differ in numbers, where it is of no other scheme's."""
    others = {_pattern(name) for name in plan.modules - plan.int4.keys()}
    sizes: dict[str, set[int]] = {}
    for module, scheme in plan.int4.items():
        sizes.setdefault(_pattern(module), set()).add(scheme.group)
    targets: dict[int, dict[str, None]] = {}
    for module, scheme in plan.int4.items():
        pattern = _pattern(module)
        alone = pattern in others or len(sizes[pattern]) > 1
        targets.setdefault(scheme.group, {})[module if alone else pattern] = None
    return [
        {
            "targets": list(names),
            "format": "pack-quantized",
            "weights": {**_FOUR, "group_size": size},
            "input_activations": None,
            "output_activations": None,
        }
        for size, names in sorted(targets.items())
    ]


def _pattern(module: str) -> str:
    """A target for a module and those that differ from it in numbers, whatever stands before the layers."""
    first = re.search(r"\.\d+\.", module)
    if first is None:
        return module
    parts = module[first.end() :].split(".")
    return r"re:.*\." + r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in parts) + "$"
