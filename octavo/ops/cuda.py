"""What an NVIDIA GPU prefers: Triton kernels where memory is the limit, torch's library for products with many tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.contract import Activation, PackedWeight, Quantized
from octavo.ops.triton.attention import attention
from octavo.ops.triton.elementwise import quantize, rms_norm, silu_mul
from octavo.ops.triton.launch import configure
from octavo.ops.triton.linear import MOST_TOKENS, small_linear
from octavo.ops.triton.rope import rope_write_kv
from octavo.platform import Platform
from octavo.quant.qtensor import QTensor
from octavo.quant.scheme import Granularity

__all__ = ["LINEAR", "attention", "configure", "rms_norm", "rope_write_kv", "silu_mul"]


class ScaledMM:
    """A scale a token and a scale a channel: our kernel for few tokens, `torch._scaled_mm` for many."""

    name = "Triton small-M, torch._scaled_mm"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        if not q.scheme.quantized:
            return "the weight has no scale"
        if q.scheme.weight is Granularity.BLOCK:
            return "tiles of 128x128 need a kernel of their own"
        return None

    def pack(self, q: QTensor, platform: Platform) -> PackedScaledMM:
        return PackedScaledMM(q)


class PackedScaledMM(PackedWeight):
    """Codes [N', K'] and channel scales [1, N'], padded as the matrix units want them."""

    def __init__(self, q: QTensor):
        assert q.scale is not None
        self.weight, (self.n, self.k) = q.data, q.shape
        self.scale = F.pad(q.scale, (0, 0, 0, q.data.shape[0] - self.n), value=1.0).view(1, -1)
        self.held_bytes = q.nbytes
        self.reads, self.width = q.data.dtype, q.data.shape[1]

    def __call__(self, x: Activation) -> Tensor:
        dtype = torch.bfloat16 if isinstance(x, Quantized) else x.dtype
        given = x if isinstance(x, Quantized) else quantize(x, self.weight.dtype, self.width)
        if given.codes.shape[0] <= MOST_TOKENS:
            return small_linear(given, self.weight, self.scale, self.n).to(dtype)
        y = torch._scaled_mm(given.codes, self.weight.mT, scale_a=given.scale, scale_b=self.scale, out_dtype=torch.bfloat16)
        return y[:, : self.n].to(dtype)


class Dense:
    """BF16 weights: the library's product."""

    name = "torch"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return "the weight is FP8" if q.scheme.quantized else None

    def pack(self, q: QTensor, platform: Platform) -> PackedDense:
        return PackedDense(q)


class PackedDense(PackedWeight):
    def __init__(self, q: QTensor):
        self.weight, self.held_bytes = q.data, q.nbytes

    def __call__(self, x: Activation) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight.to(x.dtype))


LINEAR = [ScaledMM(), Dense()]
