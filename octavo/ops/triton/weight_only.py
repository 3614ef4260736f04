"""FP8 weights and activations that stay as they are (W8A16), on FP8 tensor cores.

A token becomes two rows of codes: its own, and those of what rounding it has left, each with a scale. Their sum keeps a value
to within 2^-8 of itself, as BF16 does, so the sum of both rows' products is the token's product in BF16, by a weight that is
read as it is stored. Few tokens are bound by reading it and cost what they cost in codes; many cost twice as much, as in
BF16.

Stacks of experts, whose rows are sorted, widen the codes in registers instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.contract import Quantized
from octavo.ops.triton.launch import has_packed_arithmetic, launch, power_of_2, release, scale_of, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["codes_in_pairs", "widen_codes", "widened"]

SMALLEST_SCALE = 1e-30  # of a row: zeros must not be divided by zero
REST = 16  # a code keeps this part of a value at least, so the remainder in sixteenths of the scale is in range
WIDENED = 4096  # codes that a CTA widens


@triton.jit
def widen_codes(codes, ASM: tl.constexpr):
    """Codes in BF16: exact. ASM: four E4M3FN codes at a time.

    Moved to BF16's position a code is the number times 2^-120, subnormal ones too; a product with 2^120 makes it the number.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b, c; mov.b32 c, 0x7B807B80;"
            "prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;"
            "shr.b32 $0, a, 4; and.b32 $0, $0, 0x07F007F0; lop3.b32 a, a, 0x80008000, $0, 0xEA; mul.bf16x2 $0, a, c;"
            "shr.b32 $1, b, 4; and.b32 $1, $1, 0x07F007F0; lop3.b32 b, b, 0x80008000, $1, 0xEA; mul.bf16x2 $1, b, c;}",
            "=&r,=&r,r", [codes.to(tl.uint8, bitcast=True)], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return codes.to(tl.bfloat16)


@triton.jit
def _codes_in_pairs(
    x, out, scale, size, stride, width, of_token, of_rest,
    LIMIT: tl.constexpr, FLOOR: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token's rows are at of_token times its number, and of_rest behind that. What a product with the scale's reciprocal
    rounds otherwise than a division is in the rest."""
    token, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    release(PDL)
    wait(PDL)
    y = tl.load(x + token * stride + cols, mask=cols < size, other=0.0).to(tl.float32)
    s = scale_of(tl.max(tl.abs(y), 0), LIMIT, FLOOR)
    y *= 1 / s
    for part in tl.static_range(2):
        row = token * of_token + part * of_rest
        codes = to_fp8(y, LIMIT, out.dtype.element_ty)
        tl.store(scale + row, s)
        tl.store(out + row * width + cols, codes, mask=cols < width)
        y = (y - codes.to(tl.float32)) * REST
        s /= REST


def codes_in_pairs(x: Tensor, fp8: torch.dtype, width: int, *, adjacent: bool) -> Quantized:
    """x [M, K] as codes [2M, width] and scales [2M, 1]: a token is the sum of two rows, 2t and 2t + 1 if `adjacent`, else t and
    M + t."""
    tokens, size = x.shape
    codes = torch.empty(2 * tokens, width, dtype=fp8, device=x.device)
    scale = torch.empty(2 * tokens, 1, dtype=torch.float32, device=x.device)
    if tokens:
        block = power_of_2(max(size, width))
        launch(_codes_in_pairs, (tokens,),
            x, codes, scale, size, x.stride(0), width, *((2, 1) if adjacent else (1, tokens)), LIMIT=FP8_MAX[fp8],
            FLOOR=SMALLEST_SCALE, REST=REST, BLOCK=block, num_warps=min(32, max(1, block // 256)),
        )  # fmt: skip
    return Quantized(codes, scale)


@triton.jit
def _widen(codes, out, size, BLOCK: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    release(PDL)
    wide = widen_codes(tl.load(codes + at, mask=at < size, other=0.0), ASM)
    wait(PDL)
    tl.store(out + at, wide, mask=at < size)


def widened(codes: Tensor) -> Tensor:
    """Codes [N, K], contiguous, as BF16 values, exactly."""
    out = torch.empty_like(codes, dtype=torch.bfloat16)
    if codes.numel():
        exact = has_packed_arithmetic() and codes.dtype is torch.float8_e4m3fn
        launch(_widen, (triton.cdiv(codes.numel(), WIDENED),), codes, out, codes.numel(), BLOCK=WIDENED, ASM=exact)
    return out
