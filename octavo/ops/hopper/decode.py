"""Decode attention over an FP8 cache by csrc/decode_attention.cu, with rotary embedding and cache write in the same launch."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_ubyte, c_void_p

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.ops.hopper.cache_blocks import DIM, cache_maps
from octavo.ops.hopper.compile import Kernel
from octavo.ops.triton import launch
from octavo.ops.triton.decode import LOG2E, New

__all__ = ["HEADS", "MAX_COUNTERS", "DecodeAttention"]

HEADS = (4, 8)  # query heads per KV head that the kernel is compiled for
MAX_COUNTERS = 1 << 14  # requests times KV heads


class _Decode(ctypes.Structure):
    _fields_ = [
        ("maps", c_ubyte * 128 * 2),
        *((name, c_void_p) for name in ("q", "k", "v", "out", "tables", "lengths", "rotary_rows", "slots", "cos_sin", "q_norm",
                                        "k_norm", "k_cache", "parts", "counters", "k_scale", "v_scale")),
        ("q_stride", c_int64), ("kv_stride", c_int64),
        *((name, c_int32) for name in ("requests", "table_width", "kv_heads", "group", "rotated")),
        *((name, c_float) for name in ("eps", "qk_scale")), ("padding", c_ubyte * 20),  # pads to a multiple of 64 bytes
    ]  # fmt: skip


class DecodeAttention:
    """The kernel for up to `heads` query heads per KV head, with the workspace by which its CTAs exchange partial sums."""

    def __init__(self, kernel: Kernel, heads: int, device: torch.device):
        self.kernel = kernel
        ctas = launch.device_units()
        self.parts = torch.empty(ctas * 2 * heads * (DIM + 2), dtype=torch.float32, device=device)
        self.counters = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)

    def __call__(
        self, q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, requests: int, scale: float,
        new: New | None = None,
    ) -> None:  # fmt: skip
        """Compute rows [0, requests) of q and out [T, H, 128], which have one token each. With `new`, q is not rotated yet.

        The row of a request without a context becomes zeros.
        """
        k, tables = cache.views["k"], batch.block_tables
        kv_heads = k.shape[2]
        given: tuple[int | None, ...] = (None,) * 2
        token: tuple[int | None, ...] = (None,) * 5
        kv_stride, rotated, eps = 0, 0, 0.0
        if new is not None:
            given, (norms, cos_sin, rows) = (new.k.data_ptr(), new.v.data_ptr()), new.rope
            gains = (norms.q.data_ptr(), norms.k.data_ptr()) if norms else (None, None)
            token = rows.data_ptr(), new.slots.data_ptr(), cos_sin.data_ptr(), *gains
            kv_stride, rotated, eps = new.k.stride(0), cos_sin.shape[1], norms.eps if norms else 0.0
        arguments = _Decode(
            (c_ubyte * 128 * 2).from_buffer_copy(cache_maps(cache.views)), q.data_ptr(), *given, out.data_ptr(),
            tables.data_ptr(), batch.seq_lens.data_ptr(), *token, k.data_ptr(), self.parts.data_ptr(),
            self.counters.data_ptr(), cache.k_scale.data_ptr(), cache.v_scale.data_ptr(), q.stride(0), kv_stride, requests,
            tables.stride(0), kv_heads, q.shape[1] // kv_heads, rotated, eps, scale * LOG2E,
        )  # fmt: skip
        self.kernel.launch(launch.device_units() // kv_heads * kv_heads, arguments, early=True)
