"""Where a Loader's tensors come from: the files of a checkpoint, or nowhere (octavo.weights.meta: headers)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.transfer import ReadAhead, Transfer

__all__ = ["DummySource", "SafetensorsSource", "Source", "check_shape"]


class Source(Protocol):
    """Named tensors that can be read in parts."""

    names: set[str]
    has_any: bool  # whether a name that is not among `names` can be read too

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice, device: torch.device) -> Tensor:
        """The `part` of dimension `dim`, on `device`. Raises OctavoError if the stored shape is not `shape`."""

    def shape(self, name: str) -> list[int]: ...

    def expect(self, names: Sequence[str]) -> None:
        """These will be read, in about this order."""

    def finish(self) -> None:
        """All was read. Raises OctavoError for a tensor that was not finite, if no read has."""

    def close(self) -> None:
        """Give back files, threads and buffers; a later read takes them again."""


class SafetensorsSource:
    """The safetensors files of a checkpoint directory. Raises OctavoError for what is missing or damaged."""

    has_any = False

    def __init__(self, directory: Path):
        self.checkpoint = Checkpoint(directory)
        self.names = set(self.checkpoint.tensors)
        self.bytes_read = 0
        self._transfer: Transfer | None = None
        self._ahead: ReadAhead | None = None

    def shape(self, name: str) -> list[int]:
        return list(self.checkpoint.tensors[name].shape)

    def expect(self, names: Sequence[str]) -> None:
        self._ahead = ReadAhead(self.checkpoint, [self.checkpoint.tensors[name] for name in names])

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice, device: torch.device) -> Tensor:
        tensor = self.checkpoint.tensors[name]
        check_shape(name, tensor.shape, shape)
        if device.type == "cpu":
            found = self.checkpoint.mapped(tensor, dim, part)
        else:
            if self._transfer is None or self._transfer.device != device:
                self._transfer = Transfer(self.checkpoint, device)
            found = self._transfer.read(tensor, dim, part)
        if self._ahead is not None:
            self._ahead.consumed(tensor)
        self.checkpoint.finite.look(name, tensor.file, found)
        self.bytes_read += found.nbytes
        return found

    def finish(self) -> None:
        self.checkpoint.finite.finish()

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if self._transfer is not None:
            self._transfer.close()
        self._ahead = self._transfer = None
        self.checkpoint.close()


def check_shape(name: str, stored: Sequence[int], shape: Sequence[int] | None) -> None:
    """Raises OctavoError for a tensor that is not stored in the `shape` that the model makes it."""
    if shape is not None and list(stored) != list(shape):
        raise OctavoError(
            f"tensor {name} has shape {list(stored)}, but config.json makes it {list(shape)}: they are of different models."
        )


class DummySource:
    """Random weights of any shape that is asked for, the same for the same name on every device. For benchmarks."""

    POOL = 1_000_003  # prime, so that no two rows of a matrix start at the same place
    has_any = True

    def __init__(self, std: float = 0.02) -> None:
        self.names: set[str] = set()
        pool = torch.randn(self.POOL, generator=torch.Generator().manual_seed(0)).mul_(std).bfloat16()
        self._pools = {pool.device: pool}  # a device gets a copy once, and then writes its weights itself

    def shape(self, name: str) -> list[int]:
        raise KeyError(name)

    def expect(self, names: Sequence[str]) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice, device: torch.device) -> Tensor:
        assert shape is not None
        size = [part.stop - part.start if i == dim else n for i, n in enumerate(shape)]
        if len(size) == 1:
            fill = torch.ones if name.endswith("norm.weight") else torch.zeros
            return fill(size, dtype=torch.bfloat16, device=device)
        if device not in self._pools:
            self._pools[device] = self._pools[torch.device("cpu")].to(device)
        pool, out = self._pools[device], torch.empty(size, dtype=torch.bfloat16, device=device)
        offset, flat = zlib.crc32(name.encode()) % self.POOL, out.view(-1)
        first = flat[: self.POOL - offset]  # the pool from `offset` on, then all of it again and again
        first.copy_(pool[offset : offset + len(first)])
        rest = flat[len(first) :]
        whole = len(rest) // self.POOL * self.POOL
        rest[:whole].view(-1, self.POOL).copy_(pool.expand(whole // self.POOL, -1))
        rest[whole:].copy_(pool[: len(rest) - whole])
        return out
