"""The gate_up GEMM fused with SiLU·mul and quantization, for block scales and many tokens, csrc/block_gate_up_silu_gemm.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_ubyte, c_void_p

import torch
from torch import Tensor

from octavo.ops import gpu
from octavo.ops.contract import Activation, Operand, PackedWeight, Quantized, Reader
from octavo.ops.hopper import block_gemm
from octavo.ops.hopper.block_gemm import BlockProduct, PackedBlocks, choose
from octavo.ops.hopper.compile import Kernels, tensor_map
from octavo.ops.hopper.gemm import OPTIONS, OUT_BOX, Variant, num_ctas
from octavo.ops.triton import launch
from octavo.ops.triton.elementwise import by_group, codes_for, made_for, quantize
from octavo.quant.scheme import BLOCK

__all__ = ["KERNELS", "VARIANTS", "gated_linear", "multiply", "refusal"]

VARIANTS = Variant(1, 128), Variant(2, 128)  # a tile has whole groups of results
KERNELS = Kernels(
    "block_gate_up_silu_gemm.cu",
    "gated_product",
    "gate and up with block scales are a product and an op after it",
    OPTIONS,
    VARIANTS,
)  # fmt: skip


class _Gated(ctypes.Structure):
    _fields_ = [
        ("product", BlockProduct), ("dense", c_ubyte * 128), ("codes", c_ubyte * 128), ("scale", c_void_p), ("width", c_int32),
        ("makes_dense", c_int32), ("padding", c_ubyte * 48),  # pads to 64 bytes
    ]  # fmt: skip


def refusal(x: Operand, w: PackedWeight) -> str | None:
    """None, or the reason why block_gate_up_silu_gemm.cu does not compute the product of such tokens by `w`."""
    if (reason := block_gemm.refusal(x, w)) is not None:
        return reason
    assert isinstance(w, PackedBlocks)
    return "a width that is not a multiple of 128" if w.n % (2 * BLOCK) else None


def multiply(x: Quantized, w: PackedBlocks, dense: Tensor | None, made: Quantized | None, variant: Variant) -> bool:
    """Compute dense [M, I] in BF16, and codes [M, I] with scales [M, I / 128], from a weight [2I, K'] = [gate, up].

    Returns whether the kernel is available.
    """
    if (kernel := KERNELS.kernel(variant, x.codes.device)) is None:
        return False
    tokens, width = len(x.codes), w.n // 2
    given = BlockProduct.of(x, w, variant.half, width // variant.half, width)
    maps = [
        (c_ubyte * 128)() if to is None
        else (c_ubyte * 128).from_buffer_copy(tensor_map(to, (size * width, tokens), (size * width,), OUT_BOX))
        for to, size in ((dense, 2), (made and made.codes, 1))
    ]  # fmt: skip
    scale = made.scale.data_ptr() if made else None
    kernel.launch(num_ctas(variant), _Gated(given, *maps, scale, width, dense is not None), early=True)
    return True


def gated_linear(x: Operand, w: PackedBlocks, readers: Sequence[Reader] = ()) -> Activation:
    if (reason := refusal(x, w)) is not None:
        KERNELS.refused(reason)
        return gpu.silu_mul(w(x), readers)
    given = w.codes(x)
    (tokens, _), width, device = given.codes.shape, w.n // 2, given.codes.device
    wants_dense, form = made_for(readers, tokens, torch.bfloat16)
    made = codes_for(tokens, form, device) if form is not None and by_group(form) and form.width == width else None
    needs_dense = wants_dense or made is None
    dense = torch.empty(tokens, width, dtype=torch.bfloat16, device=device) if needs_dense else None
    if not multiply(given, w, dense, made, choose(VARIANTS, tokens, w.weight.shape, launch.device_units())):
        return gpu.silu_mul(w(Activation(None, given)), readers)
    if form is not None and made is None:
        assert dense is not None
        made = quantize(dense, form.dtype, form.width, form.granularity)
    return Activation(dense if wants_dense else None, made)
