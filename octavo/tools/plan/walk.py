"""What a rank would hold of a model, by loading it: the engine's layers, Loader and formats, over tensors without values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.layers.rope import RotaryEmbedding
from octavo.ops import PackedStack, PackedWeight
from octavo.ops.cpu.native import packed_bytes
from octavo.platform import Platform
from octavo.quant import BF16, QTensor, QuantRules, Scheme
from octavo.quant.qtensor import Stacker
from octavo.quant.scheme import WeightDType
from octavo.tools.plan.operands import Operand, Walk, component_of
from octavo.weights.loader import WHOLE, Loader, Matrices, Shard, check_read, is_tied, places_of
from octavo.weights.meta import MetaSource

__all__ = ["LEFT_OUT", "Walker", "walk"]

EMBEDDINGS = "a look-up gains nothing from FP8"
HEAD = "lm_head is BF16 by default; --quantize-lm-head stores it in FP8"
TIED = "lm_head's matrix, too: BF16 by default; --quantize-lm-head stores it in FP8"
VECTOR = "vectors: no matrix product to speed up"
ROUTER = "small, and it decides which experts run"
INDEX_WEIGHTS = "few weights a token that decide what attention sees"
BY_HEAD = "multiplied head by head with queries and latents, in the model's dtype"
PATCHES = "the embedding of patches and the positions: few weights"
LEFT_OUT = "left out by --quantization-ignore"


class Planned(PackedWeight):
    """A weight that was only noted: padded, and on the meta device. held_bytes: of it as `platform` packs it."""

    def __init__(self, q: QTensor, platform: Platform):
        self.q, self.held_bytes = q, packed_bytes(q) if platform.is_cpu else q.nbytes


Known = dict[Any, Any]


@dataclass
class Walker(Loader):
    """The Loader that a plan hands to a model's layers: it notes what they ask for.

    known: what equal weights came to, since layers repeat; and by the path of a stack, which experts are stored otherwise than
    the first. every: whether each expert is looked at, or the first for all that are stored as it is. kept: why
    the layer that it is at is never quantized. copies: experts
    of which a weight is one; `active` of them multiply a token.
    """

    source: MetaSource
    operands: list[Operand] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    known: Known = field(default_factory=dict)
    every: bool = False
    kept: str = ""
    copies: int = 1
    active: int = 1

    def refuse(self, error: OctavoError) -> None:
        if str(error) not in self.problems:
            self.problems.append(str(error))

    def vector(self, name: str, shape: Sequence[int], shard: Shard = WHOLE, *, dtype: torch.dtype | None = None) -> Tensor:
        full = self.prefix + name
        try:
            found = super().vector(name, shape, shard, dtype=dtype)
        except OctavoError as error:
            self.refuse(error)
            found = torch.empty(tuple(shape), dtype=self.dtype, device="meta")
        is_vector, component = len(shape) < 2, component_of(full)
        whys = {"embeddings": TIED if self.tied_head else EMBEDDINGS, "router": ROUTER, "indexer": INDEX_WEIGHTS}
        why = whys.get(component, VECTOR if is_vector else PATCHES if component == "vision" else "as stored")
        whole, own = (shape[0], prod(shape[1:])), (found.shape[0], prod(found.shape[1:]))
        name = full if is_vector else full.removesuffix(".weight")
        self._note(
            (name,), whole, QTensor(found, None, BF16, own), why, is_vector=is_vector, active=int(component != "embeddings")
        )
        # Biases are put one behind the other, for which torch would import its compiler if they were on the meta device.
        return found if found.dim() > 1 else torch.empty(found.shape, dtype=self.dtype)

    def dense(self, name: str, shape: tuple[int, int], shard: Shard = WHOLE) -> Tensor:
        full = self.prefix + name
        try:
            found = super().dense(name, shape, shard)
        except OctavoError as error:
            self.refuse(error)
            self.seen.update(f"{full}.{end}" for end, *_ in self.source.beside(full))
            part = shard.slice(shape[shard.dim])
            own = [part.stop - part.start if dim == shard.dim else side for dim, side in enumerate(shape)]
            found = torch.empty(own, dtype=self.dtype, device="meta")
        self._note((full,), shape, QTensor(found, None, BF16, (found.shape[0], found.shape[1])), BY_HEAD)
        return found

    def weight(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        shards: Sequence[Shard],
        *,
        is_head: bool = False,
        row_lookup: bool = False,
    ) -> PackedWeight:
        full = tuple(dict.fromkeys(self.prefix + name for name in names))  # one may be named for each of its parts
        packed = super().weight(names, shapes, shards, is_head=is_head, row_lookup=row_lookup)
        assert isinstance(packed, Planned)
        whole = sum(n for n, _ in dict(zip(names, shapes, strict=True)).values()), shapes[0][1]
        why, sharing = self._why(full[0], packed.q, is_head, row_lookup), max(shard.copies for shard in shards)
        active = 0 if row_lookup else self.active
        self._note(full, whole, packed.q, why, active=active, sharing=sharing, held=packed.held_bytes)
        return packed

    def pack(self, q: QTensor, *, row_lookup: bool = False) -> PackedWeight:
        return Planned(q, self.platform)

    def with_activations(self, q: QTensor, name: str) -> QTensor:
        try:
            return super().with_activations(q, name)
        except OctavoError as error:
            self.refuse(error)
            return q

    def _why(self, name: str, q: QTensor, is_head: bool, row_lookup: bool) -> str:
        if q.scheme.quantized:
            kept = any(f"{name}.{end}" in self.source.names for end in ("weight_scale", "weight_scale_inv", "weight_packed"))
            return "stored so: its codes are kept bit for bit" if kept else "quantized while it is loaded"
        if is_head and not self.rules.quantize_lm_head:
            return TIED if row_lookup else HEAD
        return self.kept or (LEFT_OUT if self.rules.scheme.quantized else "as stored")

    def _note(
        self,
        names: tuple[str, ...],
        whole: tuple[int, int],
        q: QTensor,
        why: str,
        is_vector: bool = False,
        active: int = 1,
        sharing: int = 1,
        held: int | None = None,
    ) -> None:
        dense = "float32" if q.data.dtype is torch.float32 else "bf16"
        form, values, n = q.scheme.name if q.scheme.quantized else dense, prod(q.shape), self.copies
        own = q.shape[0], prod(q.shape[1:])
        padding = (q.data.numel() - values) if q.scheme.dtype is WeightDType.FP8 else 0
        operand = Operand(
            component_of(names[0]), names, whole, own, q.scheme, form, why, n * (q.nbytes - padding),
            n * (q.nbytes if held is None else held), q.nbytes, n * values, is_vector, n, active, sharing,
        )  # fmt: skip
        self.operands.append(operand)

    def tied(self, module: str) -> PackedWeight:
        table = next(o for o in self.operands if o.component == "embeddings")
        why = "tied: the embedding's matrix"
        q = QTensor(torch.empty(table.shape, dtype=self.dtype, device="meta"), None, BF16, table.shape)
        packed = Planned(q, self.platform)
        more = packed.held_bytes - q.nbytes  # in the order of the head, in which it is looked up too
        self.operands.append(replace(table, component="lm_head", why=why, stored=0, held=more, values=0, active=1))
        return packed

    def stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], shards: Sequence[Shard], scheme: Scheme
    ) -> QTensor:
        full = [self.prefix + name for name in names]
        beside = [self.source.beside(name) for name in full]
        key = tuple(shapes), tuple(shards), scheme, self.dtype, self.source.has_any, tuple(map(tuple, beside))
        if key not in self.known:
            own = replace(self, seen=set())
            try:
                q = Loader.stacked(own, names, shapes, shards, scheme)
            except OctavoError as error:
                self.refuse(error)
                self.seen.update(f"{name}.{end}" for name, ends in zip(full, beside, strict=True) for end, *_ in ends)
                shape = sum(n for n, _ in shapes), shapes[0][1]
                return QTensor(torch.empty(shape, dtype=self.dtype, device="meta"), None, BF16, shape)
            self.known[key] = q, [{s.removeprefix(n) for s in own.seen if s.startswith(f"{n}.")} for n in full]
        known: tuple[QTensor, list[set[str]]] = self.known[key]
        q, seen = known
        self.seen.update(name + end for name, ends in zip(full, seen, strict=True) for end in ends)
        return q

    def experts(self, stacks: Sequence[Matrices], count: int, active: int, local: range) -> list[PackedStack]:
        """Notes one of `local` equal experts for all; `every` one is looked at where they are stored."""
        return [self._experts(stack, len(local), active) for stack in stacks]

    def _experts(self, stack: Matrices, count: int, active: int) -> PackedStack:
        names_of_all = [f"{self.prefix}{e}.{name}" for e in range(count) for name in stack.names] if self.rules.ignore else []
        out = [name for name in names_of_all if self.rules.ignored(name)]  # one left out leaves out all; all are asked
        rules, kept = (QuantRules(), LEFT_OUT) if out else (self.rules, self.kept)
        path = self.prefix, *stack.names
        every = self.every and not self.source.has_any
        unlike = self.known.setdefault(path, []) if not self.source.has_any else []
        stacker = Stacker(count, self.prefix.removesuffix("."))
        one = replace(self, rules=rules, kept=kept, copies=count, active=active)
        stacker.put(0, cast("Planned", one.at(f"{self.prefix}0").weight(*stack)).q)
        for e in range(1, count) if every else unlike:
            here = one.at(f"{self.prefix}{e}")
            here.declare(stack.names, stack.shapes)
            try:
                stacker.put(e, here.stacked(*stack, rules.scheme).padded(self.platform.fp8_alignment))
            except OctavoError as error:
                if every:
                    unlike.append(e)  # which is wrong where a walk's scheme does not make them alike
                else:
                    self.refuse(error)
        return PackedStack()


def walk(
    model: Any,
    source: MetaSource,
    rules: QuantRules,
    platform: Platform,
    dtype: torch.dtype,
    known: Known,
    *,
    every: bool = False,
) -> Walk:
    """Loads `model` as the engine would. `known` is shared by the walks over a model's sources."""
    places = places_of(model)
    loader = Walker(source, platform, rules, dtype, tied_head=is_tied(places), known=known, every=every)
    for path, module in places:
        try:
            module.load(loader.at(path))
        except OctavoError as error:
            loader.refuse(error)
    try:
        if every:
            check_read(loader, model.ignored)
    except OctavoError as error:
        loader.problems.append(str(error))
    tables = [
        module.cos_sin for module in model.modules() if isinstance(module, RotaryEmbedding) and hasattr(module, "cos_sin")
    ]
    return Walk(loader.operands, loader.problems, rules, sum(table[0].nbytes for table in tables))
