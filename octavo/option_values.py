"""Values of options: the spellings that are known, and --limit-mm-per-prompt."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from octavo.errors import OctavoError

__all__ = ["CHECKPOINT_FORMATS", "DTYPES", "KV_CACHE_DTYPES", "MAX_MEDIA", "QUANTIZATIONS", "canonical", "read_media_limits"]

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


# What vLLM's users pass for a checkpoint that is quantized already.
CHECKPOINT_FORMATS = ("compressed-tensors", "fbgemm_fp8", "modelopt", "quark", "gptq", "awq", "bitsandbytes", "gguf", "mxfp4")
MAX_MEDIA = 999  # images of a request, where --limit-mm-per-prompt says nothing; vLLM's number


def canonical(option: str, value: str, known: dict[str, str]) -> str:
    """The name that `value` stands for, or an OctavoError that suggests the nearest known one."""
    if (name := known.get(value, known.get(value.lower()))) is not None:
        return name
    if option == "--quantization" and value.lower() in CHECKPOINT_FORMATS:
        raise OctavoError(
            f"{option} {value} is a format of checkpoints, and the checkpoint says itself which it has: leave {option} out."
        )
    near = difflib.get_close_matches(value.lower(), known, n=1)
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
