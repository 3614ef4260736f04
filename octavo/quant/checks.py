"""Checks config.json for quantized checkpoints that Octavo cannot read, before anything is loaded.

Tools write `quantization_config` (older ones `compression_config`) at the top level or, for multimodal models, within
`text_config`. ModelOpt writes hf_quant_config.json beside it or instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.files import read_json
from octavo.quant.scheme import BLOCK

__all__ = ["EXCLUDING", "cache_format_said", "check_format", "quantization_configs"]

EXCLUDING = ("modules_to_not_convert", "ignore", "exclude", "exclude_modules")  # lists of modules that stay as they were
READ = ("fp8", "compressed-tensors", "modelopt", "quark", "fbgemm_fp8")


def quantization_configs(config: Mapping[str, Any], directory: Path | None = None) -> list[dict[str, Any]]:
    """Every quantization config in a config.json, and in hf_quant_config.json of `directory`.

    null is none, and so is an empty object. Raises OctavoError for anything else that is no object.
    """
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    described = [(key, place.get(key)) for place in places for key in ("quantization_config", "compression_config")]
    for key, value in described:
        if value is not None and not isinstance(value, dict):
            raise OctavoError(f"config.json: {key} must be an object, not {json.dumps(value)[:80]}; download it again.")
    found = [value for _, value in described if value]
    modelopt_file = directory / "hf_quant_config.json" if directory else None
    if modelopt_file and (content := read_json(modelopt_file)) is not None:
        try:
            found.append({"quant_method": "modelopt", **content["quantization"]})
        except (KeyError, TypeError):
            raise OctavoError(f"{modelopt_file} is not a quantization config of ModelOpt's; download it again.") from None
    return [_flat(entry) for entry in found]


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """Normalizes ModelOpt's config: some have an inner `quantization` object, and some no quant_method."""
    within, producer = entry.get("quantization"), entry.get("producer")
    flat = {**entry, **within} if isinstance(within, dict) else entry
    made_by = producer.get("name") if isinstance(producer, dict) else None
    if not flat.get("quant_method") and ("quant_algo" in flat or made_by == "modelopt"):
        return {**flat, "quant_method": "modelopt"}
    return flat


def check_format(config: Mapping[str, Any], directory: Path | None = None) -> None:
    """Raises OctavoError for a checkpoint quantized in a format that Octavo does not read."""
    for entry in quantization_configs(config, directory):
        method = entry.get("quant_method") or ("compressed-tensors" if "config_groups" in entry else None)
        checks = {"fp8": _hf_fp8, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt, "quark": _quark}
        if method not in READ:
            raise _unread(f"quantized with '{method}'")
        try:
            _check_lists(entry)
            if method in checks:
                checks[method](entry)
        except (AttributeError, LookupError, TypeError):
            raise OctavoError(
                f"config.json: the quantization_config of '{method}' has a field of the wrong type; download it again."
            ) from None


def cache_format_said(config: Mapping[str, Any], directory: Path | None = None) -> str:
    """The format that a checkpoint's KV scales are for, as its config.json or hf_quant_config.json says it; "" for none."""
    for entry in quantization_configs(config, directory):
        algorithm, scheme = entry.get("kv_cache_quant_algo"), entry.get("kv_cache_scheme")
        if isinstance(algorithm, str):
            return algorithm.upper()
        if isinstance(scheme, dict) and scheme.get("num_bits"):
            return f"{'FP' if scheme.get('type') == 'float' else 'INT'}{scheme['num_bits']}"
    return ""


def _unread(what: str) -> OctavoError:
    return OctavoError(
        f"this checkpoint is {what}, which Octavo does not read; it reads BF16, FP8 of {', '.join(READ)}, "
        "and compressed-tensors INT4, so use one of those."
    )


def _check_lists(entry: Mapping[str, Any]) -> None:
    """Raises TypeError for names of modules that are no list of strings."""
    groups = entry.get("config_groups")
    targets = [group.get("targets") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    for listed in (*map(entry.get, EXCLUDING), *targets):
        if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
            raise TypeError


def _hf_fp8(entry: Mapping[str, Any]) -> None:
    if entry.get("weight_block_size") not in (None, [BLOCK, BLOCK]):
        raise _unread(f"FP8 in blocks of {entry['weight_block_size']}")
    if entry.get("fmt") not in (None, "e4m3"):
        raise _unread(f"FP8 of format '{entry['fmt']}'")


def _compressed_tensors(entry: Mapping[str, Any]) -> None:
    if (entry.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise _unread(f"compressed as '{entry['sparsity_config']['format']}'")
    if (entry.get("transform_config") or {}).get("config_groups"):
        raise _unread("rotated at run time (transform_config)")
    groups = entry.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise OctavoError("config.json: config_groups of its quantization_config must be an object; download it again.")
    for group in groups.values():
        weights = (group.get("weights") if isinstance(group, dict) else None) or {}
        kind = (weights.get("type"), weights.get("num_bits"))
        if weights and kind not in (("float", 8), ("int", 4)):
            raise _unread(f"stored as {kind[0]} of {kind[1]} bits")
        if kind[0] == "float" and weights.get("strategy", "tensor") not in ("tensor", "channel", "block"):
            raise _unread(f"FP8 with a scale for each {weights['strategy']} of {weights.get('group_size')} values")
        if weights and not weights.get("symmetric", True):
            raise _unread("stored with zero points")
        if weights.get("actorder") in (True, "group", "dynamic"):  # "weight", "static": an order that only the tool used
            raise _unread(f"stored with reordered columns (actorder '{weights['actorder']}')")
        if weights.get("strategy") == "block" and weights.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
            raise _unread(f"FP8 in blocks of {weights.get('block_structure')}")


def _modelopt(entry: Mapping[str, Any]) -> None:
    """Without a quant_algo, weights are not quantized, and only the KV cache may have scales."""
    algorithm = entry.get("quant_algo")
    if algorithm is not None and not str(algorithm).upper().startswith("FP8"):
        raise _unread(f"quantized by ModelOpt to '{algorithm}'")


def _quark(entry: Mapping[str, Any]) -> None:
    for step in entry.get("algo_config") or []:
        if any(step.get(name) for name in ("r3", "r4", "online_r1_rotation")):
            raise _unread(f"rotated at run time ({step.get('name')})")
    layers = [entry.get("global_quant_config"), *(entry.get("layer_quant_config") or {}).values()]
    for layer in filter(None, layers):
        weight = layer.get("weight") or {}
        kind = (weight[0] if isinstance(weight, list) else weight).get("dtype") or "fp8_e4m3"
        if kind != "fp8_e4m3":
            raise _unread(f"quantized by Quark to '{kind}'")
