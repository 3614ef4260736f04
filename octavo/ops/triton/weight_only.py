"""Products by FP8 codes whose activations stay in BF16 (W8A16).

A code is widened to BF16, which holds it exactly, in the registers of the tensor core's A operand: the weight's rows. So the
weight is read as it is stored, and the product costs what one in BF16 computes. Up to MAX_TOKENS tokens are multiplied so; for
more, some rows at a time are widened in memory that stays in the L2 cache, and the library multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import device_units, has_packed_arithmetic, launch, pipeline, power_of_2, release, wait
from octavo.ops.triton.linear import workspace

__all__ = ["MAX_TOKENS", "weight_only_linear", "widen_codes"]

MAX_TOKENS = 512
PART = 1 << 23  # values widened at a time: 16 MiB


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


@triton.jit(do_not_specialize=["tokens"])
def _weight_only(
    x, w, w_scale, out, parts, counters, tokens, n, width, size, per_split,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of the weight have `width` codes, those of x `size` values."""
    tile, of_tokens, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, token, depth = tile * BN + tl.arange(0, BN), of_tokens * BM + tl.arange(0, BM), tl.arange(0, BK)
    row_ok, token_ok = rows < n, token < tokens
    w_at = w + tl.where(row_ok, rows, 0).to(tl.int64)[:, None] * width + depth[None, :]
    x_at = x + token.to(tl.int64)[:, None] * size + depth[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    first, stop = split * per_split, min((split + 1) * per_split, tl.cdiv(width, BK))
    release(PDL)
    wait(PDL)
    for step in tl.range(first, stop, num_stages=STAGES):
        if EVEN:
            a = tl.load(w_at + step * BK)
            b = tl.load(x_at + step * BK, mask=token_ok[:, None], other=0.0)
        else:
            at = step * BK + depth
            a = tl.load(w_at + step * BK, mask=(at < width)[None, :], other=0.0)
            b = tl.load(x_at + step * BK, mask=token_ok[:, None] & (at < size)[None, :], other=0.0)
        acc = tl.dot(widen_codes(a, ASM), tl.trans(b), acc)
    if SPLIT > 1:
        at = of_tokens * tl.num_programs(0) + tile
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        partials = parts + at.to(tl.int64) * SPLIT * BN * BM
        tl.store(partials + split * BN * BM + place, acc)
        tl.debug_barrier()  # all threads' partial sums are written before the CTA counts itself
        if tl.atomic_add(counters + at, 1, sem="acq_rel", scope="gpu") != SPLIT - 1:
            return
        tl.store(counters + at, 0)  # reset for the next product
        acc = tl.zeros((BN, BM), tl.float32)
        for part in tl.static_range(SPLIT):
            acc += tl.load(partials + part * BN * BM + place, cache_modifier=".cg")
    y = acc * tl.load(w_scale + rows, mask=row_ok, other=0.0)[:, None]
    to = out + token.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(to, y.to(out.dtype.element_ty), mask=row_ok[:, None] & token_ok[None, :])


@triton.jit
def _widen(w, out, count, BLOCK: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    release(PDL)
    wait(PDL)
    codes = tl.load(w + at, mask=at < count, other=0.0)
    tl.store(out + at, widen_codes(codes, ASM), mask=at < count)


def weight_only_linear(
    x: Tensor, w: Tensor, w_scale: Tensor, n: int, config: dict[str, int] | None = None, most: int = MAX_TOKENS
) -> Tensor:
    """BF16 [M, n] of values x [M, K], BF16, and E4M3 codes [N', K'] with FP32 channel scales [n]. Codes past K are zeros.

    config: overrides the choice of tile sizes. most: the number of tokens up to which codes are widened in registers.
    """
    tokens, size = x.shape
    width, asm = w.shape[1], has_packed_arithmetic() and w.dtype is torch.float8_e4m3fn
    out = torch.empty(tokens, n, dtype=torch.bfloat16, device=w.device)
    if not tokens:
        return out
    x = x.contiguous()
    if tokens > most:
        return _by_library(F.pad(x, (0, width - size)), w, w_scale, out, asm)
    c = _shape(tokens, n, width) | (config or {})
    bn, bm, steps = c["BN"], c["BM"], triton.cdiv(width, c["BK"])
    per_split = triton.cdiv(steps, min(c["split"], steps))
    split, tiles, of_tokens = triton.cdiv(steps, per_split), triton.cdiv(n, bn), triton.cdiv(tokens, bm)
    count = tiles * of_tokens
    parts, counters = workspace(w.device, count * split * bn * bm, count) if split > 1 else (out, out)
    launch(_weight_only, (tiles, of_tokens, split),
        x, w, w_scale, out, parts, counters, tokens, n, width, size, per_split,
        BN=bn, BM=bm, BK=c["BK"], SPLIT=split, EVEN=width % c["BK"] == 0 and size == width, ASM=asm,
        STAGES=pipeline(c["stages"]), num_warps=c["warps"],
    )  # fmt: skip
    return out


def _by_library(x: Tensor, codes: Tensor, w_scale: Tensor, out: Tensor, asm: bool) -> Tensor:
    """The product with scales applied to the library's BF16 result, which rounds twice."""
    (n, width), block = (out.shape[1], codes.shape[1]), 2048
    rows = max(1, min(n, PART // width))
    wide = torch.empty(rows, width, dtype=torch.bfloat16, device=x.device)
    for start in range(0, n, rows):
        part = codes[start : min(start + rows, n)]
        launch(_widen, (triton.cdiv(part.numel(), block),),
            part, wide, part.numel(), BLOCK=block, ASM=asm, num_warps=4,
        )  # fmt: skip
        product = F.linear(x, wide[: len(part)])
        torch.mul(product, w_scale[start : start + len(part)].view(1, -1), out=out[:, start : start + len(part)])
    return out


def _shape(tokens: int, n: int, width: int) -> dict[str, int]:
    """Tile sizes, and CTAs along K."""
    if tokens <= 32:
        bm = power_of_2(tokens, 16)
        split = power_of_2(max(1, 2 * device_units() // triton.cdiv(n, 64)))
        return {"BN": 64, "BM": bm, "BK": 128, "warps": 4, "stages": 4, "split": split}
    bm = 64 if tokens <= 64 else 128
    tiles = triton.cdiv(n, 128) * triton.cdiv(tokens, bm)
    return {"BN": 128, "BM": bm, "BK": 64, "warps": 8, "stages": 4, "split": min(4, max(1, device_units() // tiles))}
