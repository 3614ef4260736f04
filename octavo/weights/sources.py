"""Where a Loader's tensors come from: the files of a checkpoint, or nowhere (octavo.weights.meta: headers)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.quant.stored_format import StoredFormat
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

    def is_weight_only(self, module: str) -> bool:
        """Whether config.json says that activations which FP8 codes of `module` multiply stay as they are."""

    def declare(self, module: str, shape: tuple[int, int]) -> None:
        """The matrix `module` [N, K] will be asked for: what has no files makes it up as config.json says that it is stored."""

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
        self._transfer: Transfer | None = None
        self._ahead: ReadAhead | None = None

    def is_weight_only(self, module: str) -> bool:
        return self.checkpoint.is_weight_only(module)

    def shape(self, name: str) -> list[int]:
        return list(self.checkpoint.tensors[name].shape)

    def declare(self, module: str, shape: tuple[int, int]) -> None: ...

    def expect(self, names: Sequence[str]) -> None:
        self._ahead = ReadAhead(self.checkpoint, [self.checkpoint.tensors[name] for name in names])

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice, device: torch.device) -> Tensor:
        tensor = self.checkpoint.tensors[name]
        check_shape(name, tensor.shape, shape)
        if tensor.shape and part.start >= part.stop:  # a rank's part, where there are fewer tiles than ranks
            size = (*tensor.shape[:dim], 0, *tensor.shape[dim + 1 :])
            return torch.empty(size, dtype=tensor.torch_dtype, device=device)
        if device.type == "cpu":
            found = self.checkpoint.mapped(tensor, dim, part)
        else:
            if self._transfer is None or self._transfer.device != device:
                self._transfer = Transfer(self.checkpoint, device)
            found = self._transfer.read(tensor, dim, part)
        if self._ahead is not None:
            self._ahead.consumed(tensor)
        self.checkpoint.finite.look(name, tensor.file, found)
        return found

    @property
    def bytes_read(self) -> int:
        """Of tensors: this rank's slices."""
        return self.checkpoint.bytes_read

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


IS_NORM = re.compile(r"norm\d*\.weight$")


class DummySource:
    """Random weights of any shape that is asked for, the same for the same name on every device. For benchmarks.

    `stored_format`: how linear layers are stored; BF16 without it.
    """

    POOL = 1_000_003  # prime, so that no two rows of a matrix start at the same place
    SPREAD: ClassVar = {"F8_E4M3": 64.0, "I32": 4.61}  # standard deviation of codes; of INT4's, eight a word, all are as likely
    has_any = True

    def __init__(self, stored_format: StoredFormat | None = None, std: float = 0.02) -> None:
        self.names: set[str] = set()
        self.stored_format, self.std = stored_format, std
        self._stored: dict[str, tuple[str, tuple[int, ...], float]] = {}  # dtype, shape, standard deviation of codes
        pool = torch.randn(self.POOL, generator=torch.Generator().manual_seed(0))
        made = {"BF16": pool.mul(std).bfloat16()}
        if stored_format is not None:
            made["F8_E4M3"] = pool.mul(self.SPREAD["F8_E4M3"]).to(torch.float8_e4m3fn)
            words = torch.randint(-(1 << 31), 1 << 31, (self.POOL,), generator=torch.Generator().manual_seed(1))
            made["I32"] = words.int()
        # a device gets a copy once, and then writes its weights itself
        self._pools = {(kind, pool.device): values for kind, values in made.items()}

    def declare(self, module: str, shape: tuple[int, int]) -> None:
        if self.stored_format is None or self.stored_format.leaves_out(module):
            return
        tensors = self.stored_format.of(module).tensors(*shape)
        spread = self.SPREAD[tensors[0][1]]
        self._stored |= {f"{module}.{end}": (dtype, size, spread) for end, dtype, size in tensors}
        self.names.update(f"{module}.{end}" for end, *_ in tensors)

    def is_weight_only(self, module: str) -> bool:
        return self.stored_format is not None and self.stored_format.of(module).weight_only

    def shape(self, name: str) -> list[int]:
        return list(self._stored[name][1])

    def expect(self, names: Sequence[str]) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice, device: torch.device) -> Tensor:
        kind, stored, spread = self._stored.get(name, ("BF16", shape, 1.0))
        assert stored is not None
        size = [len(range(*part.indices(n))) if i == dim else n for i, n in enumerate(stored)]
        if "weight_scale" in name:
            return torch.full(size, self.std / spread, dtype=torch.float32 if kind == "F32" else torch.bfloat16, device=device)
        if len(size) == 1:
            fill = torch.ones if IS_NORM.search(name) else torch.zeros
            return fill(size, dtype=torch.bfloat16, device=device)
        if (kind, device) not in self._pools:
            self._pools[kind, device] = self._pools[kind, torch.device("cpu")].to(device)
        pool = self._pools[kind, device]
        out = torch.empty(size, dtype=pool.dtype, device=device)
        offset, flat = zlib.crc32(name.encode()) % self.POOL, out.view(-1)
        first = flat[: self.POOL - offset]  # the pool from `offset` on, then all of it again and again
        first.copy_(pool[offset : offset + len(first)])
        rest = flat[len(first) :]
        whole = len(rest) // self.POOL * self.POOL
        rest[:whole].view(-1, self.POOL).copy_(pool.expand(whole // self.POOL, -1))
        rest[whole:].copy_(pool[: len(rest) - whole])
        return out
