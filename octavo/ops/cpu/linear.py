"""Matrix products on a CPU over codes widened in memory: results as with FP8 tensor cores, without FP8 instructions.

A code is exact in BF16 and in FP32. Products of codes are accumulated in FP32 and the two scales applied afterwards, as with
FP8 tensor cores. The held dtype is BF16 where the CPU multiplies it natively and FP32 elsewhere (Platform.widened_dtype).
Scales of 128x128 tiles cannot be applied after the sum, so block-scaled weights are held dequantized in FP32. Neither can
scales of INT4 groups, which are held dequantized in the widened dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.contract import (
    ANY_KIND,
    FEW_TOKENS,
    Operand,
    PackedWeight,
    not_taken,
    values_of,
)
from octavo.ops.cpu.widen import WIDEN_FACTOR, round_to_fp8
from octavo.ops.reference import SCALE_FLOOR
from octavo.platform import FP8_MAX, Platform
from octavo.quant.qtensor import QTensor, dequantize
from octavo.quant.scheme import BLOCK, Granularity, WeightDType

__all__ = ["Widened", "exact_scale", "rounded", "widened"]

TYPICAL_BATCH = 16  # oneDNN's layout is made for this number of rows and used for any


class Widened:
    """FP8 or INT4 codes or BF16 values held in `Platform.widened_dtype`, in oneDNN's layout."""

    name = "widened codes, oneDNN"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        if not torch.backends.mkldnn.is_available():
            return "this torch has no oneDNN"
        if platform.widened_dtype is None:
            return "nothing is widened in memory here"
        if (reason := not_taken(q.scheme, ANY_KIND)) is not None:
            return reason
        return (
            f"its codes are {q.data.dtype}" if q.scheme.dtype is WeightDType.FP8 and q.data.dtype not in WIDEN_FACTOR else None
        )

    def pack(self, q: QTensor, platform: Platform) -> PackedWidened:
        assert platform.widened_dtype is not None
        return PackedWidened(q, platform.widened_dtype)


def widened(q: QTensor, held: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(weight [N', K'] in `held`, channel scales [1, N]); block-scaled weights are dequantized to FP32 and have no scales.

    INT4 is dequantized to `held` and has no scales either.
    """
    if q.scheme.weight is Granularity.GROUP:
        return dequantize(q).to(held), None
    if q.scheme.weight is Granularity.BLOCK:
        return dequantize(q), None
    if q.scale is not None:
        # round_to_fp8 leaves out a power of two on activations; the weight's scale compensates for it.
        left_out = 1.0 if q.scheme.activation is None else WIDEN_FACTOR[q.data.dtype]
        return q.data.to(held), (q.scale * left_out).view(1, -1)
    return q.data.to(torch.float32 if q.data.dtype is torch.float32 else held), None


def exact_scale(scale: Tensor | None, fp8_dtype: torch.dtype) -> Tensor | None:
    """The scales of `widened` for activations that are not rounded, where they were made for such that are."""
    return None if scale is None else scale / WIDEN_FACTOR[fp8_dtype]


def rounded(x: Tensor, activation: Granularity | None, fp8_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(values of the codes of x [M, K], token scales [M, 1] not yet applied, or None); x itself if activations are not
    quantized.
    """
    if activation is None:
        return x, None
    limit = FP8_MAX[fp8_dtype]
    if activation is Granularity.BLOCK:
        groups = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        scale = (groups.abs().amax(-1, keepdim=True) / limit).clamp_(min=SCALE_FLOOR)
        codes = round_to_fp8((groups / scale).clamp_(-limit, limit), fp8_dtype)
        return codes.mul_(scale * WIDEN_FACTOR[fp8_dtype]).flatten(1)[:, : x.shape[1]], None
    values = x.to(torch.float32, copy=True)
    scale = values.abs().amax(1, keepdim=True).div_(limit).clamp_(min=SCALE_FLOOR)
    return round_to_fp8(values.div_(scale), fp8_dtype), scale  # at most the limit, up to rounding, which the cast undoes


class PackedWidened(PackedWeight):
    """A weight [N, K] in oneDNN's layout, and its channel scales [1, N]."""

    def __init__(self, q: QTensor, held: torch.dtype):
        (self.n, self.k), self.activation, self.of_few = q.shape, q.scheme.activation, q.scheme.activation_of(FEW_TOKENS)
        dense, self.scale = widened(q, held)
        self.held, self.fp8_dtype = dense.dtype, q.data.dtype
        self.padding = dense.shape[1] - self.k
        self.laid_out = self.held is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dense = dense.contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(dense, TYPICAL_BATCH) if self.laid_out else dense
        self.held_bytes = dense.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __call__(self, x: Operand) -> Tensor:
        x = values_of(x)
        activation = self.of_few if len(x) <= FEW_TOKENS else self.activation
        values, scale = rounded(x, activation, self.fp8_dtype)
        by_channel = self.scale if activation is self.activation else exact_scale(self.scale, self.fp8_dtype)
        y = self._product(values.to(self.held))
        if by_channel is None:
            return y.to(x.dtype)
        y = y if y.dtype is torch.float32 else y.float()
        return (y if scale is None else y.mul_(scale)).mul_(by_channel).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if self.padding:
            x = F.pad(x, (0, self.padding))
        if self.laid_out:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        else:
            y = F.linear(x, self.weight)
        return y[:, : self.n] if y.shape[1] > self.n else y
