"""Products by packed INT4 weights, two codes in a byte: dense weights [N, K] and expert stacks [E, N, K].

W4A16: a stored code (0 to 15) becomes the low mantissa bits of BF16's 128; subtracting 136 gives -8 to 7. The value is
multiplied by its group's scale, rounded to BF16, and multiplied with BF16 activations. All of this happens in the registers
that hold the tensor core's A operand, the weight's rows. A 16-bit word holds four codes, and a tile of words is unpacked one
code of each word at a time: `plane` s holds a row's values s, s + 4, s + 8, ... Activations are permuted to planes too: in the
kernel for few rows, by a kernel before it for many.

W4A8: activations are quantized to FP8 with one scale per token, which costs as much accuracy as in the other FP8 schemes (about
2.6% of a product's norm). The weight loses nothing, since -8 to 7 are exact in e4m3. The sum over each group is scaled and
accumulated in FP32.

All weights use W4A16 except expert stacks in groups of 128 with more than 32 rows per expert on average, which use W4A8.
Measured on one H200, in microseconds, for 384 experts of [7168 -> 4096] with 8 per token, and a dense [7000 -> 512]:

    tokens                  1    64  1024  2048  4096  8192    dense: 1    64  4096
    groups of 32   W4A16   69  1762  2905  3419  5733 10102         5.9   8.8   102
                   W4A8   113  2391  3898       12296 22371          34    59   215
    groups of 128  W4A16       1377  2420  3702  7256 11573         6.6   9.5   120
                   W4A8        1568  2239  2707  3837  7316          21    27   126

With groups of 32, a scale for every 32 products costs what FP8 tensor cores gain. At 1024 tokens, 8% do not justify another
rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.contract import Dispatch, Quantized
from octavo.ops.reference import SCALE_FLOOR
from octavo.ops.triton.launch import (
    device_units,
    has_packed_arithmetic,
    launch,
    pipeline,
    power_of_2,
    release,
    scale_of,
    shared_memory,
    to_fp8,
    wait,
)
from octavo.ops.triton.linear import workspace
from octavo.platform import FP8_MAX

__all__ = ["GROUPS", "int4_product", "laid_out", "planes", "quantize_in_groups", "uses_w4a8"]

GROUPS = (32, 128)
STEP = 128  # values of a row per loop iteration of a CTA
SUBNORMAL = {torch.float8_e4m3fn: 2.0**9, torch.float8_e4m3fnuz: 2.0**10}  # codes, as FP8 subnormals, times this are -8 to 7


@triton.jit
def _biased(v, PLANE: tl.constexpr):
    """128 + code, in BF16, for code number PLANE of each 16-bit word; one instruction handles two words."""
    if PLANE == 0:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xea;", "=r,r", [v], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif PLANE == 1:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.b32 t, $1, 4; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea;}",
            "=r,r", [v], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif PLANE == 2:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.b32 t, $1, 8; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea;}",
            "=r,r", [v], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.b32 t, $1, 12; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea;}",
            "=r,r", [v], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _values(v, scale, PLANE: tl.constexpr, ASM: tl.constexpr):
    """BF16 values of plane PLANE of words v, times the scales (BF16 bits in int16): the exact product, rounded once, in both
    variants.
    """
    if ASM:
        return (_biased(v, PLANE) - 136.0) * scale.to(tl.bfloat16, bitcast=True)
    else:
        return ((((v >> (4 * PLANE)) & 15) - 8).to(tl.float32) * _fp32(scale)).to(tl.bfloat16)


@triton.jit
def _fp32(x):
    """BF16 bits in an integer, converted to FP32."""
    return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _fp8_codes(v, PLANE: tl.constexpr, ASM: tl.constexpr):
    """Code number PLANE of each byte, minus 8, as an FP8 subnormal: sign and magnitude."""
    if ASM and PLANE == 0:
        return tl.inline_asm_elementwise(
            "{.reg .b32 n, m, t; lop3.b32 n, $1, 0x08080808, 0, 0x0c; shr.b32 n, n, 3; mul.lo.u32 m, n, 7;"
            "lop3.b32 t, $1, 0x07070707, m, 0x6a; mad.lo.u32 $0, n, 129, t;}",
            "=r,r", [v], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    elif ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 n, m, t, h; shr.b32 h, $1, 4; lop3.b32 n, h, 0x08080808, 0, 0x0c; shr.b32 n, n, 3; mul.lo.u32 m, n, 7;"
            "lop3.b32 t, h, 0x07070707, m, 0x6a; mad.lo.u32 $0, n, 129, t;}",
            "=r,r", [v], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        code = (v >> (4 * PLANE)) & 15
        negative = (code >> 3) ^ 1
        return (((code & 7) ^ (negative * 7)) + negative * 129).to(tl.uint8)


@triton.jit
def _concat(a, b, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, 2 * WIDTH]: the columns of a, then those of b. No data moves between threads."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, 2 * WIDTH))


@triton.jit
def _halves(pair):
    """The two BF16 halves of each 32-bit word, as 16-bit words."""
    return (pair & 0xFFFF).to(tl.int16), ((pair >> 16) & 0xFFFF).to(tl.int16)


@triton.jit
def _quarters(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Split x into its four column blocks [ROWS, WIDTH]."""
    even, odd = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, 2, WIDTH)), (0, 3, 1, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["tokens"])
