"""RMSNorm, and the weights of a LayerNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.quant.formats import Shard
from octavo.weights import Loader

__all__ = ["AllHeadsNorm", "LayerNorm", "RMSNorm", "norm_all_heads"]


class RMSNorm(nn.Module):
    """Returns (norm(x + residual), x + residual). Without a residual, x becomes the residual.

    `readers`: all readers of the first output; a weight, or None for a reader of dense values (`ops.rms_norm`).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", (self.size,))

    def forward(self, x: ops.Product, residual: Tensor | None = None, *readers: ops.Reader) -> tuple[ops.Activation, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, residual, readers)


class LayerNorm(nn.Module):
    """A LayerNorm's weight and bias, for the op that applies it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def load(self, loader: Loader) -> None:
        self.weight, self.bias = loader.vector("weight", (self.size,)), loader.vector("bias", (self.size,))

    @property
    def norm(self) -> ops.Norm:
        return ops.Norm(self.weight, self.eps, self.bias)


class AllHeadsNorm(nn.Module):
    """RMSNorm over all `heads` of a token together, some of which this rank has. `norm_all_heads` applies it."""

    def __init__(self, heads: int, head_dim: int, eps: float, tp: TensorParallel):
        super().__init__()
        self.copies = max(1, tp.size // heads)  # ranks that share a head, as in QKVLinear
        self.size, self.eps, self.shard = heads * head_dim, eps, Shard(0, tp.rank, tp.size, self.copies)

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", (self.size,), self.shard)


def norm_all_heads(given: Sequence[Tensor], norms: Sequence[AllHeadsNorm], tp: TensorParallel) -> list[Tensor]:
    """Applies `norms` to the tensors `given` [T, this rank's heads, D] one by one, in the same shape and dtype.

    The mean of squares is over the heads of all ranks, which exchange one number per token and tensor.
    """
    if tp.size == 1:
        return [_normed(x, norm) for x, norm in zip(given, norms, strict=True)]
    wide = [x.float() for x in given]
    squares = [x.square().sum((1, 2)) / norm.copies for x, norm in zip(wide, norms, strict=True)]
    sums = ops.all_reduce(torch.stack(squares, 1), tp)
    out = []
    for i, (x, norm) in enumerate(zip(wide, norms, strict=True)):
        scale = torch.rsqrt(sums[:, i, None, None] / norm.size + norm.eps)
        out.append((x * scale * norm.weight.float().view(x.shape[1:])).to(given[i].dtype))
    return out


def _normed(x: Tensor, norm: AllHeadsNorm) -> Tensor:
    return ops.rms_norm(x.flatten(1), norm.weight, norm.eps)[0].values().view(x.shape)
