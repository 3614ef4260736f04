"""A --quantization-config file: what `octavo compare --auto` found, and how it goes together with the flags."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from octavo.errors import OctavoError
from octavo.option_values import DECODE_ACTIVATIONS, KV_CACHE_DTYPES, QUANTIZATIONS, canonical

__all__ = ["merged", "read_quantization_config"]

# Keys of a --quantization-config file and their types. "measured" is for people: the results of the search that wrote it.
_FILE_KEYS: dict[str, type] = {
    "quantization": str,
    "kv_cache_dtype": str,
    "quantization_ignore": list,
    "quantize_lm_head": bool,
    "kv_cache_rounding": str,
    "calculate_kv_scales": bool,
    "decode_activations": str,
    "measured": dict,
}


def read_quantization_config(path: str) -> dict[str, Any]:
    """Fields of EngineConfig from a JSON file that `octavo compare --auto` wrote. Raises OctavoError that names the error."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise OctavoError(f"--quantization-config {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"--quantization-config {path} is not valid JSON ({error}).") from None
    if not isinstance(found, dict):
        raise OctavoError(f"--quantization-config {path} must hold a JSON object, as `octavo compare --auto` writes one.")
    for key, value in found.items():
        kind = _FILE_KEYS[canonical(f"--quantization-config {path}: the key", key, {k: k for k in _FILE_KEYS})]
        if not isinstance(value, kind) or (isinstance(value, list) and not all(isinstance(name, str) for name in value)):
            wanted = {str: "a string", list: "a list of strings", bool: "true or false", dict: "an object"}[kind]
            raise OctavoError(f"--quantization-config {path}: {key} must be {wanted}, not {json.dumps(value)}.")
    found.pop("measured", None)
    return found


def merged(config: Any, read: dict[str, Any]) -> dict[str, Any]:
    """The file's fields merged with an EngineConfig's. Ignored layers are united; other fields given twice must agree."""
    known = {  # equal under two names is equal
        "quantization": QUANTIZATIONS, "kv_cache_dtype": KV_CACHE_DTYPES, "decode_activations": DECODE_ACTIVATIONS,
    }  # fmt: skip
    out = dict(read)
    for f in fields(config):
        given, name = getattr(config, f.name), f.name
        if name not in read or given == f.default:
            continue
        if name == "quantization_ignore":
            ignored = [given] if isinstance(given, str) else given
            out[name] = tuple(dict.fromkeys([*ignored, *read[name]]))
        elif known.get(name, {}).get(given, given) != known.get(name, {}).get(read[name], read[name]):
            said = f"{'--' + name.replace('_', '-')} {given}" if isinstance(given, str) else "--" + name.replace("_", "-")
            raise OctavoError(
                f"{said} contradicts {config.quantization_config}, which says {json.dumps(read[name])}; give one of them."
            )
    return out
