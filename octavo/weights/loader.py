"""Loads a model from a checkpoint, one named, sharded tensor at a time.

Layers pull: `load` walks the module tree, whose paths are the checkpoint's, and hands each layer a Loader at its path. A layer
reads a slice, quantizes it on the device and drops the dense copy, so the peak is the finished model plus one layer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant import QTensor, QuantRules, Scheme, concat, quantize
from octavo.quant.formats import WHOLE, Shard, read_weight
from octavo.quant.qtensor import Stacker, dequantize
from octavo.quant.scheme import BF16, Granularity
from octavo.weights.in_place import Put, fresh
from octavo.weights.leftovers import skip_leftovers
from octavo.weights.load_report import LoadReport
from octavo.weights.names import why_missing
from octavo.weights.parts_of_codes import PartsOfCodes, part_of
from octavo.weights.reading_order import reading_order
from octavo.weights.sources import Source

__all__ = ["WHOLE", "Loader", "Matrices", "Shard", "check_read", "is_tied", "load", "places_of", "stored_modules"]


class Matrices(NamedTuple):
    """Checkpoint matrices that are stacked into one weight: their names, full shapes [N, K] and this rank's shards."""

    names: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    shards: Sequence[Shard]


@dataclass
class Loader:
    """A checkpoint as seen from one module's path, with the settings for loading its weights."""

    source: Source
    platform: Platform
    rules: QuantRules
    dtype: torch.dtype
    tp: TensorParallel = field(default_factory=TensorParallel)
    prefix: str = ""
    report: LoadReport = field(default_factory=LoadReport)
    seen: set[str] = field(default_factory=set)
    tied_head: bool = False  # whether the model's head shares the embedding's matrix
    embeddings: dict[str, Tensor | ops.PackedWeight] = field(default_factory=dict)  # by module, for a tied head

    def at(self, path: str) -> Self:
        return replace(self, prefix=f"{path}." if path else "")

    def has(self, name: str) -> bool:
        return self.prefix + name in self.source.names

    def is_weight_only(self, module: str) -> bool:
        """Whether the checkpoint's activations that the FP8 codes of `module` multiply stay as they are."""
        return self.source.is_weight_only(self.prefix + module)

    def skip(self, name: str) -> None:
        """Marks the tensor `name`, if present, as known and not needed."""
        self.seen.add(self.prefix + name)

    def stored_shape(self, name: str) -> list[int]:
        return self.source.shape(self.prefix + name)

    def read(self, name: str, shape: Sequence[int] | None, shard: Shard = WHOLE, part: slice | None = None) -> Tensor:
        """A tensor as stored, on the device: this rank's `shard` of it, or `part` of the shard's dimension."""
        full = self.prefix + name
        self.seen.add(full)
        if full not in self.source.names and not self.source.has_any:
            raise OctavoError(why_missing(full, self.source.names))
        length = (shape or self.source.shape(full) or [1])[shard.dim]
        return self.source.read(full, shape, shard.dim, part or shard.slice(length), self.platform.device)

    def declare(self, names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> None:
        """Announces matrices [N, K] that will be read (Source.declare)."""
        for name, shape in zip(names, shapes, strict=True):
            self.source.declare(self.prefix + name, shape)

    def vector(self, name: str, shape: Sequence[int], shard: Shard = WHOLE, *, dtype: torch.dtype | None = None) -> Tensor:
        """A norm, bias, router or embedding in the model's dtype, or in `dtype`; never quantized."""
        stored = self.read(name, shape, shard)
        if not stored.is_floating_point() or stored.dtype.itemsize == 1:
            raise OctavoError(
                f"{self.prefix}{name} is stored as {stored.dtype}, which Octavo reads of linear layers only; "
                "take a checkpoint in which embeddings, norms, routers and biases are not quantized."
            )
        tensor = stored.to(dtype or self.dtype)
        self.report.add(self.prefix + name, BF16, shard.whole(shape), tensor.numel(), tensor.nbytes, tensor.nbytes)
        return tensor

    def dense(self, name: str, shape: tuple[int, int], shard: Shard = WHOLE) -> Tensor:
        """This rank's part of the matrix `name` [N, K] in the model's dtype, dequantized if stored in codes."""
        self.declare([name], [shape])
        self.rules.ignored(self.prefix + name)  # marks patterns that match it as used
        found = read_weight(self, name, shape, shard)
        tensor = (dequantize(found) if isinstance(found, QTensor) else found).to(self.dtype)
        self.report.add(self.prefix + name, BF16, shard.whole(shape), tensor.numel(), tensor.nbytes, tensor.nbytes)
        return tensor

    def weight(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        shards: Sequence[Shard],
        *,
        is_head: bool = False,
        row_lookup: bool = False,
    ) -> ops.PackedWeight:
        """The matrices `names`, each [N, K], stacked, quantized by the rules and packed for this platform.

        `row_lookup`: single rows are read too, as in an embedding.
        """
        if not is_head:
            self.declare(names, shapes)
        scheme = self.rules.scheme_for([self.prefix + name for name in names], is_head=is_head)
        q = self.with_activations(self.stacked(names, shapes, shards, scheme), names[0])
        packed = self.pack(q.padded(self.platform.fp8_alignment), row_lookup=row_lookup)
        whole = sum(shard.whole(shape) for shape, shard in zip(shapes, shards, strict=True))
        self.report.add(self.prefix + names[0], q.scheme, whole, prod(q.shape), q.nbytes, packed.held_bytes)
        return packed

    def experts(self, stacks: Sequence[Matrices], count: int, active: int, local: range) -> list[ops.PackedStack]:
        """For each of `stacks` the weights [E, N, K] of the E experts `local` of the `count` at this path, `active` per token.

        They are quantized one by one as they are read. A module that is excluded is excluded for every expert.
        """
        others, start = {str(e) for e in range(count) if e not in local}, len(self.prefix)  # which other ranks read
        own = (name for name in self.source.names if others and name.startswith(self.prefix))
        self.seen.update(name for name in own if name[start:].partition(".")[0] in others)
        made, stored = [Stacker(len(local), self.prefix.removesuffix(".")) for _ in stacks], [0] * len(stacks)
        schemes = [
            self.rules.scheme_for([f"{self.prefix}{e}.{name}" for e in range(count) for name in stack.names])
            for stack in stacks
        ]
        for at, e in enumerate(local):
            one = self.at(f"{self.prefix}{e}")
            for i, (stack, scheme) in enumerate(zip(stacks, schemes, strict=True)):
                one.declare(stack.names, stack.shapes)
                q = one.stacked(*stack, scheme)
                stored[i] += q.nbytes
                made[i].put(at, q.padded(self.platform.fp8_alignment))
        packed = []
        for stacker, stack, nbytes in zip(made, stacks, stored, strict=True):
            q = self.with_activations(stacker.finished(), f"0.{stack.names[0]}")
            packed.append(self.pack_experts(q))
            whole, path = count * sum(map(prod, stack.shapes)), f"{self.prefix}0.{stack.names[0]}"
            self.report.add(path, q.scheme, whole, prod(q.shape), nbytes, packed[-1].held_bytes)
        return packed

    def with_activations(self, q: QTensor, name: str) -> QTensor:
        """A finished weight, of which `name` is a part, multiplied by activations as the rules ask."""
        return replace(q, scheme=self.rules.of_activations(self.prefix + name, q.scheme))

    def pack_experts(self, q: QTensor) -> ops.PackedStack:
        """Packs a finished stack of experts for this platform."""
        return ops.pack_experts(q, self.platform, owned=True)

    def pack(self, q: QTensor, *, row_lookup: bool = False) -> ops.PackedWeight:
        """Packs a finished weight for this platform."""
        return ops.pack(q, self.platform, row_lookup=row_lookup)

    def stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], shards: Sequence[Shard], scheme: Scheme
    ) -> QTensor:
        """This rank's parts of the matrices, stacked into one weight, in their stored scheme or quantized to `scheme`. Parts of
        one matrix, whose name is then given for each, share its scales."""
        if len(names) > 1 and len(set(names)) == 1:
            rows = [shard.slice(shapes[0][0]) for shard in shards]
            if sum(part.stop - part.start for part in rows) == shapes[0][0]:
                shards = [WHOLE]  # stored tiles may reach over two parts
            parts = [read_weight(self, names[0], shapes[0], shard) for shard in shards]
            whole = concat([p if isinstance(p, QTensor) else QTensor(p, None, BF16, (len(p), p.shape[1])) for p in parts])
            return self.in_scheme(whole if whole.scheme.quantized else whole.data, shards[0], scheme)
        codes = PartsOfCodes(list(map(part_of, shapes, shards)), self.platform)
        return concat([self.stored(*one, scheme, codes) for one in zip(names, shapes, shards, strict=True)], codes.whole)

    def embedding(self, shape: tuple[int, int], shard: Shard = WHOLE) -> Tensor | ops.PackedWeight:
        """This rank's part of this module's matrix [vocab, hidden], in the model's dtype.

        If the head is tied to it and quantized, or its product reads an order of its own, there is one packed copy for both.
        """
        module = self.prefix.removesuffix(".")
        parent, _, name = module.rpartition(".")
        matrix: Tensor | ops.PackedWeight
        if self.tied_head and self.rules.scheme_for([module], is_head=True).quantized:
            matrix = self.at(parent).weight([name], [shape], [shard], is_head=True, row_lookup=True)
        else:
            matrix = self.vector("weight", shape, shard)
            if self.tied_head and self.platform.is_cpu and self.platform.widened_dtype is None and not matrix.is_meta:
                head = self.embeddings[module] = self._for_head(matrix)
                return matrix if head.stored is not None else head
        self.embeddings[module] = matrix
        return matrix

    def tied(self, module: str) -> ops.PackedWeight:
        """The weight of a head tied to the embedding `module`, which is already loaded."""
        matrix = self.embeddings[module]
        return matrix if isinstance(matrix, ops.PackedWeight) else self._for_head(matrix)

    def _for_head(self, matrix: Tensor) -> ops.PackedWeight:
        packed = self.pack(QTensor(matrix, None, BF16, (matrix.shape[0], matrix.shape[1])), row_lookup=True)
        self.report.add("lm_head", BF16, 0, 0, 0, packed.held_bytes - matrix.nbytes)
        return packed

    def stored(self, name: str, shape: tuple[int, int], shard: Shard, scheme: Scheme, codes: PartsOfCodes) -> QTensor:
        """This rank's part of one matrix, the next of `codes`: its stored codes, or the matrix quantized to `scheme`."""
        found = read_weight(self, name, shape, shard)
        return self.in_scheme(found, shard, scheme, codes.next(found, scheme))

    def in_scheme(self, found: QTensor | Tensor, shard: Shard, scheme: Scheme, codes: Tensor | None = None) -> QTensor:
        """What was read of one matrix: stored codes as they are, or values quantized to `scheme`, into `codes` if given."""
        if isinstance(found, QTensor):  # already quantized, so its codes are kept bit for bit
            if scheme.quantized and scheme.has_codes_of(found.scheme):
                return replace(found, scheme=scheme)
            if scheme.quantized and scheme is not found.scheme:
                self.report.note(f"layers stored as {found.scheme.name} keep their codes; {scheme.name} is for those in BF16")
            return found
        # of a whole matrix, such as an expert that is another's on other ranks, no scale spans ranks
        of_columns = scheme.weight is Granularity.ROW and shard.dim == 1
        spans_ranks = shard.size > 1 and (scheme.weight is Granularity.TENSOR or of_columns)
        dense = found if scheme.quantized else found.to(self.dtype)
        return quantize(dense, scheme, self.platform.fp8_dtype, self.tp.max_reduce if spans_ranks else None, codes)


