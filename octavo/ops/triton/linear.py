"""FP8 products for few tokens (at most MAX_TOKENS), which are bound by reading the weight.

The weight's rows are the M side of the tensor core's tile and the tokens the narrow N side, so 16 tokens waste little. K is
split over CTAs (split-K) until the device is full. The last CTA of a tile to finish adds up the partial sums in a fixed order,
so results do not depend on which CTA that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.contract import Quantized
from octavo.ops.triton.launch import device_units, launch, pipeline, power_of_2, release, wait

__all__ = ["MAX_PARTS", "MAX_TILES", "MAX_TOKENS", "small_linear", "workspace"]

MAX_TOKENS = 32  # for more tokens the library's compute-bound GEMM is faster (1 to 3% of a step at 40 to 64)
MAX_PARTS, MAX_TILES = 1 << 23, 1 << 14
PROMOTE = 128  # products accumulated in the tensor core, which keeps about 14 bits, before they are added in FP32


@triton.jit(do_not_specialize=["tokens"])
def _small_linear(
    x, x_scale, w, w_scale, out, parts, counters, tokens, n, width, per_split,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PROMOTE: tl.constexpr, PREFETCH: tl.constexpr,
    PAIRS: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BN + tl.arange(0, BN)
    token = tl.arange(0, BM)
    depth = tl.arange(0, BK)
    w_at = w + rows.to(tl.int64)[:, None] * width + depth[None, :]
    x_at = x + token[:, None] * width + depth[None, :]
    row_ok, token_ok = rows < n, token < tokens
    acc = tl.zeros((BN, BM), tl.float32)
    first, stop = split * per_split, min((split + 1) * per_split, tl.cdiv(width, BK))
    release(PDL)
    if PREFETCH:  # prefetch the last weight tiles, which do not depend on the previous kernel, while that kernel still runs
        tail = (stop - PREFETCH) * BK + tl.arange(0, PREFETCH * BK)
        tail_ok = (tail >= first * BK) & (tail < width)
        prefetched = tl.load(
            w + rows.to(tl.int64)[:, None] * width + tail[None, :], mask=row_ok[:, None] & tail_ok[None, :], other=0.0
        )
    wait(PDL)
    for step in tl.range(first, stop - PREFETCH, num_stages=STAGES):
        deep = step * BK + depth < width
        a = tl.load(w_at + step * BK, mask=row_ok[:, None] & deep[None, :], other=0.0)
        b = tl.load(x_at + step * BK, mask=token_ok[:, None] & deep[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, max_num_imprecise_acc=PROMOTE)
    if PREFETCH:
        b = tl.load(x + token[:, None] * width + tail[None, :], mask=token_ok[:, None] & tail_ok[None, :], other=0.0)
        acc = tl.dot(prefetched, tl.trans(b), acc, max_num_imprecise_acc=PROMOTE)
    if SPLIT > 1:
        place = tl.arange(0, BN)[:, None] * BM + token[None, :]
        partials = parts + (tile.to(tl.int64) * SPLIT) * BN * BM
        tl.store(partials + split * BN * BM + place, acc)
        tl.debug_barrier()  # all threads' partial sums are written before the CTA counts itself
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") != SPLIT - 1:
            return
        tl.store(counters + tile, 0)  # reset for the next product
        acc = tl.zeros((BN, BM), tl.float32)
        for part in tl.static_range(SPLIT):
            acc += tl.load(partials + part * BN * BM + place, cache_modifier=".cg")
    by_row = tl.load(w_scale + rows, mask=row_ok, other=0.0)
    by_token = tl.load(x_scale + token, mask=token_ok, other=0.0)
    y = acc * by_row[:, None] * by_token[None, :]
    if PAIRS:
        y = tl.sum(tl.reshape(y, (BN, BM // 2, 2)), 2)
        token, token_ok = tl.arange(0, BM // 2), tl.arange(0, BM // 2) < tokens // 2
    mask = row_ok[:, None] & token_ok[None, :]
    tl.store(out + token[None, :].to(tl.int64) * n + rows[:, None], y.to(out.dtype.element_ty), mask=mask)


_workspaces: dict[torch.device, tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device, values: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Memory for partial sums and zeroed counters, shared by all products of the device, which run one after another."""
    if device not in _workspaces:
        parts = torch.empty(MAX_PARTS, dtype=torch.float32, device=device)
        _workspaces[device] = parts, torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    assert values <= MAX_PARTS, "a graph may hold the workspace, so it cannot grow"
    assert tiles <= MAX_TILES
    return _workspaces[device]


def _shape(n: int, width: int, bm: int) -> dict[str, int]:
    """Tile sizes, split, and the number of weight tiles that a CTA prefetches before `wait`, as measured on an H200 over
    Llama-3.1-8B.

    All CTAs should be resident at once and evenly spread, at most two per SM. With dependent launch they start while the
    previous kernel still runs, wherever there is room, and an SM with three CTAs would finish last.
    """
    few = bm == 16
    split = power_of_2(max(1, 2 * device_units() // triton.cdiv(n, 64)))
    if n >= 2 * 64 * device_units():  # enough tiles of 128 rows without split-K
        bn, bk, split, prefetch, stages = 128, 128, 1, 2, 3 if few else 4
    elif split <= 2:
        bn, bk, prefetch, stages = 64, 128, 8 if few else 4, 4
    elif width > 4096:
        bn, bk, prefetch, stages = 64, 256, 2 if few else 1, 3
    else:
        bn, bk, prefetch, stages = 64, 128, 8 if few else 4, 2 if few else 4
    return {"BN": bn, "BK": bk, "warps": bn // 16, "split": split, "prefetch": prefetch, "stages": stages}


def _split(n: int, width: int, c: dict[str, int]) -> tuple[int, int]:
    """(CTAs along K, steps of BK that each computes)"""
    steps = triton.cdiv(width, c["BK"])
    per_split = triton.cdiv(steps, min(c["split"], steps))
    return triton.cdiv(steps, per_split), per_split


def small_linear(
    x: Quantized, w: Tensor, w_scale: Tensor, n: int, config: dict[str, int] | None = None, *, pairs: bool = False
) -> Tensor:
    """BF16 [M, n] of codes [M, K'] and a weight [N', K'] with FP32 channel scales [n]; M at most MAX_TOKENS.

    pairs: rows of codes come in twos, [2M, K'], and the sum of both products is a row of the result.
    """
    tokens, width = x.codes.shape
    out = torch.empty(tokens // 2 if pairs else tokens, n, dtype=torch.bfloat16, device=w.device)
    if not tokens:
        return out
    bm = power_of_2(tokens, 16)
    c = _shape(n, width, bm) | (config or {})
    tiles, (split, per_split) = triton.cdiv(n, c["BN"]), _split(n, width, c)
    parts, counters = workspace(w.device, tiles * split * c["BN"] * bm if split > 1 else 0, tiles)
    launch(_small_linear, (tiles, split),
        x.codes, x.scale, w, w_scale, out, parts, counters, tokens, n, width, per_split,
        BN=c["BN"], BM=bm, BK=c["BK"], SPLIT=split, PROMOTE=PROMOTE, PREFETCH=c["prefetch"] if pipeline(3) == 3 else 0,
        PAIRS=pairs, STAGES=pipeline(c["stages"]), num_warps=c["warps"],
    )  # fmt: skip
    return out
