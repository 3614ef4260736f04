"""The header of a safetensors file: a tensor's entry in it, and the location of one expert's matrix within a stacked tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from octavo.errors import OctavoError
from octavo.files import check_regular

__all__ = ["DTYPES", "Slab", "StoredTensor", "read_header"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slab:
    """One expert's part of a stack: a matrix [rows, columns], whose rows from `first` on are a StoredTensor.

    `transposed`: the file stores [columns, rows]. A StoredTensor's `start` is then the offset that its bytes had untransposed.
    """

    expert: int
    rows: int
    columns: int
    first: int
    transposed: bool


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry in a header. `start` is the offset from the beginning of the file."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    key: str = ""  # its name in the file, if that differs
    slab: Slab | None = None  # its location in the expert stack that the file has under `key`

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise OctavoError(f"tensor {self.name} has dtype {self.dtype}, which Octavo does not read.")
        return DTYPES[self.dtype]

    @property
    def integers(self) -> torch.dtype:
        """The integer dtype of the same size, which every device can copy."""
        return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.torch_dtype.itemsize]

    @property
    def is_transposed(self) -> bool:
        """Whether its bytes are not contiguous in the file."""
        return self.slab is not None and self.slab.transposed

    def whole_slab(self) -> StoredTensor:
        """The slab of a transposed tensor as the file stores it: [columns, rows]."""
        assert self.slab is not None
        row = self.nbytes // self.shape[0]
        shape, start = (self.slab.columns, self.slab.rows), self.start - self.slab.first * row
        return replace(self, shape=shape, start=start, nbytes=self.slab.rows * row, slab=None)


def read_header(path: Path, file: str) -> list[StoredTensor]:
    """The header entries of the file at `path`, which the checkpoint calls `file`, in the order of their data.

    Raises OctavoError, one sentence, for a file that is not there, cannot be read, or is damaged.
    """
    check_regular(path)
    try:
        with open(path, "rb") as opened, safe_open(path, framework="pt"):  # safetensors validates the header
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except FileNotFoundError:
        what = "links to a file that is not there" if path.is_symlink() else "is missing, but the checkpoint's index names it"
        raise OctavoError(f"{path} {what}; download it.") from None
    except PermissionError as error:
        raise OctavoError(f"{path} cannot be read: {error.strerror}.") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise OctavoError(f"{path} is truncated or corrupt ({error}); download it again.") from None
    header.pop("__metadata__", None)
    places = [
        StoredTensor(name, e["dtype"], tuple(e["shape"]), file, 8 + length + e["data_offsets"][0],
                     e["data_offsets"][1] - e["data_offsets"][0])
        for name, e in header.items()
    ]  # fmt: skip
    return sorted(places, key=lambda tensor: tensor.start)
