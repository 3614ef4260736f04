"""Between MLA's projections and its attention: latents are written to the paged cache, and queries are absorbed.

A CTA writes one token: the norm of its latent, the rotation of its rope key, and their codes or values. Per-head products are
the library's batched GEMM, which takes operands and results with any row stride.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kvcache import LATENT_GROUP, LatentCache
from octavo.ops.contract import Norm, Rotation
from octavo.ops.reference_latent import PEAK_FLOOR
from octavo.ops.triton.launch import launch, power_of_2, release, round_to, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["absorbed_queries", "finite", "head_linear", "partner", "power_of_two", "rotated", "write_latent"]

HEADS = 16  # heads of a CTA that rotates queries


@triton.jit
def finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)  # NaN too


@triton.jit
def power_of_two(most, LIMIT: tl.constexpr, FLOOR: tl.constexpr):
    """The smallest power of two that brings the amax `most` (at least FLOOR) to LIMIT or below."""
    bits = tl.div_rn(tl.maximum(most, FLOOR, propagate_nan=tl.PropagateNan.ALL), LIMIT).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def partner(d, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The dimension that d is paired with in the rotation; d itself behind R."""
    half: tl.constexpr = R // 2
    if INTERLEAVED:
        other = d ^ 1
    else:
        other = tl.where(d < half, d + half, d - half)
    return tl.where(d < R, other, d)


@triton.jit
def rotated(x, y, d, cos_sin, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """FP32 x at dimensions d, rotated with y at their partners, by the cos_sin row at `cos_sin`; x itself behind R."""
    half: tl.constexpr = R // 2
    if INTERLEAVED:
        angle, first = d // 2, d % 2 == 0
    else:
        angle, first = d % half, d < half
    cos = tl.load(cos_sin + angle, mask=d < R, other=1.0)
    sin = tl.load(cos_sin + half + angle, mask=d < R, other=0.0)
    return tl.where(d < R, x * cos + y * tl.where(first, -sin, sin), x)


@triton.jit
def _write_latent(
    kv, weight, cos_sin, rotary_rows, slots, latent, rope, scales, eps, kv_stride,
    latent_block, latent_token, rope_block, rope_token, scale_block, scale_token,
    RANK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = at < RANK
    dtype: tl.constexpr = kv.dtype.element_ty
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    release(PDL)
    wait(PDL)
    source = kv + token * kv_stride
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.arange(0, RP)
    a = tl.load(source + RANK + d, mask=d < R, other=0.0).to(tl.float32)
    b = tl.load(source + RANK + partner(d, R, INTERLEAVED), mask=d < R, other=0.0).to(tl.float32)
    slot = tl.load(slots + token).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    key = finite(round_to(rotated(a, b, d, cos_sin + tl.load(rotary_rows + token) * R, R, INTERLEAVED), dtype))
    tl.store(rope + block * rope_block + offset * rope_token + d, key.to(rope.dtype.element_ty), mask=d < R)
    factor = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / RANK + eps)
    y = finite(round_to(round_to(x * factor, dtype) * gain, dtype))
    to = latent + block * latent_block + offset * latent_token + at
    if scales is not None:
        by = power_of_two(tl.max(tl.abs(y), 1), LIMIT, FLOOR)
        tl.store(scales + block * scale_block + offset * scale_token + group, by, mask=group * GROUP < RANK)
        tl.store(to, to_fp8(y * (1.0 / by)[:, None], LIMIT, latent.dtype.element_ty), mask=inside)
    else:
        tl.store(to, y.to(latent.dtype.element_ty), mask=inside)


def write_latent(kv: Tensor, norm: Norm, rotation: Rotation, cache: LatentCache, slots: Tensor) -> None:
    cos_sin, rows, interleaved = rotation
    latent, rope, scale = cache
    rank, width = latent.shape[-1], rope.shape[-1]
    if not len(kv):
        return
    if kv.stride(1) != 1:
        kv = kv.contiguous()
    scale_strides = (0, 0) if scale is None else scale.stride()[:2]
    launch(_write_latent, (len(kv),),
        kv, norm.weight, cos_sin, rows, slots, latent, rope, scale, norm.eps, kv.stride(0),
        *latent.stride()[:2], *rope.stride()[:2], *scale_strides,
        RANK=rank, GROUPS=power_of_2(-(-rank // LATENT_GROUP)), GROUP=LATENT_GROUP, R=width, RP=power_of_2(width),
        INTERLEAVED=interleaved, BLOCK_SIZE=latent.shape[1], LIMIT=FP8_MAX.get(latent.dtype, 1.0), FLOOR=PEAK_FLOOR,
        num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads"])
def _rotate_queries(
    q, out, cos_sin, rotary_rows, heads, q_token, q_head, out_token, out_head,
    HEADS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotate the rope part of queries, from q to out; both pointers begin at the rope part."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, RP)[None, :]
    inside = (head < heads) & (d < R)
    release(PDL)
    wait(PDL)
    source = q + token * q_token + head * q_head
    x = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + partner(d, R, INTERLEAVED), mask=inside, other=0.0).to(tl.float32)
    x = rotated(x, y, d, cos_sin + tl.load(rotary_rows + token) * R, R, INTERLEAVED)
    tl.store(out + token * out_token + head * out_head + d, x.to(out.dtype.element_ty), mask=inside)


def absorbed_queries(q: Tensor, up_k: Tensor, rotation: Rotation) -> Tensor:
    (tokens, heads, dim), (nope, rank) = q.shape, up_k.shape[1:]
    width = dim - nope
    out = torch.empty(tokens, heads, rank + width, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    if q.stride(2) != 1:
        q = q.contiguous()
    _product(q[..., :nope], up_k, out[..., :rank])
    per_cta = min(HEADS, power_of_2(heads))
    launch(_rotate_queries, (tokens, triton.cdiv(heads, per_cta)),
        q[..., nope:], out[..., rank:], rotation.cos_sin, rotation.rows, heads, *q.stride()[:2], *out.stride()[:2],
        HEADS=per_cta, R=width, RP=power_of_2(width), INTERLEAVED=rotation.interleaved, num_warps=2,
    )  # fmt: skip
    return out


def head_linear(x: Tensor, w: Tensor) -> Tensor:
    out = torch.empty(*x.shape[:2], w.shape[2], dtype=x.dtype, device=x.device)
    if len(x):
        _product(x, w, out)
    return out


def _product(x: Tensor, w: Tensor, out: Tensor) -> None:
    """x [T, H, K] by w [H, K, N] into out [T, H, N]: a batched GEMM of the library on strided views, without copies."""
    torch.bmm(x.transpose(0, 1), w.to(x.dtype), out=out.transpose(0, 1))
