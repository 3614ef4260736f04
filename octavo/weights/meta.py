"""Sources of tensors on torch's meta device, for finding out what loading would do or refuse before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from octavo.quant.promise import Promise
from octavo.weights.checkpoint import StoredTensor
from octavo.weights.finite import SCALES_OF_CACHES
from octavo.weights.sources import check_shape

__all__ = ["MetaSource"]

Beside = Sequence[tuple[str, str, tuple[int, ...]]]


class MetaSource:
    """A Source for the tensors in a checkpoint's headers, or for announced tensors of any name."""

    def __init__(self, tensors: Mapping[str, StoredTensor], promised: Promise | None = None, *, has_any: bool = False):
        self.tensors, self.names, self.has_any, self.promised = dict(tensors), set(tensors), has_any, promised
        self._beside: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
        for tensor in tensors.values():
            self._put(tensor)

    def _put(self, tensor: StoredTensor) -> None:
        module, _, end = tensor.name.rpartition(".")
        self._beside.setdefault(module, []).append((end, tensor.dtype, tensor.shape))

    def beside(self, module: str) -> Beside:
        """(last part of the name, dtype, shape) of each tensor of a module."""
        return self._beside.get(module, ())

    def promise(self, module: str, shape: tuple[int, int]) -> None:
        """Announces that the matrix `module` will be read. Its announced tensors exist from now on."""
        if self.promised is None or module in self._beside or self.promised.leaves_out(module):
            return
        for end, dtype, size in self.promised.of(module).tensors(*shape):
            tensor = StoredTensor(f"{module}.{end}", dtype, size, "", 0, 0)
            self.tensors[tensor.name] = tensor
            self.names.add(tensor.name)
            self._put(tensor)

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
