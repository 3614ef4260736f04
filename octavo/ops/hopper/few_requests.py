"""Decode attention of a few requests, with rotary embedding and cache write, by csrc/few_requests_attention.cu."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.ops.contract import Rope
from octavo.ops.hopper import cache_blocks
from octavo.ops.hopper.cache_blocks import BLOCK, DIM
from octavo.ops.hopper.compile import Kernels
from octavo.ops.triton import launch
from octavo.ops.triton.decode import LOG2E

__all__ = ["KERNELS", "SPLITS", "attend", "refusal", "splits_of"]

SPLITS = 1, 2, 4, 8  # parts of a context, the CTAs of a cluster
HELD, MAX_GROUP = 8, 8  # blocks of a part, query heads of a KV head, as in few_requests_attention.cu
KERNELS = Kernels(
    "few_requests_attention.cu", "few_requests_attention", "attention of a few requests is Triton's", ("SPLITS",),
    [(n,) for n in SPLITS],
)  # fmt: skip


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "tables", "lengths", "rotary_rows", "slots", "cos_sin", "q_norm",
                                        "k_norm", "cache", "next_cache", "k_scale", "v_scale")),
        ("q_stride", c_int64), ("kv_stride", c_int64), *((name, c_int32) for name in ("table_width", "kv_heads", "group")),
        ("eps", c_float), ("qk_scale", c_float),
    ]  # fmt: skip


def splits_of(pairs: int, longest: int) -> int | None:
    """Into how many parts contexts of up to this many tokens are split, for so many pairs of a request and a KV head.

    None: they do not fit, or clusters would wait for one another (an H200: 128 CTAs took twice as long as 64).
    """
    splits = next((n for n in SPLITS if longest <= n * HELD * BLOCK), None)
    return None if splits is None or pairs * splits > launch.device_units() // 2 else splits


def refusal(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, splits: int | None, window: int | None
) -> str | None:
    """None, or the reason why few_requests_attention.cu does not attend to this cache. splits: as `splits_of` says."""
    if splits is None:
        return f"more CTAs than half of the multiprocessors, or contexts of more than {SPLITS[-1] * HELD * BLOCK} tokens"
    if q.shape[1] > MAX_GROUP * cache.views["k"].shape[2]:
        return f"more than {MAX_GROUP} query heads of a KV head"
    if cache_blocks.per_token_head(cache):
        return "scales of each token and head"
    if rope.cos_sin.shape[1] != DIM:
        return "dimensions of a head that are not rotated"
    if any(x.data_ptr() % 8 or x.stride(0) % 4 or x.stride()[1:] != (x.shape[2], 1) for x in (q, k, v)):
        return "heads that are not adjacent, or not at multiples of 8 bytes"
    return cache_blocks.refusal(KERNELS.platform, q.dtype, cache, window)


def attend(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None,
    longest: int, next_cache: LayerCache | None = None,
) -> Tensor | None:  # fmt: skip
    """`ops.attend` for requests of one token each, with contexts up to `longest`; None where `refusal` says why, or the kernel
    is not available. next_cache: that of the next layer, whose keys and values of the same tokens are brought into L2.

    The row of a request without a context becomes zeros.
    """
    splits = splits_of(len(q) * k.shape[1], longest)
    if (reason := refusal(q, k, v, rope, cache, splits, window)) is not None:
        KERNELS.refused(reason)
        return None
    assert splits is not None, "refusal asks for it"
    if (kernel := KERNELS.kernel((splits,), q.device)) is None:
        return None
    out, keys, (norms, cos_sin, rows) = torch.empty(q.shape, dtype=q.dtype, device=q.device), cache.views["k"], rope
    kv_heads = keys.shape[2]
    gains = (norms.q.data_ptr(), norms.k.data_ptr()) if norms else (None, None)
    arguments = _Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), batch.block_tables.data_ptr(), batch.seq_lens.data_ptr(),
        rows.data_ptr(), batch.slot_mapping.data_ptr(), cos_sin.data_ptr(), *gains, keys.data_ptr(),
        None if next_cache is None else next_cache.views["k"].data_ptr(), cache.k_scale.data_ptr(), cache.v_scale.data_ptr(),
        q.stride(0), k.stride(0), batch.block_tables.stride(0), kv_heads,
        q.shape[1] // kv_heads, norms.eps if norms else 0.0, scale * LOG2E,
    )  # fmt: skip
    kernel.launch(len(q) * kv_heads * splits, arguments, early=True)
    return out
