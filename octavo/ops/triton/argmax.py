"""Argmax over the vocabulary: a row is split over many CTAs, which reduce to one 64-bit word by an atomic maximum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import launch, release, wait

__all__ = ["argmax"]

BLOCK = 4096  # values of a CTA
MAX_ROWS = 1 << 14
LOWEST = -(1 << 63)


@triton.jit
def _argmax(
    logits, best, counters, out, size, stride,
    BLOCK: tl.constexpr, LOWEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    release(PDL)
    wait(PDL)
    x = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < size, other=-float("inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x) + 0.0  # the two zeros are equal
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # an integer in the order of the float values
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)  # ties go to the smaller index
    tl.atomic_max(best + row, tl.max(key, 0), sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        most = tl.atomic_xchg(best + row, tl.full((), LOWEST, tl.int64), sem="relaxed")
        tl.store(out + row, 0x7FFFFFFF - (most & 0x7FFFFFFF))
        tl.store(counters + row, 0)  # for the next launch


_workspaces: dict[torch.device, tuple[Tensor, Tensor]] = {}


def argmax(logits: Tensor) -> Tensor:
    rows, size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    device = logits.device
    if device not in _workspaces:
        best = torch.full((MAX_ROWS,), LOWEST, dtype=torch.int64, device=device)
        _workspaces[device] = best, torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
    assert rows <= MAX_ROWS, "a graph may hold the workspace, so it cannot grow"
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if rows:
        launch(_argmax, (rows, triton.cdiv(size, BLOCK)),
            logits, *_workspaces[device], out, size, logits.stride(0), BLOCK=BLOCK, LOWEST=LOWEST, num_warps=8,
        )  # fmt: skip
    return out
