"""Prefill attention over an FP8 cache as one launch, which reads the cache's blocks in place."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_ubyte, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.batch import ForwardBatch, Key, to_device
from octavo.kvcache import LayerCache
from octavo.ops.hopper.cache_blocks import cache_maps
from octavo.ops.hopper.compile import Kernel
from octavo.ops.triton import launch
from octavo.ops.triton.decode import LOG2E

__all__ = ["MAX_GROUP", "ROWS", "PrefillAttention", "pieces"]

ROWS = 192  # rows of a piece, as in prefill_attention.cu
MAX_GROUP = 64  # query heads per KV head: prefill_attention.cu divides small numbers by it


class _Prefill(ctypes.Structure):
    _fields_ = [
        ("maps", c_ubyte * 128 * 2),
        *((name, c_void_p) for name in ("queries", "out", "tables", "tiles", "claimed", "k_scale", "v_scale")),
        *((name, c_int32) for name in ("table_width", "pieces", "kv_heads", "group")), ("qk_scale", c_float),
        ("padding", c_ubyte * 52),  # pads to a multiple of 64 bytes
    ]  # fmt: skip


def pieces(queries: list[int], contexts: list[int], first: int, stop: int, group: int) -> list[tuple[int, int, int, int, int]]:
    """Work items of requests [first, stop), longest contexts first. A row is a token and one of `group` heads.

    Each item: request, the first row's token in q, its position, its head, number of rows.
    """
    made, token = [], sum(queries[:first])
    for request in range(first, stop):
        rows, start = queries[request] * group, contexts[request] - queries[request]
        for at in range(0, rows, ROWS):
            made.append((request, token + at // group, start + at // group, at % group, min(ROWS, rows - at)))
        token += queries[request]
    return sorted(made, key=lambda piece: -piece[2])


@dataclass(frozen=True)
class _Pieces(Key[Tensor]):
    """`pieces`, on the device."""

    first: int
    stop: int
    group: int


class PrefillAttention:
    """The kernel on a device, and two counters that every launch resets to zero."""

    def __init__(self, kernel: Kernel, device: torch.device):
        self.kernel = kernel
        self.claimed = torch.zeros(2, dtype=torch.int32, device=device)

    def __call__(
        self, q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, first: int, stop: int, scale: float
    ) -> None:
        """Compute the rows of q and out [T, H, 128] that belong to requests [first, stop)."""
        kv_heads = cache.views["k"].shape[2]
        group = q.shape[1] // kv_heads
        tables = batch.block_tables

        def made() -> Tensor:
            return to_device(pieces(batch.query_lens, batch.context_lens, first, stop, group), torch.int32, q.device)

        tiles = batch.cache.get(_Pieces(first, stop, group), made)
        arguments = _Prefill(
            (c_ubyte * 128 * 2).from_buffer_copy(cache_maps(cache.views)), q.data_ptr(), out.data_ptr(), tables.data_ptr(),
            tiles.data_ptr(), self.claimed.data_ptr(), cache.k_scale.data_ptr(), cache.v_scale.data_ptr(), tables.stride(0),
            len(tiles) * kv_heads, kv_heads, group, scale * LOG2E,
        )  # fmt: skip
        self.kernel.launch(launch.device_units(), arguments, early=True)
