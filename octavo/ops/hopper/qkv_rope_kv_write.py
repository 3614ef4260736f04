"""Queries, keys and values of many tokens, rotated and, the last two, in the cache, in one launch."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_ubyte, c_void_p

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import Views
from octavo.ops import gpu
from octavo.ops.contract import HeadNorms, Operand, PackedWeight
from octavo.ops.hopper import cache_blocks, gemm
from octavo.ops.hopper.cache_blocks import DIM
from octavo.ops.hopper.compile import Kernels, tensor_map
from octavo.ops.hopper.gemm import OPTIONS, OUT_BOX, Product, Variant, choose, programs
from octavo.ops.triton import launch

__all__ = ["KERNELS", "VARIANTS", "project", "refusal", "write"]

VARIANTS = Variant(1, 64), Variant(2, 64), Variant(2, 128)
KERNELS = Kernels(
    "qkv_rope_kv_write_gemm.cu", "qkv_product", "queries, keys and values of many tokens are the library's", OPTIONS, VARIANTS
)


class _Qkv(ctypes.Structure):
    _fields_ = [
        ("product", Product), ("queries", c_ubyte * 128),
        *((name, c_void_p) for name in ("by_token", "by_row", "q_norm", "k_norm", "cos_sin", "positions", "slots", "cache")),
        ("q_heads", c_int32), ("kv_heads", c_int32), *((name, c_float) for name in ("eps", "by_key", "by_value")),
        ("padding", c_ubyte * 44),  # to 64 bytes
    ]  # fmt: skip


def refusal(
    x: Operand, w: PackedWeight, norms: HeadNorms | None, cos_sin: Tensor, views: Views, window: int | None
) -> str | None:
    """None, or why such a product, and what lies between it and attention, are not qkv_rope_kv_write_gemm.cu's."""
    on = KERNELS.platform
    if (reason := gemm.refusal(on, x, w) or cache_blocks.refusal(on, torch.bfloat16, views, window)) is not None:
        return reason
    if cos_sin.shape[1] != DIM:
        return "dimensions of a head that are not rotated"
    if norms is not None and norms.q.dtype is not torch.bfloat16:
        return "norms that are not BF16"
    return None


def write(
    codes: Tensor, scale: Tensor, w: gpu.PackedScaledMM, q: Tensor, norms: HeadNorms | None, cos_sin: Tensor, views: Views,
    batch: ForwardBatch, k_scale: float, v_scale: float, variant: Variant,
) -> bool:  # fmt: skip
    """Rotated queries into q [T, H, 128], keys and values into the cache; whether the kernel is there."""
    if (kernel := KERNELS.kernel(variant, codes.device)) is None:
        return False
    tokens, heads, _ = q.shape
    given = Product.of(codes, w.weight, variant.half, -(-w.n // (2 * variant.half)), variant.half)
    size = 2 * DIM * heads
    to = (c_ubyte * 128).from_buffer_copy(tensor_map(q, (size, tokens), (size,), OUT_BOX))
    gains = (norms.q.data_ptr(), norms.k.data_ptr()) if norms else (None, None)
    arguments = _Qkv(
        given, to, scale.data_ptr(), w.scale.data_ptr(), *gains, cos_sin.data_ptr(), batch.positions.data_ptr(),
        batch.slot_mapping.data_ptr(), views["k"].data_ptr(), heads, views["k"].shape[2], norms.eps if norms else 0.0,
        1 / k_scale, 1 / v_scale,
    )  # fmt: skip
    kernel.launch(programs(variant), arguments, early=True)
    return True


def project(
    x: Operand, w: PackedWeight, heads: int, norms: HeadNorms | None, cos_sin: Tensor, views: Views, batch: ForwardBatch,
    window: int | None, k_scale: float, v_scale: float,
) -> Tensor | None:  # fmt: skip
    if max(batch.query_lens) == 1:
        return None  # attention rotates and writes itself, or values, which lie far apart, are written by all programs at once
    if (reason := refusal(x, w, norms, cos_sin, views, window)) is not None:
        KERNELS.refused(reason)
        return None
    assert isinstance(w, gpu.PackedScaledMM)
    codes, scale = w.codes(x)
    q = torch.empty(len(codes), heads, DIM, dtype=torch.bfloat16, device=codes.device)
    variant = choose(VARIANTS, len(codes), w.n, launch.device_units())
    return q if write(codes, scale, w, q, norms, cos_sin, views, batch, k_scale, v_scale, variant) else None
