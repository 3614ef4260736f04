"""The gate_up GEMM fused with SiLU·mul for many tokens, csrc/gate_up_silu_gemm.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_ubyte, c_void_p

import torch
from torch import Tensor

from octavo.ops import gpu
from octavo.ops.contract import Activation, Operand, PackedWeight, Reader, tokens_of
from octavo.ops.hopper import block_gate_up_silu, gemm
from octavo.ops.hopper.block_gemm import PackedBlocks
from octavo.ops.hopper.compile import Kernels, tensor_map
from octavo.ops.hopper.gemm import OPTIONS, OUT_BOX, Product, Variant, choose, num_ctas
from octavo.ops.triton import launch
from octavo.ops.triton.elementwise import made_for, quantize

__all__ = ["KERNELS", "VARIANTS", "gated_linear", "multiply", "refusal"]

VARIANTS = Variant(1, 112), Variant(2, 112), Variant(2, 128)
KERNELS = Kernels("gate_up_silu_gemm.cu", "gated_product", "gate and up of many tokens are the library's", OPTIONS, VARIANTS)
FILLED = 2 / 3  # share of SMs with a tile; below it the library's smaller tiles are faster


class _Gated(ctypes.Structure):
    _fields_ = [
        ("product", Product), ("out", c_ubyte * 128), ("by_token", c_void_p), ("by_row", c_void_p), ("width", c_int32),
        ("padding", c_ubyte * 44),  # pads to 64 bytes
    ]  # fmt: skip


def refusal(x: Operand, w: PackedWeight) -> str | None:
    """None, or the reason why gate_up_silu_gemm.cu does not compute the product of such tokens by `w`."""
    if (reason := gemm.refusal(KERNELS.platform, x, w)) is not None:
        return reason
    assert isinstance(w, gpu.PackedScaledMM)
    if w.n % 16:
        return "a width that is not a multiple of 8"
    if -(-tokens_of(x) // gemm.TOKENS) * -(-w.n // (2 * VARIANTS[0].half)) < FILLED * launch.device_units():
        return "fewer tiles than multiprocessors"
    return None


def multiply(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor, variant: Variant) -> bool:
    """Compute out [M, I] BF16 from codes [M, K'] with scales [M, 1] and a weight [2I, K'] = [gate, up] with scales [2I].

    Returns whether the kernel is available.
    """
    if (kernel := KERNELS.kernel(variant, codes.device)) is None:
        return False
    tokens, width = out.shape
    given = Product.of(codes, weight, variant.half, -(-width // variant.half), width)
    to = (c_ubyte * 128).from_buffer_copy(tensor_map(out, (2 * width, tokens), (2 * width,), OUT_BOX))
    kernel.launch(num_ctas(variant), _Gated(given, to, scale.data_ptr(), weight_scale.data_ptr(), width), early=True)
    return True


def gated_linear(x: Operand, w: PackedWeight, readers: Sequence[Reader] = ()) -> Activation:
    if isinstance(w, PackedBlocks):
        return block_gate_up_silu.gated_linear(x, w, readers)
    if (reason := refusal(x, w)) is not None:
        KERNELS.refused(reason)
        return gpu.silu_mul(w.unscaled(x), readers)
    assert isinstance(w, gpu.PackedScaledMM)
    codes, scale = given = w.codes(x)
    out = torch.empty(len(codes), w.n // 2, dtype=torch.bfloat16, device=codes.device)
    if not multiply(codes, scale, w.weight, w.scale, out, choose(VARIANTS, len(codes), w.n, launch.device_units())):
        return gpu.silu_mul(w.unscaled(Activation(None, given)), readers)
    dense, form = made_for(readers, len(out), out.dtype)
    return Activation(out if dense else None, None if form is None else quantize(out, form.dtype, form.width, form.granularity))
