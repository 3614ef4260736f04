"""Safetensors files read and written in parts at known places, so that neither a file nor a matrix has to fit in memory.

A file is eight bytes with the header's length, the header, JSON that gives every tensor's dtype, shape and place, and the
data (https://huggingface.co/docs/safetensors). What quantizing makes of a tensor is known from its header entry alone, so the
header of an output is written first and any thread may then write any part.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant.formats import WHOLE, Shard
from octavo.weights import SafetensorsSource

__all__ = ["INDEX", "Checkpoint", "OutputFile", "RowReader", "Rows", "Scratch", "StoredTensor", "write_error", "write_json"]

INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry in a header. `start` counts from the beginning of the file."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


class Checkpoint:
    """Where the tensors of a checkpoint directory are. Raises OctavoError for a file that is missing or damaged."""

    def __init__(self, directory: Path):
        source = SafetensorsSource(directory)  # says what is missing, cut short or not in the index
        self.directory = directory
        files = [str(path.relative_to(directory)) for path in source.paths]
        self.files: dict[str, list[StoredTensor]] = {file: _read_header(directory / file) for file in files}
        self.tensors = {tensor.name: tensor for tensors in self.files.values() for tensor in tensors}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, tensor: StoredTensor, start: int, buffer: Tensor) -> None:
        """Fill the bytes of `buffer` (uint8) from the tensor's byte `start` on."""
        view = _bytes(buffer)
        descriptor, at = self.descriptor(tensor.file), tensor.start + start
        while view:
            try:
                count = os.preadv(descriptor, [view], at)
            except OSError as error:
                raise OctavoError(f"{self.directory / tensor.file} cannot be read: {error.strerror}.") from None
            if not count:
                raise OctavoError(f"{self.directory / tensor.file} became shorter while it was read; download it again.")
            view, at = view[count:], at + count

    def descriptor(self, file: str) -> int:
        """The file, open for reading."""
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(self.directory / file, os.O_RDONLY)
                except OSError as error:
                    raise OctavoError(f"{self.directory / file} cannot be read: {error.strerror}.") from None
            return self._descriptors[file]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _bytes(data: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = data.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _read_header(path: Path) -> list[StoredTensor]:
    """The entries of a file that safetensors has found sound, in the order of their data."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places = [
        StoredTensor(name, e["dtype"], tuple(e["shape"]), path.name, 8 + length + e["data_offsets"][0],
                     e["data_offsets"][1] - e["data_offsets"][0])
        for name, e in header.items()
    ]  # fmt: skip
    return sorted(places, key=lambda tensor: tensor.start)


class Scratch:
    """One thread's buffers, used again and again: the page faults of fresh ones would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary contents on the CPU; the next `take` of the same name reuses its memory."""
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self._buffers or self._buffers[name].nbytes < nbytes:
            self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffers[name][:nbytes].view(dtype).view(tuple(shape))


@dataclass(frozen=True)
class Rows(Shard):
    """Rows `start` to `stop` of a matrix, whatever its length: what a rank's part is to a format, in smaller pieces."""

    start: int = 0
    stop: int = 0

    def slice(self, length: int) -> slice:
        return slice(self.start, self.stop)


class RowReader:
    """A Checkpoint as the formats of octavo.quant.formats read it. One thread's: a read overwrites the one before."""

    prefix = ""

    def __init__(self, checkpoint: Checkpoint, platform: Platform, scratch: Scratch):
        self.checkpoint, self.platform, self.scratch = checkpoint, platform, scratch

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def skip(self, name: str) -> None:
        """Nothing to remember: what an output holds was decided before."""

    def stored_shape(self, name: str) -> list[int]:
        return list(self.checkpoint.tensors[name].shape)

    def read(self, name: str, shape: Sequence[int] | None, shard: Shard = WHOLE, part: slice | None = None) -> Tensor:
        """A part of the rows as stored, on the platform's device."""
        tensor = self.checkpoint.tensors[name]
        if tensor.dtype not in DTYPES:
            raise OctavoError(f"tensor {name} has dtype {tensor.dtype}, which Octavo does not read.")
        if shape is not None and tuple(shape) != tensor.shape:
            raise OctavoError(f"tensor {name} has shape {list(tensor.shape)} where {list(shape)} was expected.")
        if not tensor.nbytes or not tensor.shape:
            part, row, rest = slice(0, 1), tensor.nbytes, tensor.shape
        else:
            part = part or shard.slice(tensor.shape[0])
            row, rest = tensor.nbytes // tensor.shape[0], (part.stop - part.start, *tensor.shape[1:])
        kind = "matrix" if name.endswith((".weight", ".weight_packed")) else name.rpartition(".")[2]
        found = self.scratch.take(kind, rest, DTYPES[tensor.dtype])
        self.checkpoint.read_into(tensor, part.start * row, found.view(-1).view(torch.uint8))
        return found.to(self.platform.device)


class OutputFile:
    """A safetensors file under a temporary name. `commit` gives it its own; until then nobody takes it for whole."""

    def __init__(self, path: Path, entries: Iterable[tuple[str, str, tuple[int, ...]]]):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        # Wide dtypes first: data are then aligned without gaps, which the format does not have.
        ordered = sorted(entries, key=lambda entry: -DTYPES[entry[1]].itemsize if entry[1] in DTYPES else 0)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.tensors: dict[str, StoredTensor] = {}
        end = 0
        for name, dtype, shape in ordered:
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
            self.tensors[name] = StoredTensor(name, dtype, shape, path.name, end, nbytes)
            end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.nbytes = len(self.header) + end
        self._descriptor = -1

    def finished(self) -> bool:
        """Whether an earlier run committed this very file."""
        try:
            with open(self.path, "rb") as file:
                return file.read(len(self.header)) == self.header and os.fstat(file.fileno()).st_size == self.nbytes
        except FileNotFoundError:
            return False

    def open(self) -> None:
        self._descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._write(0, memoryview(self.header))

    def write(self, name: str, start: int, data: Tensor) -> None:
        """Put the bytes of `data` at the tensor's byte `start`."""
        self._write(len(self.header) + self.tensors[name].start + start, _bytes(data))

    def _write(self, at: int, view: memoryview) -> None:
        while view:
            try:
                count = os.pwrite(self._descriptor, view, at)
            except OSError as error:
                raise write_error(error, self.path, self.nbytes) from None
            view, at = view[count:], at + count

    def commit(self) -> None:
        """Close the file and give it its name."""
        try:
            os.close(self._descriptor)  # where a network's file system says that it was full
            self._descriptor = -1
            self.partial.replace(self.path)
        except OSError as error:
            raise write_error(error, self.path, self.nbytes) from None

    def discard(self) -> None:
        """Take the unfinished file away."""
        if self._descriptor >= 0:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1
            self.partial.unlink(missing_ok=True)


def write_error(error: OSError, path: Path, nbytes: int) -> OctavoError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OctavoError(
            f"the disk is full: {path} needs {nbytes:,} bytes; free them and run the same command again, which continues."
        )
    return OctavoError(f"{path} cannot be written: {error.strerror}.")


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either there as a whole or not there."""
    data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_error(error, path, len(data)) from None
