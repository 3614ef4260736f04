"""SiLU(gate) * up of an MLP's first product as one launch, csrc/gate_up_silu_gemm.cu, where there are many tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_ubyte, c_void_p

import torch
from torch import Tensor

from octavo.ops import gpu
from octavo.ops.contract import Activation, Operand, PackedWeight, Reader
from octavo.ops.hopper import gemm
from octavo.ops.hopper.compile import Kernels, tensor_map
from octavo.ops.hopper.gemm import OPTIONS, OUT_BOX, Product, Variant, choose, programs, tokens_of
from octavo.ops.triton import launch
from octavo.ops.triton.elementwise import made_for, quantize

__all__ = ["KERNELS", "VARIANTS", "gated_linear", "multiply", "refusal"]

VARIANTS = Variant(1, 112), Variant(2, 112), Variant(2, 128)
KERNELS = Kernels("gate_up_silu_gemm.cu", "gated_product", "gate and up of many tokens are the library's", OPTIONS, VARIANTS)
FILLED = 2 / 3  # of the multiprocessors, with tiles; with fewer the library's smaller tiles are faster


class _Gated(ctypes.Structure):
    _fields_ = [
        ("product", Product), ("out", c_ubyte * 128), ("by_token", c_void_p), ("by_row", c_void_p), ("width", c_int32),
        ("padding", c_ubyte * 44),  # to 64 bytes
    ]  # fmt: skip


def refusal(x: Operand, w: PackedWeight) -> str | None:
    """None, or why the product of such tokens by `w`, and what follows it, are not gate_up_silu_gemm.cu's."""
    if (reason := gemm.refusal(KERNELS.platform, x, w)) is not None:
        return reason
    assert isinstance(w, gpu.PackedScaledMM)
    if w.n % 16:
        return "a width that is not a multiple of 8"
    if -(-tokens_of(x) // gemm.TOKENS) * -(-w.n // (2 * VARIANTS[0].half)) < FILLED * launch.device_units():
        return "fewer tiles than multiprocessors"
    return None


def multiply(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor, variant: Variant) -> bool:
    """out [M, I] BF16 of codes [M, K'] with scales [M, 1] and a weight [2I, K'] = [gate, up] with scales [2I]; whether the
    kernel is there."""
    if (kernel := KERNELS.kernel(variant, codes.device)) is None:
        return False
    tokens, width = out.shape
    given = Product.of(codes, weight, variant.half, -(-width // variant.half), width)
    to = (c_ubyte * 128).from_buffer_copy(tensor_map(out, (2 * width, tokens), (2 * width,), OUT_BOX))
    kernel.launch(programs(variant), _Gated(given, to, scale.data_ptr(), weight_scale.data_ptr(), width), early=True)
    return True


def gated_linear(x: Operand, w: PackedWeight, readers: Sequence[Reader] = ()) -> Activation:
    if (reason := refusal(x, w)) is not None:
        KERNELS.refused(reason)
        return gpu.silu_mul(w.unscaled(x), readers)
    assert isinstance(w, gpu.PackedScaledMM)
    codes, scale = given = w.codes(x)
    out = torch.empty(len(codes), w.n // 2, dtype=torch.bfloat16, device=codes.device)
    if not multiply(codes, scale, w.weight, w.scale, out, choose(VARIANTS, len(codes), w.n, launch.device_units())):
        return gpu.silu_mul(w.unscaled(Activation(None, given)), readers)
    dense, form = made_for(readers, out.dtype)
    return Activation(out if dense else None, None if form is None else quantize(out, form.dtype, form.width))
