"""Rotary embedding of heads that no cache is written for, as in vision towers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import launch, power_of_2, release, wait

__all__ = ["rotate"]

TOKENS, HEADS = 1, 32  # of a CTA


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    x, out, cos_sin, rows, tokens, token_stride, head_stride,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = R // 2
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    release(PDL)
    wait(PDL)
    here = token < tokens
    inside = here[:, None, None] & (head < H)[None, :, None]
    at = tl.load(rows + token, mask=here, other=0)[:, None] * R + pair[None, :]
    known = here[:, None] & (pair < half)[None, :]
    cos = tl.load(cos_sin + at, mask=known, other=1.0)[:, None, :]
    sin = tl.load(cos_sin + half + at, mask=known, other=0.0)[:, None, :]
    first = (pair * 2 if INTERLEAVED else pair)[None, None, :]
    apart: tl.constexpr = 1 if INTERLEAVED else half
    ok = inside & (pair < half)[None, None, :]
    source = x + token.to(tl.int64)[:, None, None] * token_stride + head[None, :, None] * head_stride
    to = out + (token.to(tl.int64)[:, None, None] * H + head[None, :, None]) * D
    a = tl.load(source + first, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(source + first + apart, mask=ok, other=0.0).to(tl.float32)
    tl.store(to + first, (a * cos - b * sin).to(out.dtype.element_ty), mask=ok)
    tl.store(to + first + apart, (b * cos + a * sin).to(out.dtype.element_ty), mask=ok)
    if D > R:
        behind = R + tl.arange(0, REST)[None, None, :]
        tl.store(to + behind, tl.load(source + behind, mask=inside & (behind < D)), mask=inside & (behind < D))


def rotate(x: Tensor, cos_sin: Tensor, rows: Tensor, interleaved: bool = False) -> Tensor:
    (tokens, heads, dim), rotated = x.shape, cos_sin.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        x = x if x.stride(2) == 1 else x.contiguous()
        launch(_rotate, (triton.cdiv(tokens, TOKENS), triton.cdiv(heads, HEADS)),
            x, out, cos_sin, rows, tokens, x.stride(0), x.stride(1), H=heads, D=dim, R=rotated, PAIRS=power_of_2(rotated // 2),
            REST=power_of_2(max(1, dim - rotated)), INTERLEAVED=interleaved, TOKENS=TOKENS, HEADS=HEADS, num_warps=4,
        )  # fmt: skip
    return out
