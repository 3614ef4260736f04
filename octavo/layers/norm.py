"""RMSNorm."""

from __future__ import annotations

from torch import Tensor, nn

from octavo import ops
from octavo.weights import Loader

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """(norm(x + residual), x + residual); without a residual, x is the residual from here on.

    `readers` are all that read the first, weights or None for a reader of dense values (`ops.rms_norm`).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", (self.size,))

    def forward(self, x: ops.Product, residual: Tensor | None = None, *readers: ops.Reader) -> tuple[ops.Activation, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, residual, readers)
