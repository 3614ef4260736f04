"""Linear layers. A fused layer names the checkpoint's matrices that it stacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.quant.formats import WHOLE, Shard
from octavo.quant.scheme import BLOCK
from octavo.weights import Loader

__all__ = [
    "ColumnParallelLinear",
    "GateUpLinear",
    "GatedMLP",
    "LMHead",
    "QKVLinear",
    "RowParallelLinear",
    "query_heads",
    "vocabulary_shard",
]


def query_heads(heads: int, tp: TensorParallel) -> int:
    """This rank's query heads, split as the output projection is. Raises OctavoError where they do not divide evenly."""
    if heads % tp.size:
        raise _do_not_split(heads, tp)
    return heads // tp.size


def _copies(heads: int, tp: TensorParallel) -> int:
    """The number of ranks that share a head. Raises OctavoError where a rank would have part of one."""
    if max(tp.size, heads) % min(tp.size, heads):
        raise _do_not_split(heads, tp)
    return max(1, tp.size // heads)


def _do_not_split(heads: int, tp: TensorParallel) -> OctavoError:
    return OctavoError(f"{heads} heads do not split over {tp.size} ranks; use a --tensor-parallel-size that does.")


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b, with W [N, K] the stack of the matrices `names`, whose rows are split over ranks.

    `heads[i]`, if given: the number of heads of matrix i. With more ranks than heads, ranks share a head.
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
    ):
        super().__init__()
        self.names, self.has_bias = names, bias
        self.shapes = [(n, in_features) for n in out_features]
        copies = [_copies(h, tp) for h in heads] if heads else [1] * len(names)
        self.shards = [Shard(0, tp.rank, tp.size, c) for c in copies]

    def load(self, loader: Loader) -> None:
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
        local_heads = query_heads(heads, tp)  # keys and values may be shared by ranks
        super().__init__(
            ["q_proj", "k_proj", "v_proj"],
            hidden,
            [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim],
            bias=bias,
            tp=tp,
            heads=[heads, kv_heads, kv_heads],
        )
        self.head_dim = head_dim
        self.parts = [local_heads, tp.part(kv_heads), tp.part(kv_heads)]

    def forward(self, x: ops.Operand) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        y = ops.linear(x, self.weight, self.bias)
        q, k, v = y.unflatten(1, (-1, self.head_dim)).split(self.parts, dim=1)
        return q, k, v


class RowParallelLinear(nn.Module):
    """y = x W^T + b, W's columns split over ranks. Partial products are summed over ranks, and b is added once.

    The output goes into an RMSNorm, which may apply the output's scales. `partial`: the caller sums over ranks.
    """

    reads_siblings = True

    def __init__(
        self, name: str, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel, partial: bool = False
    ):
        super().__init__()
        assert not (bias and partial), "each rank would add the bias"
        self.name, self.shape, self.has_bias, self.tp, self.partial = name, (out_features, in_features), bias, tp, partial

    def load(self, loader: Loader) -> None:
        self.weight = loader.weight([self.name], [self.shape], [Shard(1, self.tp.rank, self.tp.size)])
        self.bias = loader.vector(f"{self.name}.bias", self.shape[:1]) if self.has_bias else None

    def forward(self, x: ops.Operand) -> ops.Product:
        if self.partial:
            return ops.linear(x, self.weight)
        if self.tp.size == 1:
            return ops.linear_unscaled(x, self.weight) if self.bias is None else ops.linear(x, self.weight, self.bias)
        y = ops.all_reduce(ops.linear(x, self.weight), self.tp)
        return y if self.bias is None else y.add_(self.bias)


class GateUpLinear(ColumnParallelLinear):
    """The gate and up projections as one product. `forward` returns silu(gate) * up in the forms that its readers need."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool, tp: TensorParallel):
        super().__init__(["gate_proj", "up_proj"], hidden, [intermediate] * 2, bias=bias, tp=tp)

    def forward(self, x: ops.Operand, *readers: ops.Reader) -> ops.Activation:  # type: ignore[override]
        if self.bias is None:
            return ops.gated_linear(x, self.weight, readers)
        return ops.silu_mul(super().forward(x), readers)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). `partial`: as in RowParallelLinear."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool, tp: TensorParallel, partial: bool = False):
        super().__init__()
        self.gate_up_proj = GateUpLinear(hidden, intermediate, bias=bias, tp=tp)
        self.down_proj = RowParallelLinear("down_proj", intermediate, hidden, bias=bias, tp=tp, partial=partial)

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
            loader.skip("lm_head.weight")  # some checkpoints store it twice
            self.weight = loader.tied(self.tied)
        else:
            self.weight = loader.weight(["lm_head"], [self.shape], [self.shard], is_head=True)

    def forward(self, x: ops.Operand) -> Tensor:
        logits = ops.linear(x, self.weight)
        return F.pad(logits, (0, self.missing), value=float("-inf")) if self.missing else logits
