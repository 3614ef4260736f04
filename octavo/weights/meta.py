"""What loading would do or refuse, found out before any weight is read: tensors on torch's meta device, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from octavo.ops import PackedStack, PackedWeight
from octavo.platform import Platform
from octavo.quant import QuantRules
from octavo.quant.stored_format import StoredFormat
from octavo.weights.checkpoint import StoredTensor
from octavo.weights.finite import SCALES_OF_CACHES
from octavo.weights.loader import WHOLE, Loader, Matrices, Shard, is_tied, places_of
from octavo.weights.sources import check_shape

__all__ = ["MatrixSizes", "MetaSource", "matrix_sizes"]

Beside = Sequence[tuple[str, str, tuple[int, ...]]]


class MetaSource:
    """A Source for the tensors in a checkpoint's headers, or for announced tensors of any name.

    stored_format: of those that are announced. described: what config.json says of those in the headers.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        stored_format: StoredFormat | None = None,
        *,
        described: StoredFormat | None = None,
        has_any: bool = False,
    ):
        self.tensors, self.names, self.has_any, self.stored_format = dict(tensors), set(tensors), has_any, stored_format
        self.described = described or stored_format
        self._beside: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
        for tensor in tensors.values():
            self._put(tensor)

    def _put(self, tensor: StoredTensor) -> None:
        module, _, end = tensor.name.rpartition(".")
        self._beside.setdefault(module, []).append((end, tensor.dtype, tensor.shape))

    def beside(self, module: str) -> Beside:
        """(last part of the name, dtype, shape) of each tensor of a module."""
        return self._beside.get(module, ())

    def declare(self, module: str, shape: tuple[int, int]) -> None:
        """Announces that the matrix `module` will be read. Its announced tensors exist from now on."""
        if self.stored_format is None or module in self._beside or self.stored_format.leaves_out(module):
            return
        for end, dtype, size in self.stored_format.of(module).tensors(*shape):
            tensor = StoredTensor(f"{module}.{end}", dtype, size, "", 0, 0)
            self.tensors[tensor.name] = tensor
            self.names.add(tensor.name)
            self._put(tensor)

    def is_weight_only(self, module: str) -> bool:
        return self.described is not None and self.described.of(module).weight_only

    def shape(self, name: str) -> list[int]:
        return list(self.tensors[name].shape)

    def expect(self, names: Sequence[str]) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice, device: torch.device) -> Tensor:
        dtype, stored = torch.bfloat16, shape
        if name in self.tensors:
            dtype, stored = self.tensors[name].torch_dtype, self.tensors[name].shape
            check_shape(name, stored, shape)
        assert stored is not None
        if name.endswith(SCALES_OF_CACHES):  # layers read these values
            return torch.ones(tuple(stored), dtype=dtype)
        size = [len(range(*part.indices(n))) if i == dim else n for i, n in enumerate(stored)]
        return torch.empty(size, dtype=dtype, device="meta")


@dataclass
class MatrixSizes:
    """The number of values in all matrices but packed ones, and the bytes of packed INT4, scales left out of both."""

    values: int = 0
    packed_bytes: int = 0


@dataclass
class _SizeLoader(Loader):
    """Adds up the matrices that a model's layers ask for, whole ones and not a rank's part, and reads none."""

    stored_format: StoredFormat | None = None
    sizes: MatrixSizes = field(default_factory=MatrixSizes)

    def vector(self, name: str, shape: Sequence[int], shard: Shard = WHOLE, *, dtype: torch.dtype | None = None) -> Tensor:
        if len(shape) > 1:
            self.sizes.values += prod(shape)
        return torch.empty(tuple(shape), dtype=dtype or self.dtype, device="meta" if len(shape) > 1 else "cpu")

    def dense(self, name: str, shape: tuple[int, int], shard: Shard = WHOLE) -> Tensor:
        self._count(self.prefix + name, shape)
        part = shard.slice(shape[shard.dim])
        own = [part.stop - part.start if dim == shard.dim else side for dim, side in enumerate(shape)]
        return torch.empty(own, dtype=self.dtype, device="meta")

    def weight(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        shards: Sequence[Shard],
        *,
        is_head: bool = False,
        row_lookup: bool = False,
    ) -> PackedWeight:
        for name, shape in zip(names, shapes, strict=True):
            self._count(self.prefix + name, shape, is_head=is_head)
        return PackedWeight()

    def experts(self, stacks: Sequence[Matrices], count: int, active: int, local: range) -> list[PackedStack]:
        for stack in stacks:
            for name, shape in zip(stack.names, stack.shapes, strict=True):
                self._count(f"{self.prefix}0.{name}", shape, count)
        return [PackedStack() for _ in stacks]

    def tied(self, module: str) -> PackedWeight:
        return PackedWeight()

    def _count(self, module: str, shape: tuple[int, int], copies: int = 1, *, is_head: bool = False) -> None:
        announced = self.stored_format is not None and not is_head and not self.stored_format.leaves_out(module)
        if announced and self.stored_format is not None and self.stored_format.of(module).scheme is None:
            self.sizes.packed_bytes += copies * prod(shape) // 2
        else:
            self.sizes.values += copies * prod(shape)


def matrix_sizes(model: nn.Module, stored_format: StoredFormat | None, rules: QuantRules, platform: Platform) -> MatrixSizes:
    """The sizes of a model's matrices in a checkpoint of the announced format. `model` holds no weights afterwards."""
    places = places_of(model)
    source = MetaSource({}, stored_format, has_any=True)
    loader = _SizeLoader(source, platform, rules, torch.bfloat16, tied_head=is_tied(places), stored_format=stored_format)
    for path, module in places:
        module.load(loader.at(path))
    return loader.sizes
