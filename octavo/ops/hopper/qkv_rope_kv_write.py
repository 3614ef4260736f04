"""The QKV GEMM for many tokens with rotary embedding and KV cache write as its epilogue."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_ubyte, c_void_p

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.ops import gpu
from octavo.ops.contract import Operand, PackedWeight, Quantized, Rope
from octavo.ops.hopper import block_gemm, cache_blocks, gemm
from octavo.ops.hopper.block_gemm import BlockProduct, PackedBlocks
from octavo.ops.hopper.cache_blocks import DIM
from octavo.ops.hopper.compile import Kernels, tensor_map
from octavo.ops.hopper.gemm import OPTIONS, OUT_BOX, Product, Variant, choose, num_ctas
from octavo.ops.triton import launch

__all__ = [
    "BLOCK_KERNELS", "KERNELS", "PER_TOKEN_HEAD_BLOCK_KERNELS", "PER_TOKEN_HEAD_KERNELS", "VARIANTS", "project", "refusal",
    "write",
]  # fmt: skip

VARIANTS = Variant(1, 64), Variant(2, 64), Variant(2, 128)
KERNELS, PER_TOKEN_HEAD_KERNELS = (
    Kernels(
        "qkv_rope_kv_write_gemm.cu", "qkv_product", "queries, keys and values of many tokens are the library's", OPTIONS,
        VARIANTS, BLOCKS=0, PER_TOKEN_HEAD=per_token_head,
    ) for per_token_head in (0, 1)
)  # fmt: skip
BLOCK_KERNELS, PER_TOKEN_HEAD_BLOCK_KERNELS = (
    Kernels(
        "qkv_rope_kv_write_gemm.cu", "qkv_product", "queries, keys and values with block scales are a product and ops after it",
        OPTIONS, VARIANTS, BLOCKS=1, PER_TOKEN_HEAD=per_token_head,
    ) for per_token_head in (0, 1)
)  # fmt: skip


class _Others(ctypes.Structure):
    _fields_ = [
        ("queries", c_ubyte * 128),
        *((name, c_void_p) for name in ("by_token", "by_row", "q_norm", "k_norm", "cos_sin", "rotary_rows", "slots", "cache",
                                        "k_scale", "v_scale")),
        ("q_heads", c_int32), ("kv_heads", c_int32), ("eps", c_float),
        ("padding", c_ubyte * 36),  # pads to a multiple of 64 bytes
    ]  # fmt: skip


class _Qkv(ctypes.Structure):
    _fields_ = [("product", Product), ("others", _Others)]


class _BlockQkv(ctypes.Structure):
    _fields_ = [("product", BlockProduct), ("others", _Others)]


def _kernels(w: PackedWeight, cache: LayerCache) -> Kernels:
    kernels = BLOCK_KERNELS if isinstance(w, gpu.PackedBlocks) else KERNELS
    if not cache_blocks.per_token_head(cache):
        return kernels
    of_cache = PER_TOKEN_HEAD_BLOCK_KERNELS if isinstance(w, gpu.PackedBlocks) else PER_TOKEN_HEAD_KERNELS
    of_cache.platform = kernels.platform  # compiled when it is first needed
    return of_cache


def refusal(x: Operand, w: PackedWeight, rope: Rope, cache: LayerCache, window: int | None) -> str | None:
    """None, or the reason why qkv_rope_kv_write_gemm.cu does not compute this projection."""
    on = KERNELS.platform
    not_taken = block_gemm.refusal(x, w) if isinstance(w, PackedBlocks) else gemm.refusal(on, x, w)
    if (reason := not_taken or cache_blocks.refusal(on, torch.bfloat16, cache, window)) is not None:
        return reason
    if rope.cos_sin.shape[1] != DIM:
        return "dimensions of a head that are not rotated"
    if rope.norms is not None and rope.norms.q.dtype is not torch.bfloat16:
        return "norms that are not BF16"
    return None


def write(
    x: Quantized, w: gpu.PackedScaledMM | PackedBlocks, q: Tensor, rope: Rope, cache: LayerCache, batch: ForwardBatch,
    variant: Variant,
) -> bool:  # fmt: skip
    """Compute rotated queries into q [T, H, 128], and write keys and values to the cache. Returns whether the kernel is
    available.
    """
    kernels = _kernels(w, cache)
    if (kernel := kernels.kernel(variant, q.device)) is None:
        return False
    (tokens, heads, _), k, (norms, cos_sin, rows) = q.shape, cache.views["k"], rope
    size = 2 * DIM * heads
    to = (c_ubyte * 128).from_buffer_copy(tensor_map(q, (size, tokens), (size,), OUT_BOX))
    gains = (norms.q.data_ptr(), norms.k.data_ptr()) if norms else (None, None)
    others = _Others(
        to, x.scale.data_ptr(), w.scale.data_ptr(), *gains, cos_sin.data_ptr(), rows.data_ptr(), batch.slot_mapping.data_ptr(),
        k.data_ptr(), *(x.data_ptr() for x in cache_blocks.scales(cache)), heads, k.shape[2], norms.eps if norms else 0.0,
    )  # fmt: skip
    tiles = variant.half, -(-w.n // (2 * variant.half)), variant.half
    arguments: ctypes.Structure
    if isinstance(w, PackedBlocks):
        arguments = _BlockQkv(BlockProduct.of(x, w, *tiles), others)
    else:
        arguments = _Qkv(Product.of(x.codes, w.weight, *tiles), others)
    kernel.launch(num_ctas(variant), arguments, early=True)
    return True


def project(
    x: Operand, w: PackedWeight, heads: int, rope: Rope, cache: LayerCache, batch: ForwardBatch, window: int | None
) -> Tensor | None:
    if max(batch.query_lens) == 1:
        return None  # decode attention fuses it; or all CTAs would write scattered values at once
    if (reason := refusal(x, w, rope, cache, window)) is not None:
        _kernels(w, cache).refused(reason)
        return None
    assert isinstance(w, gpu.PackedScaledMM | PackedBlocks)
    given = w.codes(x)
    tokens = len(given.codes)
    q = torch.empty(tokens, heads, DIM, dtype=torch.bfloat16, device=given.codes.device)
    units = launch.device_units()
    of_blocks = isinstance(w, PackedBlocks)
    variant = block_gemm.choose(VARIANTS, tokens, w.weight.shape, units) if of_blocks else choose(VARIANTS, tokens, w.n, units)
    return q if write(given, w, q, rope, cache, batch, variant) else None