def _w4a16(
    x, w, scales, out, order, starts, parts, counters, experts, tokens, n, words, pairs, size, per_split,
    OF_TOKENS: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, PLANAR: tl.constexpr, SPLIT: tl.constexpr,
    ASM: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scales are loaded as 32-bit words of two groups. Rows of x have `size` values; PLANAR: `planes` has permuted them."""
    release(PDL)
    wait(PDL)
    slot, split = tl.program_id(1), tl.program_id(2)
    expert, place, place_ok = _rows(starts, slot, experts, tokens, BM, EXPERTS)
    if expert >= experts:
        return
    channel = tl.program_id(0) * BN + tl.arange(0, BN)
    channel_ok = channel < n
    row = (tl.load(order + place, mask=place_ok, other=0) // TOP_K if OF_TOKENS else place).to(tl.int64)
    depth = tl.arange(0, TILE)
    w_row = (expert.to(tl.int64) * n + tl.where(channel_ok, channel, 0))[:, None]
    w_at = w + w_row * words + depth[None, :]
    PAIRS: tl.constexpr = max(2 * TILE // GROUP, 1)
    scale_at = scales + w_row * pairs + tl.arange(0, PAIRS)[None, :]
    wide = tl.arange(0, 4 * TILE)
    x_at = x + row[:, None] * size + wide[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    TILES: tl.constexpr = 1 if GROUP == 32 else 2  # tiles per step: a step loads whole pairs of scales
    start, stop = 0, words // (TILES * TILE)
    if SPLIT > 1:
        start, stop = split * per_split, min((split + 1) * per_split, stop)
    for step in tl.range(start, stop, num_stages=STAGES):
        one, other = _halves(tl.load(scale_at + step * PAIRS))
        for t in tl.static_range(TILES):
            if GROUP == 32:
                scale = tl.reshape(tl.join(one, other), (BN, 2 * PAIRS, 1))
                scale = tl.reshape(tl.broadcast_to(scale, (BN, 2 * PAIRS, GROUP // 4)), (BN, TILE))
            else:
                scale = tl.broadcast_to(one if t == 0 else other, (BN, TILE))
            tile = step * TILES + t
            v = tl.load(w_at + tile * TILE)
            low = _concat(_values(v, scale, 0, ASM), _values(v, scale, 1, ASM), BN, TILE)
            high = _concat(_values(v, scale, 2, ASM), _values(v, scale, 3, ASM), BN, TILE)
            if PLANAR:
                b = tl.load(x_at + tile * (4 * TILE), mask=place_ok[:, None], other=0.0)
            else:
                mask = place_ok[:, None] & (tile * (4 * TILE) + wide < size)[None, :]
                b = tl.load(x_at + tile * (4 * TILE), mask=mask, other=0.0)
                b = tl.reshape(tl.permute(tl.reshape(b, (BM, TILE, 4)), (0, 2, 1)), (BM, 4 * TILE))
            acc = tl.dot(_concat(low, high, BN, 2 * TILE), tl.trans(b), acc)
    if SPLIT > 1:
        at = slot * tl.num_programs(0) + tl.program_id(0)
        within = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        partials = parts + at.to(tl.int64) * SPLIT * BN * BM
        tl.store(partials + split * BN * BM + within, acc)
        tl.debug_barrier()  # all threads' partial sums are written before the CTA counts itself
        if tl.atomic_add(counters + at, 1, sem="acq_rel", scope="gpu") != SPLIT - 1:
            return
        tl.store(counters + at, 0)  # reset for the next product
        acc = tl.zeros((BN, BM), tl.float32)
        for part in tl.static_range(SPLIT):
            acc += tl.load(partials + part * BN * BM + within, cache_modifier=".cg")
    to = out + place.to(tl.int64)[None, :] * n + channel[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=channel_ok[:, None] & place_ok[None, :])


@triton.jit
def _rows(starts, slot, experts, tokens, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """A CTA's expert, the sorted positions [BM] of its rows, and a mask of those that exist. Without `starts` all rows are one
    expert's.

    Tiles are numbered over all experts' rows; for a number past the last tile the expert is `experts`.
    """
    if starts is None:
        expert, place, stop = slot * 0, slot * BM + tl.arange(0, BM), tokens
    else:
        e = tl.arange(0, EXPERTS)
        first = tl.load(starts + e, mask=e < experts, other=0)
        tiles = tl.cdiv(tl.load(starts + e + 1, mask=e < experts, other=0) - first, BM)
        before = tl.cumsum(tiles, 0) <= slot
        expert = tl.sum(before.to(tl.int32), 0)
        expert = tl.minimum(expert, experts)  # padding to a power of 2 adds no tiles
        tile = slot - tl.sum(tl.where(before, tiles, 0), 0)
        place = tl.load(starts + expert) + tile * BM + tl.arange(0, BM)
        stop = tl.load(starts + tl.minimum(expert + 1, experts))
    return expert, place, place < stop


@triton.jit(do_not_specialize=["tokens"])
def _w4a8(
    x, x_scale, w, scales, out, order, starts, experts, tokens, n, width, pairs,
    OF_TOKENS: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    GROUP: tl.constexpr, SUBNORMAL: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x's codes are laid out by quantize_in_groups: in each group the even values, then the odd values."""
    release(PDL)
    wait(PDL)
    slot = tl.program_id(1)
    expert, place, place_ok = _rows(starts, slot, experts, tokens, BM, EXPERTS)
    if expert >= experts:
        return
    channel = tl.program_id(0) * BN + tl.arange(0, BN)
    channel_ok = channel < n
    row = (tl.load(order + place, mask=place_ok, other=0) // TOP_K if OF_TOKENS else place).to(tl.int64)
    FP8: tl.constexpr = x.dtype.element_ty
    w_row = expert.to(tl.int64) * n + tl.where(channel_ok, channel, 0)
    w_at = w + w_row[:, None] * width + tl.arange(0, 64)[None, :]
    scale_at = scales + w_row * pairs
    x_at = x + row[:, None] * (2 * width) + tl.arange(0, 128)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, width // 64, num_stages=STAGES):
        v = tl.load(w_at + step * 64)
        even, odd = _fp8_codes(v, 0, ASM).to(FP8, bitcast=True), _fp8_codes(v, 1, ASM).to(FP8, bitcast=True)
        b = tl.load(x_at + step * 128, mask=place_ok[:, None], other=0.0)
        if GROUP == 128:
            one = (tl.load(scale_at + step // 2) >> (step % 2 * 16)) & 0xFFFF
            acc += tl.dot(_concat(even, odd, BN, 64), tl.trans(b)) * _fp32(one)[:, None]
        else:
            s0, s1 = _halves(tl.load(scale_at + 2 * step))
            s2, s3 = _halves(tl.load(scale_at + 2 * step + 1))
            e0, e1, e2, e3 = _quarters(even, BN, 16)
            o0, o1, o2, o3 = _quarters(odd, BN, 16)
            b0, b1, b2, b3 = _quarters(b, BM, 32)
            acc += tl.dot(_concat(e0, o0, BN, 16), tl.trans(b0)) * _fp32(s0)[:, None]
            acc += tl.dot(_concat(e1, o1, BN, 16), tl.trans(b1)) * _fp32(s1)[:, None]
            acc += tl.dot(_concat(e2, o2, BN, 16), tl.trans(b2)) * _fp32(s2)[:, None]
            acc += tl.dot(_concat(e3, o3, BN, 16), tl.trans(b3)) * _fp32(s3)[:, None]
    acc = acc * (tl.load(x_scale + row, mask=place_ok, other=0.0) * SUBNORMAL)[None, :]
    to = out + place.to(tl.int64)[None, :] * n + channel[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=channel_ok[:, None] & place_ok[None, :])


@triton.jit
def _planes(x, out, size, stride, width, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    release(PDL)
    wait(PDL)
    y = tl.load(x + row * stride + col, mask=col < size, other=0.0)
    y = tl.permute(tl.reshape(y, (BLOCK // (4 * TILE), TILE, 4)), (0, 2, 1))
    tl.store(out + row * width + col, tl.reshape(y, (BLOCK,)), mask=col < width)


@triton.jit
def _quantize_in_groups(
    x, out, scale, size, stride, width,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    release(PDL)
    wait(PDL)
    y = tl.load(x + row * stride + col, mask=col < size, other=0.0).to(tl.float32)
    s = scale_of(tl.max(tl.abs(y), 0), LIMIT, FLOOR)
    tl.store(scale + row, s)
    to = col // GROUP * GROUP + col % 2 * (GROUP // 2) + col % GROUP // 2
    tl.store(out + row * width + to, to_fp8(tl.div_rn(y, s), LIMIT, out.dtype.element_ty), mask=col < width)


def planes(x: Tensor, width: int) -> Tensor:
    """Permute x [rows, K] BF16 to planes [rows, width]: within each STEP values, every fourth, for each of four offsets;
    zero-padded.
    """
    rows, size = x.shape
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=x.device)
    if rows:
        block = min(2048, power_of_2(width))
        launch(_planes, (rows, triton.cdiv(width, block)),
            x, out, size, x.stride(0), width, TILE=STEP // 4, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def quantize_in_groups(x: Tensor, fp8: torch.dtype, width: int, group: int) -> Quantized:
    """Quantize x [rows, K] with one scale per token: codes [rows, width], in each group even values before odd ones, and scales
    [rows, 1].
    """
    rows, size = x.shape
    codes = torch.empty(rows, width, dtype=fp8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = power_of_2(width)
        launch(_quantize_in_groups, (rows,),
            x, codes, scale, size, x.stride(0), width, GROUP=group, BLOCK=block, LIMIT=FP8_MAX[fp8], FLOOR=SCALE_FLOOR,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return Quantized(codes, scale)


def laid_out(data: Tensor, scale: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [.., N, bytes] and BF16 scales [.., N, groups], padded to whole steps and pairs of scales; unchanged if they are
    already.

    The padding is zeros with zero scales. FP32 scales are rounded to BF16, once.
    """
    width = data.shape[-1] + -data.shape[-1] % max(STEP // 2, group)
    if short := width - data.shape[-1]:
        data = F.pad(data, (0, short), value=0x88)
    scale = scale.bfloat16()
    if short := 2 * width // group - scale.shape[-1]:
        scale = F.pad(scale, (0, short))
    return data.contiguous(), scale.contiguous()


def int4_product(
    x: Tensor, w: Tensor, scales: Tensor, group: int, at: Dispatch | None = None, *, of_tokens: bool = True,
    fp8: torch.dtype | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Product of x [T or P, K] by codes [E, N, bytes] and scales [E, N, groups] in the layout of `laid_out`: [rows, N] in x's
    dtype.

    at: rows are pairs in sorted order, as in `grouped_linear`; None for one dense weight. fp8: use W4A8 with activations in
    this dtype; None for W4A16. config: overrides the measured choice of tile sizes.
    """
    experts, n, width = w.shape
    rows = len(x) if at is None else len(at.order)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    x = x.to(torch.bfloat16).contiguous()
    c = _shape(rows / experts, n, group, at is None, fp8 is not None) | (config or {})
    bn, bm = c["BN"], c["BM"]
    slots = triton.cdiv(rows, bm) if at is None else min(rows, rows // bm + experts)
    order, starts = (None, None) if at is None else (at.order, at.starts)
    common = {
        "OF_TOKENS": at is not None and of_tokens, "TOP_K": at.top_k if at is not None else 1, "EXPERTS": power_of_2(experts),
        "BN": bn, "BM": bm, "GROUP": group, "ASM": has_packed_arithmetic(), "STAGES": pipeline(c["stages"]),
        "num_warps": c["warps"],
    }  # fmt: skip
    where, pairs, pair_scales = (triton.cdiv(n, bn), slots), scales.shape[2] // 2, scales.view(torch.int32)
    if fp8 is not None:
        codes, scale = quantize_in_groups(x, fp8, 2 * width, group)
        launch(_w4a8, where,
            codes, scale, w, pair_scales, out, order, starts, experts, rows, n, width, pairs,
            SUBNORMAL=SUBNORMAL[fp8], **common,
        )  # fmt: skip
        return out
    steps = width // max(STEP // 2, group)
    per_split = triton.cdiv(steps, min(c["split"], steps))
    split, tiles = triton.cdiv(steps, per_split), where[0] * slots
    parts, counters = workspace(x.device, tiles * split * bn * bm, tiles) if split > 1 else (out, out)
    given = planes(x, 2 * width) if c["planar"] else x
    launch(_w4a16, (*where, split),
        given, w.view(torch.int16), pair_scales, out, order, starts, parts, counters, experts, rows, n, width // 2, pairs,
        given.shape[1], per_split, TILE=STEP // 4, PLANAR=bool(c["planar"]), SPLIT=split, **common,
    )  # fmt: skip
    return out


def uses_w4a8(rows: float, group: int, dense: bool) -> bool:
    """Whether W4A8 is used for `rows` per expert on average, by the measurements in the module's docstring."""
    return group == 128 and rows > 32 and not dense


def _shape(rows: float, n: int, group: int, dense: bool, fp8: bool) -> dict[str, int]:
    """Tile sizes and pipeline stages for `rows` per expert on average."""
    if rows <= (64 if dense else 32):  # few rows: each CTA permutes its activations to planes itself
        bm, bn = 16 if rows <= 16 else 32, 64 if dense else 128
        split = max(1, 2 * device_units() // (triton.cdiv(n, bn) * triton.cdiv(max(int(rows), 1), bm))) if dense else 1
        return {"BN": bn, "BM": bm, "warps": 4, "stages": 4 if bm == 16 and dense else 3, "planar": 0, "split": split}
    if fp8:
        narrow = rows <= 64 or group == 32 or shared_memory() < 100 << 10  # groups of 32: more sums would spill
        return {"BN": 64, "BM": 64 if narrow else 128, "warps": 4, "stages": 3}
    # With groups of 128 the stages of two tiles would not fit. A dense weight would have too few tiles for all SMs.
    wide = rows > 64 and group == 32 and not dense and shared_memory() > 200 << 10
    return {"BN": 256 if wide else 128, "BM": 128 if wide else 64, "warps": 8, "stages": 3, "planar": 1, "split": 1}