def load(
    model: nn.Module,
    loader: Loader,
    ignore: Sequence[str] = (),
    progress: Callable[[float], None] | None = None,
    *,
    put: Put = fresh,
    elsewhere: Sequence[str] = (),
) -> bool:
    """Loads every layer of `model`. Raises OctavoError for a missing tensor, and for one that nothing reads.

    `ignore`: globs of tensors that may go unread. `progress`: called with the finished part, 0 to 1. `put`: what is done with a
    layer (octavo.weights.in_place); False where it said so of one, because its memory could not be overwritten.
    elsewhere: those of `ignore` that other processes read, of which nothing need be said.
    """
    places = places_of(model)
    loader = replace(loader, tied_head=is_tied(places))
    loader.source.expect(reading_order([path for path, _ in places], loader.source.names))
    complete = True
    try:
        for done, (path, module) in enumerate(places, 1):
            complete = put(module, loader.at(path)) and complete
            if progress:
                progress(done / len(places))
        check_read(loader, ignore)
        loader.source.finish()
    finally:
        loader.source.close()
    for pattern in ignore:
        left = fnmatch.filter(loader.source.names - loader.seen, pattern)
        for name in left:
            loader.rules.ignored(name.rpartition(".")[0])  # marks patterns that name it as used
        if left and "rotary_emb" not in pattern and pattern not in elsewhere:  # rotary tables follow from config.json
            loader.report.note(f"{len(left)} tensor(s) {pattern} not loaded: what is served does not compute with them")
    loader.rules.check_used()
    loader.rules.check_activations()
    return complete


def stored_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules of a model, each with its path in checkpoints: the module's path, or the model's `path` applied to it."""
    stored: Callable[[str], str] = getattr(model, "path", str)
    return [(stored(path), module) for path, module in model.named_modules()]


def places_of(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers of a model that load weights, each with the checkpoint path that it reads at."""
    return [
        (path.rpartition(".")[0] if getattr(module, "reads_siblings", False) else path, module)
        for path, module in stored_modules(model)
        if hasattr(module, "load")
    ]


def is_tied(places: Sequence[tuple[str, Any]]) -> bool:
    """Whether the model's head shares the embedding's matrix."""
    return any(getattr(module, "tied", None) for _, module in places)


def check_read(loader: Loader, ignore: Sequence[str]) -> None:
    """Raises OctavoError for a tensor that nothing read, no glob in `ignore` matches and the model needs; notes the others."""
    unread = loader.source.names - loader.seen
    extra = sorted(n for n in unread if not any(fnmatch.fnmatchcase(n, pattern) for pattern in ignore))
    skip_leftovers(extra, lambda name: loader.at("").read(name, None), loader.report.note)
