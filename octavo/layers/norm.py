"""RMSNorm."""

from __future__ import annotations

from torch import Tensor, nn

from octavo import ops
from octavo.weights import Loader

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """(norm(x + residual), x + residual); without a residual, x is the residual from here on.

    `feeds` is the weight that reads the first: it may then be quantized as that one reads it.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", (self.size,))

    def forward(
        self, x: ops.Product, residual: Tensor | None = None, feeds: ops.PackedWeight | None = None
    ) -> tuple[ops.Activation, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, residual, feeds)
