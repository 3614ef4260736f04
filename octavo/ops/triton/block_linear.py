"""FP8 products with a scale per 128x128 weight tile and per 128 activations. The sum over each group of 128 is scaled and then
accumulated in FP32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import launch, pipeline, power_of_2, release, wait
from octavo.quant.scheme import BLOCK

__all__ = ["block_linear"]


@triton.jit(do_not_specialize=["tokens"])
def _block_linear(
    x, x_scale, w, w_scale, out, tokens, n, width, groups,
    BN: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    depth = tl.arange(0, GROUP)
    row_ok, token_ok = rows < n, token < tokens
    w_at = w + rows.to(tl.int64)[:, None] * width + depth[None, :]
    x_at = x + token.to(tl.int64)[:, None] * width + depth[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    wait(PDL)
    for group in tl.range(0, groups, num_stages=STAGES):
        deep = group * GROUP + depth < width
        a = tl.load(w_at + group * GROUP, mask=row_ok[:, None] & deep[None, :], other=0.0)
        b = tl.load(x_at + group * GROUP, mask=token_ok[:, None] & deep[None, :], other=0.0)
        by_row = tl.load(w_scale + (rows // SCALE_ROWS) * groups + group, mask=row_ok, other=0.0)
        by_token = tl.load(x_scale + token.to(tl.int64) * groups + group, mask=token_ok, other=0.0)
        acc += tl.dot(a, tl.trans(b)) * by_row[:, None] * by_token[None, :]
    release(PDL)
    mask = row_ok[:, None] & token_ok[None, :]
    tl.store(out + token[None, :].to(tl.int64) * n + rows[:, None], acc.to(out.dtype.element_ty), mask=mask)


def block_linear(codes: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, n: int) -> Tensor:
    """BF16 [M, n] of codes [M, K'] and a weight [N', K']. The weight's scales are a grid of tiles, or a row of tiles per
    channel.
    """
    tokens, width = codes.shape
    out = torch.empty(tokens, n, dtype=torch.bfloat16, device=w.device)
    if tokens:
        bm = min(128, power_of_2(tokens, 16))
        bn = 128 if bm > 32 else 64
        a_row_each = w_scale.shape[0] == n and n > 1
        launch(_block_linear, (triton.cdiv(n, bn), triton.cdiv(tokens, bm)),
            codes, scale, w, w_scale, out, tokens, n, width, scale.shape[1], BN=bn, BM=bm, GROUP=BLOCK,
            SCALE_ROWS=1 if a_row_each else BLOCK, STAGES=pipeline(4 if bm <= 64 else 3), num_warps=8 if bm > 32 else 4,
        )  # fmt: skip
    return out
