"""Values of options: the spellings that are known, and --limit-mm-per-prompt."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from octavo.errors import OctavoError

__all__ = [
    "CHECKPOINT_FORMATS", "EXECUTORS", "KV_CACHE_DTYPES", "MAX_LOGPROBS", "MAX_MEDIA", "QUANTIZATIONS", "ROUNDINGS",
    "SPELLINGS", "UNREAD_FORMATS", "canonical", "layer_names", "read_json_option", "read_media_limits", "with_rope",
]  # fmt: skip

# Accepted spelling -> scheme name. The spellings are those of peers.
QUANTIZATIONS = {
    "none": "bf16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_per_tensor": "fp8",
    "ptpc_fp8": "ptpc_fp8",
    "fp8_per_channel": "ptpc_fp8",
    "fp8_block": "fp8_block",
    "fp8_per_block": "fp8_block",
    "fp8_w8a16": "fp8_w8a16",
}
KV_CACHE_DTYPES = {
    "auto": "auto",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "fp8_per_token_head": "fp8_per_token_head",
    "fp8_ds_mla": "fp8_ds_mla",
}
DTYPES = {"auto": "auto", "bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "float": "float32"}
DTYPES |= {"half": "bfloat16", "float16": "bfloat16"}  # which is said at start
ROUNDINGS = "nearest", "calibrated"  # of keys in an FP8 cache
DECODE_ACTIVATIONS = {"auto": "auto", "bf16": "bf16", "bfloat16": "bf16"}
EXECUTORS = "mp", "ray", "uni"
SPELLINGS = {  # of the fields of EngineConfig whose values have more than the command line shows: spelling -> the value
    "quantization": QUANTIZATIONS, "kv_cache_dtype": KV_CACHE_DTYPES, "decode_activations": DECODE_ACTIVATIONS, "dtype": DTYPES,
    "load_format": {"auto": "auto", "safetensors": "auto", "dummy": "dummy"},
}  # fmt: skip

# What vLLM's users pass for a checkpoint that is quantized already.
CHECKPOINT_FORMATS = ("compressed-tensors", "fbgemm_fp8", "modelopt", "modelopt_mxfp8", "quark", "mxfp8")
UNREAD_FORMATS = (
    "awq", "awq_marlin", "gptq", "gptq_marlin", "gptq_bitblas", "bitsandbytes", "gguf", "hqq", "aqlm", "mxfp4", "nvfp4",
    "modelopt_fp4", "petit_nvfp4", "torchao", "auto-round", "inc", "experts_int8", "moe_wna16", "int4", "int8", "rtn",
)  # fmt: skip
MAX_LOGPROBS = 100  # of a token; the answer's text is made on the event loop, so there is an end
MAX_MEDIA = 999  # images of a request, where --limit-mm-per-prompt says nothing; vLLM's number


def canonical(option: str, value: str, known: dict[str, str]) -> str:
    """The name that `value` stands for, or an OctavoError that suggests the nearest known one."""
    if (name := known.get(value, known.get(value.lower()))) is not None:
        return name
    if option == "--quantization" and value.lower() in CHECKPOINT_FORMATS:
        raise OctavoError(
            f"{option} {value} is a format of checkpoints, and the checkpoint says itself which it has: leave {option} out."
        )
    near = difflib.get_close_matches(value.lower(), known, n=1, cutoff=0.75)
    hint = f"; did you mean '{near[0]}'? Known" if near else "; known"
    raise OctavoError(f"{option} '{value}' is not known{hint} are: {', '.join(known)}.")


def read_media_limits(given: str | Mapping[str, Any] | None) -> dict[str, int] | None:
    """--limit-mm-per-prompt as numbers: JSON as vLLM's command line takes it, or image=4,video=0, or a mapping. A value may be
    vLLM's object with a `count`. Raises OctavoError, one sentence, for anything else."""
    wrong = OctavoError(
        f'--limit-mm-per-prompt must be like \'{{"image": 4, "video": 0}}\', with numbers of 0 or more, not {given!r}.'
    )
    if given is None:
        return None
    if isinstance(given, str):
        try:
            pairs = [pair.split("=") for pair in given.split(",")]
            read = json.loads(given) if given.lstrip().startswith("{") else {name.strip(): int(n) for name, n in pairs}
        except (ValueError, RecursionError):
            raise wrong from None
        given = read
    if not isinstance(given, Mapping):
        raise wrong
    found = {}
    for name, value in given.items():
        count = value.get("count") if isinstance(value, Mapping) else value
        if name not in ("image", "video", "audio") or type(count) is not int or count < 0:
            raise wrong
        found[name] = count
    found.pop("audio", None)  # no model that is served hears
    return found


def read_json_option(option: str, given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An option's JSON object, as text or as a mapping. Raises OctavoError for anything else."""
    if given is None:
        return None
    try:
        read = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"{option} must be a JSON object, and {str(given)[:80]!r} is not valid JSON ({error}).") from None
    if not isinstance(read, Mapping):
        raise OctavoError(f"{option} must be a JSON object, such as '{{\"name\": 1}}', not {str(given)[:80]}.")
    return dict(read)


def with_rope(overrides: Any, scaling: Any, theta: float | None) -> dict[str, Any] | None:
    """--hf-overrides with --rope-scaling and --rope-theta, which are short for it. Raises OctavoError where they differ."""
    found = read_json_option("--hf-overrides", overrides) or {}
    for name, value in (("rope_scaling", read_json_option("--rope-scaling", scaling)), ("rope_theta", theta)):
        if value is not None and found.setdefault(name, value) != value:
            raise OctavoError(f"--{name.replace('_', '-')} and --hf-overrides give two values of {name}; give one.")
    return found or None


def layer_names(given: tuple[Any, ...]) -> tuple[str, ...]:
    """--kv-cache-dtype-skip-layers: numbers of layers, alone or with commas between them, and `sliding_window`."""
    names = [name.strip() for entry in given for name in str(entry).split(",")]
    if (wrong := next((name for name in names if not name.isdecimal() and name != "sliding_window"), None)) is not None:
        raise OctavoError(
            f"--kv-cache-dtype-skip-layers takes numbers of layers, from 0, and sliding_window for all that have a window, "
            f"not {wrong!r}."
        )
    return tuple(dict.fromkeys(name if name == "sliding_window" else str(int(name)) for name in names))
