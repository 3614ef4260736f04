"""Options whose meaning depends on the checkpoint, or that are served as another value: what they become, and what to say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.files import read_json
from octavo.hub.snapshots import is_hub_name
from octavo.option_values import CHECKPOINT_FORMATS, UNREAD_FORMATS

__all__ = ["settled"]

_SAME = {"modelopt_fp8": "modelopt", "compressed_tensors": "compressed-tensors"}  # other names of a format


def settled(options: Mapping[str, Any], model: str, downloads: bool = True) -> tuple[dict[str, Any], list[str]]:
    """`options` of EngineConfig with --quantization and --dtype as this checkpoint takes them, and sentences for the start.

    --quantization may name the format that the checkpoint is stored in, as vLLM's does: it stays as it is. Raises OctavoError
    where the checkpoint has another format, or none. downloads: whether config.json of a name of the hub may be downloaded.
    """
    settled, notes = dict(options), []
    dtype, scheme = options.get("dtype"), options.get("quantization")
    if isinstance(dtype, str) and dtype.lower() in ("half", "float16"):
        notes.append(f"--dtype {dtype} is served in bfloat16, which has the same size and a wider range.")
    if isinstance(scheme, str) and _is_stored(
        scheme, model, options.get("save_quantized") is not None, partial(_directory, model, options, downloads)
    ):
        del settled["quantization"]
        notes.append(f"--quantization {scheme} is what {model or 'the model'} is stored in, and it is served so.")
    return settled, notes


def _directory(model: str, options: Mapping[str, Any], downloads: bool) -> Path:
    """Where the model's config.json is, which is downloaded with the tokenizer for a name of the hub."""
    if not (downloads and is_hub_name(model)):
        return Path(model)
    from octavo.hub.download import fetch  # a start from a directory needs none of it

    return fetch(
        model,
        options.get("revision"),
        options.get("download_dir"),
        weights=False,
        tell=lambda *_: None,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )


def _is_stored(scheme: str, model: str, saved: bool, find: Callable[[], Path]) -> bool:
    """Whether a value of --quantization is the checkpoint's own format; `saved`: the quantized weights are to be saved."""
    asked = _SAME.get(scheme.lower(), scheme.lower())
    if asked in UNREAD_FORMATS:
        raise OctavoError(
            f"--quantization {scheme} is not served: Octavo reads checkpoints in BF16, FP8 and compressed-tensors INT4, and "
            "makes FP8 of BF16 with --quantization fp8 or ptpc_fp8."
        )
    if asked not in ("fp8", *CHECKPOINT_FORMATS) or not ((directory := find()) / "config.json").is_file():
        return False
    stored = _methods(directory)
    if asked in stored:
        return asked != "fp8" or not saved
    if asked == "fp8":
        return False
    found = f"is stored as {' and '.join(stored)}" if stored else "is not quantized"
    wanted = "leave it out" if stored else "use --quantization fp8 or ptpc_fp8 to quantize it, or leave it out"
    raise OctavoError(f"--quantization {scheme} is a format of checkpoints, and {model} {found}: {wanted}.")


def _methods(directory: Path) -> list[str]:
    """The formats that config.json and ModelOpt's file name, in lower case."""
    config = read_json(directory / "config.json") or {}
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    entries = [place.get(key) for place in places for key in ("quantization_config", "compression_config")]
    methods = []
    for entry in (entry for entry in entries if isinstance(entry, dict) and entry):
        implied = "compressed-tensors" if "config_groups" in entry else "modelopt" if "quant_algo" in entry else ""
        methods.append(str(entry.get("quant_method") or implied).lower())
    if (directory / "hf_quant_config.json").exists():
        methods.append("modelopt")
    return sorted({_SAME.get(method, method) for method in methods if method})
