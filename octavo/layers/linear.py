"""Linear layers. A fused layer names the checkpoint's matrices that it stacks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.quant.formats import COMPANIONS, WHOLE, Shard, whole_unit
from octavo.quant.scheme import BLOCK
from octavo.weights import Loader

__all__ = [
    "ColumnParallelLinear",
    "GateUpLinear",
    "GatedMLP",
    "InnerSplit",
    "LMHead",
    "QKVLinear",
    "RowParallelLinear",
    "query_heads",
    "vocabulary_shard",
]


def query_heads(heads: int, tp: TensorParallel) -> int:
    """This rank's query heads, split as the output projection is. Raises OctavoError where they do not divide evenly."""
    _check_heads(heads, heads, tp, f"{heads} heads")
    return heads // tp.size


def _check_heads(heads: int, kv_heads: int, tp: TensorParallel, what: str) -> None:
    """Raises OctavoError where ranks cannot have as many query heads each, and whole key heads; it names the sizes that do."""
    sizes = [n for n in range(1, heads + 1) if heads % n == 0 and max(n, kv_heads) % min(n, kv_heads) == 0]
    if tp.size not in sizes:
        *others, last = map(str, sizes)
        some = f"{', '.join(others)} or {last}" if others else last
        raise OctavoError(f"{what} do not split over {tp.size} ranks; use a --tensor-parallel-size of {some}.")


UNIT = 16  # a multiple that FP8 units take, and BF16 ones are fastest with


@dataclass(frozen=True)
class InnerSplit:
    """How ranks split the inner dimension of an MLP, `size`: rows of its matrices `into`, columns of its matrix `out`.

    outer: the dimensions of what comes in and goes out. Parts differ by one unit at most: a tile, or a group, where one of the
    matrices has scales of them, so that codes are kept and bytes do not depend on the number of ranks; else UNIT, or 1 where
    that would leave a rank without any. With fewer tiles than ranks, the last ranks have none.
    """

    size: int
    into: tuple[str, ...]
    out: str
    outer: tuple[int, int]
    tp: TensorParallel

    def shards(self, loader: Loader, experts: Collection[str] = ("",)) -> tuple[Shard, Shard]:
        """This rank's part of the rows and of the columns. experts: paths, with a dot, of those that are split alike."""
        if self.tp.size == 1:
            return WHOLE, WHOLE
        unit, first = 1, next(iter(experts))
        sides = (self.into, (self.size, self.outer[0])), ((self.out,), (self.outer[1], self.size))
        for dim, (names, shape) in enumerate(sides):
            scheme = loader.rules.scheme_for([loader.prefix + expert + name for expert in experts for name in names])
            loader.declare([first + name for name in names], [shape] * len(names))
            unit = lcm(unit, *(whole_unit(loader, first + name, shape, dim, scheme) for name in names))
        if unit == 1 and self.size >= UNIT * self.tp.size:
            unit = UNIT
        rows, columns = (Shard(dim, self.tp.rank, self.tp.size, unit=unit, balanced=True) for dim in (0, 1))
        return rows, columns


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b, with W [N, K] the stack of the matrices `names`, whose rows are split over ranks.

    `heads[i]`, if given: the number of heads of matrix i. With more ranks than heads, ranks share a head. `inner`: the rows are
    an MLP's inner dimension.
    """

    reads_siblings = True  # the checkpoint has its parts' names beside the path of this module (qkv_proj), not below it

    def __init__(
        self,
        names: list[str],
        in_features: int,
        out_features: list[int],
        *,
        bias: bool,
        tp: TensorParallel,
        heads: list[int] | None = None,
        inner: InnerSplit | None = None,
    ):
        super().__init__()
        self.names, self.has_bias, self.inner = names, bias, inner
        self.shapes = [(n, in_features) for n in out_features]
        copies = [max(1, tp.size // h) for h in heads] if heads else [1] * len(names)
        self.shards: Sequence[Shard] = [Shard(0, tp.rank, tp.size, c) for c in copies]

    def load(self, loader: Loader) -> None:
        if self.inner is not None:
            self.shards = [self.inner.shards(loader)[0]] * len(self.names)
        self.weight = loader.weight(self.names, self.shapes, self.shards)
        self.bias: Tensor | None = None
        if self.has_bias:
            parts = [
                loader.vector(f"{name}.bias", shape[:1], shard)
                for name, shape, shard in zip(self.names, self.shapes, self.shards, strict=True)
            ]
            self.bias = torch.cat(parts)

    def forward(self, x: ops.Operand) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class QKVLinear(ColumnParallelLinear):
    """The query, key and value projections as one product. `forward` returns the three, [T, heads, head_dim] each."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool, tp: TensorParallel):
        _check_heads(heads, kv_heads, tp, f"{heads} heads with {kv_heads} of keys")
        super().__init__(
            ["q_proj", "k_proj", "v_proj"],
            hidden,
            [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim],
            bias=bias,
            tp=tp,
            heads=[heads, kv_heads, kv_heads],
        )
        self.head_dim = head_dim
        self.parts = [heads // tp.size, tp.part(kv_heads), tp.part(kv_heads)]

    def forward(self, x: ops.Operand) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        y = ops.linear(x, self.weight, self.bias)
        q, k, v = y.unflatten(1, (-1, self.head_dim)).split(self.parts, dim=1)
        return q, k, v


class RowParallelLinear(nn.Module):
    """y = x W^T + b, W's columns split over ranks. Partial products are summed over ranks, and b is added once.

    The output goes into an RMSNorm, which may apply the output's scales or, where there is no b, take the sum. `partial`: the
    caller sums over ranks. `inner`: the columns are an MLP's inner dimension.
    """

    reads_siblings = True

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp: TensorParallel,
        partial: bool = False,
        inner: InnerSplit | None = None,
    ):
        super().__init__()
        assert not (bias and partial), "each rank would add the bias"
        self.name, self.shape, self.has_bias, self.tp, self.partial = name, (out_features, in_features), bias, tp, partial
        self.inner = inner

    def load(self, loader: Loader) -> None:
        shard = Shard(1, self.tp.rank, self.tp.size) if self.inner is None else self.inner.shards(loader)[1]
        self.weight = loader.weight([self.name], [self.shape], [shard])
        self.bias = loader.vector(f"{self.name}.bias", self.shape[:1]) if self.has_bias else None

    def forward(self, x: ops.Operand) -> ops.Product:
        if self.partial:
            return ops.linear(x, self.weight)
        if self.tp.size == 1:
            return ops.linear_unscaled(x, self.weight) if self.bias is None else ops.linear(x, self.weight, self.bias)
        y = ops.linear(x, self.weight)
        return ops.Unsummed(y, self.tp) if self.bias is None else ops.all_reduce(y, self.tp).add_(self.bias)


