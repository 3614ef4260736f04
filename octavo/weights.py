"""Reads a checkpoint one named, sharded tensor at a time, and fills a model with it.

Layers pull: `load` walks the module tree, whose paths are the checkpoint's, and hands each layer a Loader at its own path. A
layer reads a slice, quantizes it on the device and drops the dense copy, so the peak is the finished model plus one layer.
"""

from __future__ import annotations

import fnmatch
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant import QTensor, QuantRules, Scheme, concat, quantize
from octavo.quant.formats import WHOLE, Shard, read_weight
from octavo.quant.scheme import Granularity

__all__ = ["WHOLE", "DummySource", "LoadReport", "Loader", "SafetensorsSource", "Shard", "load"]


class Source(Protocol):
    """Named tensors that can be read in parts."""

    names: set[str]

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice) -> Tensor:
        """The `part` of dimension `dim`. Raises OctavoError if the stored shape is not `shape`."""

    def shape(self, name: str) -> list[int]: ...


class SafetensorsSource:
    """The safetensors files of a checkpoint directory. Raises OctavoError for what is missing or damaged."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        one = directory / "model.safetensors"  # some directories hold the same weights again, in another layout
        files = [one] if one.exists() else sorted(directory.glob("*.safetensors"))
        if index.exists():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
                files = [directory / name for name in sorted(set(weight_map.values()))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise OctavoError(f"{index} is not a safetensors index; download it again.") from None
        if not files:
            raise OctavoError(
                f"{directory} has no .safetensors files; Octavo reads no other weight format (convert .bin files first)."
            )
        self.paths = files
        self._files: dict[str, Any] = {}
        for path in files:
            opened = self._open(path)
            self._files.update((name, opened) for name in opened.keys())  # noqa: SIM118 (not a dict)
        self.names = set(self._files)
        if index.exists() and (absent := sorted(set(weight_map) - self.names)):
            raise OctavoError(
                f"{index} names the tensor {absent[0]}, which {weight_map[absent[0]]} does not hold; download it again."
            )

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise OctavoError(f"{path} is missing, but the checkpoint's index names it; download it.") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise OctavoError(f"{path} is truncated or corrupt ({error}); download it again.") from None

    def shape(self, name: str) -> list[int]:
        return list(self._files[name].get_slice(name).get_shape())

    def matrix_values(self) -> int:
        """Values of all matrices, from the headers alone."""
        return sum(prod(shape) for name in self.names if len(shape := self.shape(name)) > 1)

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice) -> Tensor:
        view = self._files[name].get_slice(name)
        stored = list(view.get_shape())
        if shape is not None and stored != list(shape):
            raise OctavoError(
                f"tensor {name} has shape {stored}, but config.json makes it {list(shape)}: they are of different models."
            )
        return view[(slice(None),) * dim + (part,)] if stored else self._files[name].get_tensor(name)  # type: ignore[no-any-return]


class DummySource:
    """Random weights of any shape that is asked for, the same for the same name. For benchmarks."""

    POOL = 1_000_003  # prime, so that no two rows of a matrix start at the same place

    def __init__(self, std: float = 0.02) -> None:
        self.names: set[str] = set()
        self._pool = torch.randn(self.POOL, generator=torch.Generator().manual_seed(0)).mul_(std).bfloat16()

    def shape(self, name: str) -> list[int]:
        raise KeyError(name)

    def read(self, name: str, shape: Sequence[int] | None, dim: int, part: slice) -> Tensor:
        assert shape is not None
        size = [part.stop - part.start if i == dim else n for i, n in enumerate(shape)]
        if len(size) == 1:
            return (
                torch.ones(size, dtype=torch.bfloat16)
                if name.endswith("norm.weight")
                else torch.zeros(size, dtype=torch.bfloat16)
            )
        offset = zlib.crc32(name.encode()) % self.POOL
        count = size[0] * size[1]
        return self._pool.roll(-offset).repeat(-(-count // self.POOL))[:count].view(size)


@dataclass
class GroupReport:
    """Bytes of the weights that share a role (attention, mlp, embedding, ...) and a scheme."""

    tensors: int = 0
    values: int = 0  # parameters; those of a tied head are the embedding's
    dense: int = 0  # what is stored here would take this many bytes in BF16
    stored: int = 0
    held: int = 0


@dataclass
class LoadReport:
    """What was loaded: (role, scheme) -> GroupReport."""

    groups: dict[tuple[str, str], GroupReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, path: str, scheme: str, values: int, stored: int, held: int, *, tied: bool = False) -> None:
        group = self.groups.setdefault((_role(path), scheme), GroupReport())
        group.tensors += 1
        group.values += 0 if tied else values
        group.dense += 2 * values if stored else 0
        group.stored += stored
        group.held += held

    def note(self, text: str) -> None:
        """Say `text` once, however many layers it holds for."""
        if text not in self.notes:
            self.notes.append(text)

    def total(self, what: str, *, quantized_only: bool = False) -> int:
        """Sum of a GroupReport's field over all groups, or over those stored in FP8."""
        return sum(getattr(g, what) for (_, scheme), g in self.groups.items() if not quantized_only or scheme != "bf16")


