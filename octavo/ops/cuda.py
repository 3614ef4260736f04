"""What an NVIDIA or AMD GPU prefers today: the FP8 product of torch's library. The rest is the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.reference import quantize_activation
from octavo.platform import Platform
from octavo.quant.qtensor import QTensor
from octavo.quant.scheme import Granularity

__all__ = ["LINEAR"]


class ScaledMM:
    """`torch._scaled_mm` with a scale a token and a scale a channel."""

    name = "torch._scaled_mm"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        if not q.scheme.quantized:
            return "the weight has no scale"
        if q.scheme.weight is Granularity.BLOCK:
            return "tiles of 128x128 need a kernel of their own"
        return None

    def pack(self, q: QTensor, platform: Platform) -> PackedScaledMM:
        return PackedScaledMM(q)


class PackedScaledMM:
    """Codes [N', K'] and channel scales [1, N'], padded as the matrix units want them."""

    def __init__(self, q: QTensor):
        assert q.scale is not None
        self.weight, (self.n, self.k), self.activation = q.data, q.shape, q.scheme.activation
        self.scale = F.pad(q.scale, (0, 0, 0, q.data.shape[0] - self.n), value=1.0).view(1, -1)
        self.held_bytes = q.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = quantize_activation(x, self.activation, self.weight.dtype)
        if padding := self.weight.shape[1] - self.k:
            codes = F.pad(codes.view(torch.uint8), (0, padding)).view(self.weight.dtype)
        y = torch._scaled_mm(codes, self.weight.mT, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16)
        return y[:, : self.n].to(x.dtype)


LINEAR = [ScaledMM()]
