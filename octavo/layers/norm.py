"""RMSNorm."""

from __future__ import annotations

from torch import Tensor, nn

from octavo import ops
from octavo.weights import Loader

__all__ = ["HeadNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """(norm(x + residual), x + residual); without a residual, x is the residual from here on."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", (self.size,))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, residual)


class HeadNorm(RMSNorm):
    """RMSNorm of each head of x [T, H, D] by itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]