def _role(path: str) -> str:
    for role, words in {"attention": ("attn",), "mlp": ("mlp",), "embedding": ("embed",), "lm_head": ("lm_head",)}.items():
        if any(word in path for word in words) and "norm" not in path:
            return role
    return "norms"


@dataclass
class Loader:
    """A checkpoint seen from one module's path, with what turns its tensors into weights."""

    source: Source
    platform: Platform
    rules: QuantRules
    dtype: torch.dtype
    tp: TensorParallel = field(default_factory=TensorParallel)
    prefix: str = ""
    report: LoadReport = field(default_factory=LoadReport)
    seen: set[str] = field(default_factory=set)
    shared: dict[str, Tensor] = field(default_factory=dict)  # what a tied layer takes from the layer that loaded it

    def at(self, path: str) -> Loader:
        return replace(self, prefix=f"{path}." if path else "")

    def has(self, name: str) -> bool:
        return self.prefix + name in self.source.names

    def skip(self, name: str) -> None:
        """The tensor `name`, if there, is known and not needed."""
        self.seen.add(self.prefix + name)

    def stored_shape(self, name: str) -> list[int]:
        return self.source.shape(self.prefix + name)

    def read(self, name: str, shape: Sequence[int] | None, shard: Shard = WHOLE, part: slice | None = None) -> Tensor:
        """A tensor as stored, on the device: this rank's `shard` of it, or `part` of the shard's dimension."""
        full = self.prefix + name
        self.seen.add(full)
        if full not in self.source.names and not isinstance(self.source, DummySource):
            raise OctavoError(f"the checkpoint has no tensor {full}, which the model needs; is it complete?")
        length = (shape or self.source.shape(full) or [1])[shard.dim]
        return self.source.read(full, shape, shard.dim, part or shard.slice(length)).to(self.platform.device)

    def vector(self, name: str, shape: Sequence[int], shard: Shard = WHOLE) -> Tensor:
        """A norm, bias or embedding in the model's dtype; never quantized."""
        tensor = self.read(name, shape, shard).to(self.dtype)
        self.report.add(self.prefix + name, "bf16", tensor.numel(), tensor.nbytes, tensor.nbytes)
        return tensor

    def weight(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        shards: Sequence[Shard],
        *,
        is_head: bool = False,
        tied: bool = False,
    ) -> ops.PackedWeight:
        """The matrices `names`, each [N, K], stacked, quantized as the rules say and laid out for this platform.

        A `tied` one is another layer's too: its values are counted there.
        """
        scheme = self.rules.scheme_for([self.prefix + name for name in names], is_head=is_head)
        q = concat([self._stored(name, shape, shard, scheme) for name, shape, shard in zip(names, shapes, shards, strict=True)])
        packed = ops.pack(q.padded(self.platform.fp8_alignment), self.platform)
        stored = 0 if tied and q.scale is None else q.nbytes
        path = "lm_head" if is_head else self.prefix + names[0]
        self.report.add(path, q.scheme.name, q.shape[0] * q.shape[1], stored, packed.held_bytes, tied=tied)
        return packed

    def _stored(self, name: str, shape: tuple[int, int], shard: Shard, scheme: Scheme) -> QTensor:
        found: QTensor | Tensor | None = self.shared.get(f"{self.prefix}{name}.weight")
        if found is None:
            found = read_weight(self, name, shape, shard)
        if isinstance(found, QTensor):  # already quantized: its codes are kept bit for bit
            if scheme.quantized and scheme is not found.scheme:
                self.report.note(f"layers stored as {found.scheme.name} keep their codes; {scheme.name} is for those in BF16")
            return found
        spans_ranks = scheme.weight is Granularity.TENSOR or (scheme.weight is Granularity.ROW and shard.dim == 1)
        dense = found if scheme.quantized else found.to(self.dtype)
        return quantize(dense, scheme, self.platform.fp8_dtype, self.tp.max_reduce if spans_ranks else None)


def load(model: nn.Module, loader: Loader, ignore: Sequence[str] = (), progress: Callable[[float], None] | None = None) -> None:
    """Fill every layer of `model`. Raises OctavoError for a tensor that is missing, and for one that nothing reads.

    `ignore`: globs of tensors that may go unread. `progress` is called with the part that is done, 0 to 1.
    """
    modules = [(path, module) for path, module in model.named_modules() if hasattr(module, "load")]
    for done, (path, module) in enumerate(modules, 1):
        module.load(loader.at(path.rpartition(".")[0] if getattr(module, "reads_siblings", False) else path))
        if progress:
            progress(done / len(modules))
    extra = sorted(
        n for n in loader.source.names - loader.seen if not any(fnmatch.fnmatchcase(n, pattern) for pattern in ignore)
    )
    if extra:
        raise OctavoError(
            f"the checkpoint holds {len(extra)} tensor(s) that a model of this config.json does not have, "
            f"the first is {extra[0]}; they are of different models."
        )
    loader.rules.check_used()
