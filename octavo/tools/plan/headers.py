"""The safetensors headers of a checkpoint: names, dtypes and shapes, with not one weight read.

A file starts with 8 bytes, the length of a JSON header, which gives each tensor's dtype, shape and place after it
(https://github.com/huggingface/safetensors#format). The places give the file's length, so a truncated one is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

__all__ = ["StoredTensor", "read_headers"]

LONGEST_HEADER = 100 << 20  # bytes; the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """dtype: as safetensors spells it (BF16, F8_E4M3, I32). nbytes: in the file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in `directory`; none if it has no safetensors files. Raises OctavoError for damage."""
    index, weight_map = directory / "model.safetensors.index.json", {}
    files = sorted(directory.glob("*.safetensors"))
    if index.exists():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
            files = [directory / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError):
            raise OctavoError(f"{index} is not a safetensors index; download it again.") from None
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        tensors.update(_header(path))
    if absent := sorted(set(weight_map) - set(tensors)):
        where = weight_map[absent[0]]
        raise OctavoError(f"{index} names the tensor {absent[0]}, which {where} does not hold; download it again.")
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= LONGEST_HEADER:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _tensor(entry) for name, entry in header.items()}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError:
        raise OctavoError(f"{path} is missing, but the checkpoint's index names it; download it.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise OctavoError(f"{path} has no safetensors header that can be read; download it again.") from None
    if (size := path.stat().st_size) < needed:
        raise OctavoError(f"{path} is truncated: it has {size:,} bytes of {needed:,}; download it again.")
    return tensors


def _tensor(entry: Mapping[str, Any]) -> StoredTensor:
    start, stop = entry["data_offsets"]
    return StoredTensor(entry["dtype"], tuple(int(n) for n in entry["shape"]), stop - start)
