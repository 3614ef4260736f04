"""Attention of many new tokens over an FP8 cache as one launch, csrc/prefill.cu: it reads the cache's blocks as they lie there.

For sm_90 and what `refusal` lets pass; the rest is `octavo.ops.triton.prefill`'s.
"""

from __future__ import annotations

import ctypes
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_float, c_int32, c_ubyte, c_void_p
from functools import cache

import torch
from torch import Tensor

from octavo.batch import ForwardBatch, to_device
from octavo.kvcache import Views
from octavo.ops import gpu
from octavo.ops.contract import HeadNorms
from octavo.ops.resident.compile import Kernel, NoKernel, compile_cubin, missing, tensor_map
from octavo.ops.triton import launch, prefill
from octavo.ops.triton.decode import LOG2E
from octavo.platform import Platform

__all__ = ["attend", "attention", "configure", "pieces", "prefill_attention", "refusal"]

log = logging.getLogger(__name__)

DIM, BLOCK, ROWS = 128, 64, 192  # of a head; tokens of a block; of a piece, as in prefill.cu
MOST_GROUP = 64  # query heads of a KV head: prefill.cu divides small numbers by it

_arch = ""


class _Prefill(ctypes.Structure):
    _fields_ = [
        ("maps", c_ubyte * 128 * 2), *((name, c_void_p) for name in ("queries", "out", "tables", "tiles", "taken")),
        *((name, c_int32) for name in ("table_width", "pieces", "kv_heads", "group")), ("qk_scale", c_float),
        ("v_scale", c_float),
    ]  # fmt: skip


def configure(platform: Platform) -> None:
    """The kernel is compiled while the model is loaded: nothing in it depends on the model."""
    global _arch
    _arch = platform.arch
    if _arch == "sm_90" and missing() is None:
        _cubin()


@cache
def _cubin() -> Future[bytes]:
    with_one = ThreadPoolExecutor(1)
    try:
        return with_one.submit(compile_cubin, "prefill.cu", "sm_90a", {})
    finally:
        with_one.shutdown(wait=False)


@cache
def _kernel(device: torch.device) -> tuple[Kernel, Tensor] | None:
    """The kernel and its two counters, which it leaves at zero; None, and a warning, where it cannot be compiled or loaded."""
    try:
        return Kernel(_cubin().result(), "prefill_attention"), torch.zeros(2, dtype=torch.int32, device=device)
    except NoKernel as error:
        log.warning("attention of many tokens is Triton's: %s", error)
        return None


def refusal(q: Tensor, views: Views, window: int | None) -> str | None:
    """None, or why these queries [T, H, D] over this cache are not this kernel's."""
    k, v = views["k"], views["v"]
    heads, dim = k.shape[2:]
    if _arch != "sm_90":
        return f"{_arch} has no matrix instructions of a group of warps as sm_90 has them"
    if missing() is not None:
        return missing()
    if k.dtype is not torch.float8_e4m3fn or "k_scale" in views:
        return "not a cache of e4m3 with one scale"
    if q.dtype is not torch.bfloat16 or dim != DIM or window is not None:
        return "not BF16 queries of 128 dimensions that see their whole context"
    if q.shape[1] > MOST_GROUP * heads:
        return f"more than {MOST_GROUP} query heads of a KV head"
    size = heads * DIM
    expected = (2 * BLOCK * size, size, DIM, 1), (2 * BLOCK * size, 1, DIM * BLOCK, BLOCK)
    if k.shape[1] != BLOCK or (k.stride(), v.stride()) != expected or v.data_ptr() - k.data_ptr() != BLOCK * size:
        return f"not blocks of {BLOCK} tokens, keys before values, values with their tokens last"
    return None


def pieces(queries: list[int], contexts: list[int], first: int, stop: int, group: int) -> list[tuple[int, int, int, int, int]]:
    """Pieces of work of the requests [first, stop), a row being a token and one of `group` heads, the longest contexts first:
    request, the first row's token in q and its position, its head, rows."""
    made, token = [], sum(queries[:first])
    for request in range(first, stop):
        rows, start = queries[request] * group, contexts[request] - queries[request]
        for at in range(0, rows, ROWS):
            made.append((request, token + at // group, start + at // group, at % group, min(ROWS, rows - at)))
        token += queries[request]
    return sorted(made, key=lambda piece: -piece[2])


_maps: dict[tuple[int, torch.Size], bytes] = {}


def _cache_maps(k: Tensor, v: Tensor) -> bytes:
    """Of keys [blocks, 64, heads, 128]: 16 tokens are 2 halves of 4 pairs' places apart, so that a box of a block has them in
    the order that prefill.cu states; a head's values of a block are 128 rows of 64 tokens."""
    key = k.data_ptr(), k.shape
    if key not in _maps:
        blocks, token = k.shape[0], k.stride(1)
        keys = tensor_map(
            k,
            (token, 2, 4, 2, blocks * 2 * BLOCK // 16),
            (token, 4 * token, 2 * token, 16 * token),
            (DIM, 2, 4, 2, BLOCK // 16),
        )
        values = tensor_map(v, (BLOCK, token, blocks), (BLOCK, k.stride(0)), (BLOCK, DIM, 1))
        _maps[key] = keys + values
    return _maps[key]


def prefill_attention(
    q: Tensor, out: Tensor, views: Views, batch: ForwardBatch, first: int, stop: int, scale: float, window: int | None,
    k_scale: float, v_scale: float,
) -> None:  # fmt: skip
    """The rows of q and out [T, H, D] that belong to the requests [first, stop)."""
    if refusal(q, views, window) is not None or (made := _kernel(q.device)) is None:
        prefill.prefill_attention(q, out, views, batch, first, stop, scale, window, k_scale, v_scale)
        return
    if launch.is_ahead():
        return
    kernel, taken = made
    k, v = views["k"], views["v"]
    kv_heads, group = k.shape[2], q.shape[1] // k.shape[2]
    key = f"prefill pieces {first} {group}"
    if key not in batch.cache:
        found = pieces(batch.query_lens, batch.context_lens, first, stop, group)
        batch.cache[key] = to_device(found, torch.int32, q.device)
    tiles = batch.cache[key]
    assert isinstance(tiles, Tensor)
    arguments = _Prefill(
        (c_ubyte * 128 * 2).from_buffer_copy(_cache_maps(k, v)), q.data_ptr(), out.data_ptr(), batch.block_tables.data_ptr(),
        tiles.data_ptr(), taken.data_ptr(), batch.block_tables.stride(0), len(tiles) * kv_heads, kv_heads, group,
        scale * LOG2E * k_scale, v_scale,
    )  # fmt: skip
    kernel.launch(launch.device_units(), arguments, early=True)


def attention(
    q: Tensor, views: Views, batch: ForwardBatch, scale: float, window: int | None, k_scale: float, v_scale: float
) -> Tensor:
    return gpu.attention(q, views, batch, scale, window, k_scale, v_scale, prefill_attention)


def attend(
    q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, cos_sin: Tensor, views: Views, batch: ForwardBatch, scale: float,
    window: int | None, k_scale: float, v_scale: float,
) -> Tensor:  # fmt: skip
    return gpu.attend(q, k, v, norms, cos_sin, views, batch, scale, window, k_scale, v_scale, prefill_attention)
