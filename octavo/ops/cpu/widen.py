"""Fast FP8 to FP32 conversion on a CPU; torch's own looks up a table for every value.

An FP8 code and an IEEE half have the same layout (sign, exponent, mantissa) and differ in the exponent's bias. Shifted to the
half's bit positions, a code is a half that is smaller by a power of two; this holds for subnormals too. So widening takes two
integer operations and the half-to-float instruction. The caller folds the power of two into a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WIDEN_FACTOR", "round_to_fp8", "widen"]

# value of a code = widen(code) * factor
WIDEN_FACTOR = {torch.float8_e4m3fn: 256.0, torch.float8_e4m3fnuz: 128.0, torch.float8_e5m2: 1.0}


def widen(codes: Tensor, fp8_dtype: torch.dtype) -> Tensor:
    """FP32 of uint8 `codes`, smaller than their values by WIDEN_FACTOR. Codes must be finite, as clamped ones are."""
    # Signed, so that the sign extends into the upper bits; contiguous, so that a transposed view costs no extra pass.
    bits = codes.view(torch.int8).to(torch.int16, memory_format=torch.contiguous_format)
    if fp8_dtype is torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float()
    return bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16).float()


def round_to_fp8(x: Tensor, fp8_dtype: torch.dtype) -> Tensor:
    """Round FP32 `x`, within the dtype's range, to the values of the dtype, smaller by WIDEN_FACTOR."""
    return widen(x.to(fp8_dtype).view(torch.uint8), fp8_dtype)
