"""Safetensors files written in parts at known places.

What quantizing makes of a tensor is known from its header entry alone, so the header of an output is written first and any
thread may then write any part.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from octavo.errors import OctavoError
from octavo.weights.checkpoint import DTYPES, StoredTensor, bytes_of

__all__ = ["OutputFile", "write_error", "write_json"]


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
        try:
            self._descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise write_error(error, self.path, self.nbytes) from None
        self._write(0, memoryview(self.header))

    def write(self, name: str, start: int, data: Tensor) -> None:
        """Put the bytes of `data` at the tensor's byte `start`."""
        self._write(len(self.header) + self.tensors[name].start + start, bytes_of(data))

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


def write_error(error: OSError | SafetensorError, path: Path, nbytes: int = 0) -> OctavoError:
    """What a person is told of `path`, which takes so many bytes, or a few that nobody has counted (0)."""
    number = _number(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        needs, them = (f" needs {nbytes:,} bytes", "them") if nbytes else (" cannot be written", "some space")
        return OctavoError(f"the disk is full: {path}{needs}; free {them} and run the same command again, which continues.")
    return OctavoError(f"{path} cannot be written: {os.strerror(number) if number else error}.")


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's errno; safetensors' own exception has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


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
