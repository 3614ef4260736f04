"""Reads safetensors files in parts at known offsets, so that neither a file nor a matrix has to fit in memory.

A file consists of the header's length in eight bytes, the header, which is JSON with every tensor's dtype, shape and offsets,
and the data (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from octavo.errors import OctavoError
from octavo.files import INDEX, read_json, unread_weights
from octavo.platform import Platform
from octavo.quant.formats import COMPANIONS, WHOLE, Shard
from octavo.quant.stored_format import StoredFormat, left_out, stored_format_of
from octavo.weights.finite import FiniteCheck
from octavo.weights.fused import unfused
from octavo.weights.names import as_published
from octavo.weights.stacked_experts import one_by_one
from octavo.weights.stored_tensor import DTYPES, StoredTensor, read_header

__all__ = ["DTYPES", "INDEX", "Checkpoint", "RowReader", "Rows", "Scratch", "StoredTensor", "bytes_of"]


class Checkpoint:
    """The tensors of a checkpoint directory and their offsets. Raises OctavoError for a missing or damaged file.

    Experts that are stacked in one tensor are presented one by one (octavo.weights.stacked_experts).
    """

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / INDEX
        one = directory / "model.safetensors"  # preferred, because some directories hold the weights twice, in two layouts
        found = sorted(directory.glob("*.safetensors"))
        # the same weights under Meta's or Mistral's own names, beside transformers' files
        paths = [one] if one.exists() else [p for p in found if not p.name.startswith("consolidated")] or found
        weight_map: dict[str, str] = {}
        if (content := read_json(index)) is not None:
            try:
                weight_map = content["weight_map"]
                paths = [_inside(directory, name, index) for name in sorted(set(weight_map.values()))]
            except (KeyError, TypeError, AttributeError):
                raise OctavoError(f"{index} is not a safetensors index; download it again.") from None
        if not paths:
            why = f"and holds {other}" if (other := unread_weights(directory)) else "and Octavo reads no other weight format"
            raise OctavoError(f"{directory} has no .safetensors files, {why}; take the model's safetensors files.")
        files = {str(path.relative_to(directory)): path for path in paths}
        stored = {tensor.name: tensor for file, path in files.items() for tensor in read_header(path, file)}
        absent = sorted(set(weight_map) - set(stored))
        config = read_json(directory / "config.json") or {}
        named, changes = as_published(stored, config)
        stored = unfused(named, config)
        if len(stored) > len(named):
            changes.append("with qkv_proj and gate_up_proj taken apart, in that order")
        self.renamed = ", ".join(changes)
        self.unused = _scales_of_nothing(stored, config)
        for name in self.unused:
            del stored[name]
        self.tensors = one_by_one(stored, config)
        self.files: dict[str, list[StoredTensor]] = {file: [] for file in files}  # in the order of their data
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.start):
            self.files[tensor.file].append(tensor)
        self.finite = FiniteCheck(self.tensors)  # every reader of values must pass them to it
        self._slabs = threading.local()
        self._descriptors: dict[str, int] = {}
        self._maps, self._pages = dict[str, Any](), dict[str, Any]()  # by file
        self.bytes_read = 0  # of tensors, as far as they were asked for
        self._lock = threading.Lock()
        if absent:
            raise OctavoError(
                f"{index} names the tensor {absent[0]}, which {weight_map[absent[0]]} does not hold; download it again."
            )

    @cached_property
    def _said(self) -> StoredFormat | None:
        return stored_format_of(read_json(self.directory / "config.json") or {}, self.directory)

    def is_weight_only(self, module: str) -> bool:
        """Whether config.json says that activations which FP8 codes of `module` multiply stay as they are."""
        return self._said is not None and self._said.of(module).weight_only

    def matrix_values(self, without: Collection[str] = ()) -> int:
        """The number of values in all matrices but packed ones and `without`, from the headers alone."""
        matrices = (t for t in self.tensors.values() if len(t.shape) > 1 and not t.name.endswith("_packed"))
        return sum(prod(t.shape) for t in matrices if t.name not in without)

    def packed_bytes(self, without: Collection[str] = ()) -> int:
        """The bytes of packed INT4 but `without`, without scales, from the headers alone."""
        return sum(t.nbytes for t in self.tensors.values() if t.name.endswith("_packed") and t.name not in without)

    def read_into(self, tensor: StoredTensor, start: int, buffer: Tensor) -> None:
        """Fills `buffer` (uint8) from the tensor's byte `start` on. Thread-safe; releases the interpreter's lock."""
        if tensor.is_transposed:
            slab, at = self._slab_of(tensor)
            buffer.view(-1).copy_(slab[at + start :][: buffer.numel()])
            return
        view = bytes_of(buffer)
        self._count(len(view))
        descriptor, at = self.descriptor(tensor.file), tensor.start + start
        while view:
            try:
                count = os.preadv(descriptor, [view], at)
            except OSError as error:
                raise OctavoError(f"{self.directory / tensor.file} cannot be read: {error.strerror}.") from None
            if not count:
                raise self._shorter(tensor)
            view, at = view[count:], at + count

    def read_columns_into(self, tensor: StoredTensor, rows: slice, columns: slice, buffer: Tensor) -> None:
        """Fills `buffer` (uint8 [rows, bytes]) with the bytes `columns` of each of some rows of a matrix. Thread-safe; releases
        the interpreter's lock: it copies from mapped pages, since a read call for each row would cost more than its bytes."""
        row = tensor.nbytes // tensor.shape[0]
        start, stop = tensor.start + rows.start * row, tensor.start + rows.stop * row
        if os.fstat(self.descriptor(tensor.file)).st_size < stop:
            raise self._shorter(tensor)
        with self._lock:
            if tensor.file not in self._pages:
                self._pages[tensor.file] = np.memmap(self.directory / tensor.file, np.uint8, "r")
        np.copyto(buffer.numpy(), self._pages[tensor.file][start:stop].reshape(-1, row)[:, columns])
        self._count(buffer.numel())

    def _shorter(self, tensor: StoredTensor) -> OctavoError:
        return OctavoError(f"{self.directory / tensor.file} became shorter while it was read; download it again.")

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes

    def _slab_of(self, tensor: StoredTensor) -> tuple[Tensor, int]:
        """A transposed tensor's slab in row order, and the tensor's offset in it. Each thread keeps its last slab."""
        slab, whole = tensor.slab, tensor.whole_slab()
        assert slab is not None
        if getattr(self._slabs, "of", None) != (tensor.key, slab.expert):
            self._slabs.of = None
            read = torch.empty(whole.nbytes, dtype=torch.uint8)
            self.read_into(whole, 0, read)
            values = read.view(tensor.integers).view(slab.columns, slab.rows)
            self._slabs.bytes, self._slabs.of = values.T.contiguous().view(-1).view(torch.uint8), (tensor.key, slab.expert)
        return self._slabs.bytes, tensor.start - whole.start

    def mapped(self, tensor: StoredTensor, dim: int, part: slice) -> Tensor:
        """The `part` of dimension `dim` on the CPU. Not thread-safe.

        It is a view of the file's mapped pages, read when touched. For one expert of a stack it is a copy, because a stack's
        pages hold all experts.
        """
        dtype = tensor.torch_dtype  # raises for an unknown dtype
        if tensor.slab is not None:
            rows = part if dim == 0 else slice(0, tensor.shape[0])
            own = torch.empty(rows.stop - rows.start, *tensor.shape[1:], dtype=dtype)
            self.read_into(tensor, rows.start * (tensor.nbytes // tensor.shape[0]), own.view(-1).view(torch.uint8))
            return own if dim == 0 else own[:, part].contiguous()
        if tensor.file not in self._maps:
            self._maps[tensor.file] = safe_open(self.directory / tensor.file, framework="pt")
        view = self._maps[tensor.file].get_slice(tensor.key or tensor.name)
        index = (slice(None),) * dim + (part,)
        found: Tensor = view[index] if tensor.shape else self._maps[tensor.file].get_tensor(tensor.key or tensor.name)
        self._count(found.nbytes)
        return found

    def descriptor(self, file: str) -> int:
        """The file's descriptor, opened for reading."""
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(self.directory / file, os.O_RDONLY)
                except OSError as error:
                    raise OctavoError(f"{self.directory / file} cannot be read: {error.strerror}.") from None
            return self._descriptors[file]

    def close(self) -> None:
        """Closes the files. A later read opens them again."""
        self._maps, self._pages = {}, {}
        self._slabs = threading.local()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def bytes_of(data: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = data.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _scales_of_nothing(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> list[str]:
    """Scales, which some tools leave there, beside what is not quantized: an embedding, a head that is tied or in BF16, and a
    layer that the checkpoint's own list excludes."""
    found = []
    for name in tensors:
        module, _, end = name.rpartition(".")
        weight = tensors.get(f"{module}.weight")
        stored = weight is not None and not weight.dtype.startswith(("BF", "F16", "F32", "F64"))
        of_none = end in COMPANIONS and not stored and f"{module}.weight_packed" not in tensors
        if of_none and (module.rpartition(".")[2] in ("lm_head", "embed_tokens") or left_out(config, module)):
            found.append(name)
    return found


def _inside(directory: Path, name: str, index: Path) -> Path:
    """The path of a file that an index names. Raises OctavoError for one outside the checkpoint's directory."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or not Path(name).parts:
        raise OctavoError(f"{index} names the file {name!r}, which is not in the checkpoint's directory; download it again.")
    return directory / name


class Scratch:
    """One thread's reusable buffers: page faults of fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized CPU tensor. The next `take` of the same name reuses its memory."""
        nbytes = prod(shape) * dtype.itemsize
        if name not in self._buffers or self._buffers[name].nbytes < nbytes:
            self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffers[name][:nbytes].view(dtype).view(tuple(shape))


@dataclass(frozen=True)
class Rows(Shard):
    """Rows `start` to `stop` of a matrix of any length: a Shard for reading a matrix in small pieces."""

    start: int = 0
    stop: int = 0

    def slice(self, length: int) -> slice:
        return slice(self.start, self.stop)


class RowReader:
    """A Reader (octavo.quant.formats) over a Checkpoint, for one thread: each read overwrites the one before."""

    prefix = ""

    def __init__(self, checkpoint: Checkpoint, platform: Platform, scratch: Scratch):
        self.checkpoint, self.platform, self.scratch = checkpoint, platform, scratch

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def is_weight_only(self, module: str) -> bool:
        return self.checkpoint.is_weight_only(module)

    def skip(self, name: str) -> None:
        """Does nothing: the tensors of the output were decided before."""

    def stored_shape(self, name: str) -> list[int]:
        return list(self.checkpoint.tensors[name].shape)

    def read(self, name: str, shape: Sequence[int] | None, shard: Shard = WHOLE, part: slice | None = None) -> Tensor:
        """Part of the rows as stored, on the platform's device."""
        tensor = self.checkpoint.tensors[name]
        dtype = tensor.torch_dtype
        if shape is not None and tuple(shape) != tensor.shape:
            raise OctavoError(f"tensor {name} has shape {list(tensor.shape)} where {list(shape)} was expected.")
        if not tensor.nbytes or not tensor.shape:
            part, row, rest = slice(0, 1), tensor.nbytes, tensor.shape
        else:
            part = part or shard.slice(tensor.shape[0])
            row, rest = tensor.nbytes // tensor.shape[0], (part.stop - part.start, *tensor.shape[1:])
        kind = "matrix" if name.endswith((".weight", ".weight_packed")) else name.rpartition(".")[2]
        found = self.scratch.take(kind, rest, dtype)
        self.checkpoint.read_into(tensor, part.start * row, found.view(-1).view(torch.uint8))
        self.checkpoint.finite.look(name, tensor.file, found)
        return found.to(self.platform.device)
