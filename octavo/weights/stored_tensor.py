"""A tensor's entry in a safetensors header, and the location of one expert's matrix within a stacked tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from octavo.errors import OctavoError

__all__ = ["DTYPES", "Slab", "StoredTensor"]

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