class GateUpLinear(ColumnParallelLinear):
    """The gate and up projections as one product. `forward` returns silu(gate) * up in the forms that its readers need."""

    def __init__(self, inner: InnerSplit, *, bias: bool):
        super().__init__(list(inner.into), inner.outer[0], [inner.size] * 2, bias=bias, tp=inner.tp, inner=inner)

    def forward(self, x: ops.Operand, *readers: ops.Reader) -> ops.Activation:  # type: ignore[override]
        if isinstance(self.weight, ops.reference.EmptyWeight):
            return ops.Activation(self.weight(x))
        if self.bias is None:
            return ops.gated_linear(x, self.weight, readers)
        return ops.silu_mul(super().forward(x), readers)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). `partial`: as in RowParallelLinear."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool, tp: TensorParallel, partial: bool = False):
        super().__init__()
        inner = InnerSplit(intermediate, ("gate_proj", "up_proj"), "down_proj", (hidden, hidden), tp)
        self.gate_up_proj = GateUpLinear(inner, bias=bias)
        self.down_proj = RowParallelLinear("down_proj", intermediate, hidden, bias=bias, tp=tp, partial=partial, inner=inner)

    @property
    def readers(self) -> tuple[ops.Reader, ...]:
        """Readers of this layer's input."""
        return (self.gate_up_proj.weight,)

    def forward(self, x: ops.Operand, batch: ForwardBatch | None = None) -> ops.Product:
        """`batch` is unused; layers.moe takes it, and both are called alike."""
        y: ops.Product = self.down_proj(self.gate_up_proj(x, self.down_proj.weight))
        return y


def vocabulary_shard(vocab: int, tp: TensorParallel) -> Shard:
    """This rank's part of the vocabulary: whole 128-row tiles if every rank gets some, so that a quantized head splits."""
    if tp.size == 1:
        return WHOLE
    whole = Shard(0, tp.rank, tp.size, unit=BLOCK)
    return whole if whole.longest(vocab) * (tp.size - 1) < vocab else Shard(0, tp.rank, tp.size, unit=1)


class LMHead(nn.Module):
    """This rank's logits [rows, ceil(vocab / ranks)] in x's dtype, -inf past the end of the vocabulary.

    `tied`: the path of the embedding that shares its matrix.
    """

    reads_siblings = True

    def __init__(self, vocab: int, hidden: int, tp: TensorParallel, *, tied: str | None):
        super().__init__()
        self.shape, self.tied, self.shard = (vocab, hidden), tied, vocabulary_shard(vocab, tp)
        local = self.shard.slice(vocab)
        self.missing = self.shard.longest(vocab) - (local.stop - local.start)

    def load(self, loader: Loader) -> None:
        if self.tied is not None:
            for end in ("weight", "weight_packed", *COMPANIONS):
                loader.skip(f"lm_head.{end}")  # some checkpoints store it twice, or in codes that the embedding is not in
            self.weight = loader.tied(self.tied)
        else:
            self.weight = loader.weight(["lm_head"], [self.shape], [self.shard], is_head=True)

    def forward(self, x: ops.Operand) -> Tensor:
        logits = ops.linear(x, self.weight)
        return F.pad(logits, (0, self.missing), value=float("-inf")) if self.missing else logits
