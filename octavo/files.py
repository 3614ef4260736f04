"""Reads small files of a checkpoint. Anything else in their place gets a one-sentence error."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

__all__ = [
    "INDEX", "KEY_ROUNDING", "check_directory", "check_regular", "read_json", "read_text", "unread_weights", "weight_format",
]  # fmt: skip

KEY_ROUNDING = "key_rounding.octavo"  # how keys of an FP8 cache are rounded; no other reader takes it for weights
INDEX = "model.safetensors.index.json"  # which file of a checkpoint holds each tensor

_POINTER = b"version https://git-lfs.github.com/"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_regular(path: Path) -> None:
    """Raises OctavoError for a path that exists but is no regular file, because opening a pipe would block for ever, and for a
    pointer of Git LFS.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise OctavoError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    mode = found.st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise OctavoError(f"{path} is {kind}, not a file; download the checkpoint again.")
    with suppress(OSError):  # the caller that reads the file reports it
        if found.st_size < 1024 and path.read_bytes().startswith(_POINTER):
            raise OctavoError(f"{path} is a pointer of Git LFS, not the file itself; run git lfs pull in its directory.")


def read_text(path: Path) -> str | None:
    """The text of a file; None if it does not exist. Raises OctavoError if it is no file, unreadable or not UTF-8."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise OctavoError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); download it again.") from None
    except OSError as error:
        raise OctavoError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it does not exist. Raises OctavoError as `read_text` does, and for other JSON."""
    text = read_text(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except RecursionError:
        raise OctavoError(f"{path} is not valid JSON (it is nested too deeply); download it again.") from None
    except ValueError as error:
        raise OctavoError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(found, dict):
        raise OctavoError(f"{path} is not valid JSON (not an object); download it again.")
    return found


def check_directory(directory: Path) -> None:
    """Raises OctavoError for anything but a checkpoint directory. The error names what users often give instead."""
    if not os.path.exists(directory):  # also false for a name that is too long
        raise OctavoError(
            f"there is no model at '{directory}'; give the path of a checkpoint directory, or a name of the hub (OWNER/NAME)."
        )
    if not directory.is_dir():
        if (what := weight_format(directory.suffix)) is not None:
            raise OctavoError(f"'{directory}' is a file of {what}; give the directory of the model's safetensors checkpoint.")
        raise OctavoError(f"'{directory}' is a file; give the checkpoint's directory, the one that holds config.json.")
    if (base := _base_of_adapter(directory)) is not None:
        raise OctavoError(
            f"{directory} is a LoRA adapter{base}, which Octavo does not serve; merge it into its model "
            "(merge_and_unload of the library peft), save that and give its directory."
        )
    config = directory / "config.json"
    check_regular(config)
    if config.exists():
        return
    if (what := unread_weights(directory)) is not None:
        raise OctavoError(f"{directory} holds {what}; give the directory of the model's safetensors checkpoint.")
    if cached := sorted(str(path) for path in directory.glob("models--*") if path.is_dir()):
        raise OctavoError(f"{directory} is the hub's cache, of several models; give one of them, such as {cached[0]}.")
    raise OctavoError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint directory.")


def unread_weights(directory: Path) -> str | None:
    """The other weight format that a directory holds, for an error message; None if no known one."""
    suffixes = sorted({path.suffix for path in directory.iterdir() if path.name != "training_args.bin"})
    return next((found for suffix in suffixes if (found := weight_format(suffix)) is not None), None)


def weight_format(suffix: str) -> str | None:
    """The weight format of a file by its suffix, for an error message; None for an unknown suffix."""
    suffix = suffix.lower()
    if suffix == ".gguf":
        return "weights in llama.cpp's format (.gguf), which Octavo does not read"
    if suffix in _PICKLES:
        return f"pickled weights ({suffix}), which can run code when they are opened, so Octavo reads none"
    return None


def _base_of_adapter(directory: Path) -> str | None:
    """The base model if the directory is a LoRA adapter, for an error message; None if it is none, or is merged too."""
    merged = [path for path in directory.glob("*.safetensors*") if not path.name.startswith("adapter_")]
    adapter = None if merged else read_json(directory / "adapter_config.json")
    if adapter is None:
        return None
    base = adapter.get("base_model_name_or_path")
    return f" of {base}" if isinstance(base, str) and base else ""
