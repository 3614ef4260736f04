"""A mixture of experts for more than a few tokens: two grouped GEMMs by csrc/grouped_gemm.cu, with SiLU and quantization."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_ubyte, c_void_p
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops import gpu
from octavo.ops.contract import Activation, Dispatch, Operand, PackedStack, Quantized, Routed, Uncombined
from octavo.ops.hopper.compile import Kernels, no_warpgroups, tensor_map
from octavo.ops.triton import launch
from octavo.quant.scheme import BLOCK

__all__ = ["KERNELS", "QUANTIZE", "VARIANTS", "Variant", "choose", "down", "fused_experts", "gate_up", "refusal"]


class Variant(NamedTuple):
    """Most pairs of a tile, whether scales are of blocks, and whether it is the product of gate and up, with SiLU."""

    tokens: int
    blocks: int
    gated: int


TOKENS = 32, 128
VARIANTS = [Variant(*values) for values in product(TOKENS, (0, 1), (0, 1))]
INSTEAD = "products of many tokens' experts are Triton's"
KERNELS = Kernels("grouped_gemm.cu", "grouped_product", INSTEAD, ("TOKENS", "BLOCKS", "GATED"), VARIANTS)
QUANTIZE = Kernels("quantize_pairs.cu", "quantize_pairs", INSTEAD, (), [()])
ROWS = 256  # of a tile, as in grouped_gemm.cu
MAX_EXPERTS, MAX_WIDTH = 512, 2048
FEW = 8  # tokens whose experts are not multiplied here: csrc/moe_decode.cu has most of such steps


class _Grouped(ctypes.Structure):
    _fields_ = [
        ("weight", c_ubyte * 128), ("x", c_ubyte * 128),
        *((name, c_void_p) for name in ("codes", "order", "starts", "by_token", "by_row", "out", "out_codes", "out_scale")),
        *((name, c_int32) for name in ("experts", "top_k", "width", "steps", "groups", "channels", "across", "out_width")),
        ("padding", c_ubyte * 32),  # pads to 64 bytes
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "codes", "scale", "count")), ("width", c_int32), ("padded", c_int32)
    ]  # fmt: skip


def choose(pairs: int, experts: int) -> int:
    """Most pairs of a tile: of few, more than experts have on average, so that a weight is mostly read once."""
    return TOKENS[pairs > 20 * experts]


def refusal(x: Operand, routed: Routed, gate_up: PackedStack, down: PackedStack) -> str | None:
    """None, or the reason why grouped_gemm.cu does not compute this mixture."""
    if (reason := no_warpgroups(KERNELS.platform)) is not None:
        return reason
    for stack in (gate_up, down):
        if not isinstance(stack, gpu.PackedGrouped) or stack.reads is None or stack.reads.dtype is not torch.float8_e4m3fn:
            return "not weights of e4m3 that are multiplied by codes"
    assert isinstance(gate_up, gpu.PackedGrouped)
    assert isinstance(down, gpu.PackedGrouped)
    dense = x if isinstance(x, Tensor) else x.dense
    if dense is not None and dense.dtype is not torch.bfloat16:
        return "not BF16 activations"
    if len(routed.experts) <= FEW:
        return f"not more than {FEW} tokens"
    if gate_up.n % 16 or down.n % 8:
        return "widths that are not multiples of 8"
    if gate_up.by_tile != down.by_tile or (gate_up.by_tile and not _of_blocks(gate_up, down)):
        return "scales that are not of blocks of 128"
    if down.k > MAX_WIDTH or gate_up.experts > MAX_EXPERTS:
        return f"more than {MAX_EXPERTS} experts or {MAX_WIDTH} channels"
    return None


def _of_blocks(gate_up: gpu.PackedGrouped, down: gpu.PackedGrouped) -> bool:
    """Whether every 128 x 128 of gate, of up and of down has a scale."""
    assert gate_up.scale is not None
    assert down.scale is not None
    return down.k % BLOCK == 0 and all(w.scale.shape[1] == -(-w.n // BLOCK) for w in (gate_up, down) if w.scale is not None)


def _launch(
    variant: Variant, given: Quantized, w: gpu.PackedGrouped, at: Dispatch, channels: int, out: Tensor | None,
    made: Quantized | None,
) -> bool:  # fmt: skip
    """Launch the product; returns whether the kernel is available."""
    if (kernel := KERNELS.kernel(variant, at.order.device)) is None:
        return False
    experts, rows, depth = w.weight.shape
    assert w.scale is not None
    codes, scale = given
    if variant.gated:
        sizes, strides = (depth, 8, 2, channels // 8, experts), (depth, channels * depth, 8 * depth, rows * depth)
        weight, x = tensor_map(w.weight, sizes, strides, (BLOCK, 8, 2, ROWS // 16, 1)), bytes(128)
    else:
        weight = tensor_map(w.weight, (depth, channels, experts), (depth, rows * depth), (BLOCK, ROWS, 1))
        x = tensor_map(codes, (depth, len(codes)), (depth,), (BLOCK, variant.tokens))
    to = (None, None, 0) if made is None else (made.codes.data_ptr(), made.scale.data_ptr(), made.codes.shape[1])
    arguments = _Grouped(
        (c_ubyte * 128).from_buffer_copy(weight), (c_ubyte * 128).from_buffer_copy(x), codes.data_ptr(), at.order.data_ptr(),
        at.starts.data_ptr(), scale.data_ptr(), w.scale.data_ptr(), None if out is None else out.data_ptr(), *to[:2], experts,
        at.top_k, depth, -(-depth // BLOCK), scale.shape[1], channels, -(-channels // (ROWS // 2 if variant.gated else ROWS)),
        to[2],
    )  # fmt: skip
    kernel.launch(launch.device_units(), arguments, early=True)
    return True


def gate_up(given: Quantized, w: gpu.PackedGrouped, at: Dispatch, width: int, tokens: int) -> Quantized | None:
    """SiLU(gate) * up of codes [T, K'] for each pair, as codes [P, width], in tiles of up to `tokens` pairs.

    Their scales are one a row; in tiles of 32 pairs, and where scales are of blocks, one for each 128 codes. None if the kernel
    is not available.
    """
    channels, pairs, device = w.n // 2, len(at.order), at.order.device
    grouped = w.by_tile or tokens == TOKENS[0]
    made = Quantized(
        torch.empty(pairs, width, dtype=given.codes.dtype, device=device),
        torch.empty(pairs, -(-channels // BLOCK) if grouped else 1, dtype=torch.float32, device=device),
    )
    if grouped:
        return made if _launch(Variant(tokens, w.by_tile, True), given, w, at, channels, None, made) else None
    out, quantize = torch.empty(pairs, channels, dtype=torch.bfloat16, device=device), QUANTIZE.kernel((), device)
    if quantize is None or not _launch(Variant(tokens, w.by_tile, True), given, w, at, channels, out, None):
        return None
    count = at.starts[w.experts :].data_ptr()
    arguments = _Rows(out.data_ptr(), made.codes.data_ptr(), made.scale.data_ptr(), count, channels, width)
    quantize.launch(min(-(-pairs // 32), 4 * launch.device_units()), arguments, early=True)
    return made


def down(given: Quantized, w: gpu.PackedGrouped, at: Dispatch, tokens: int) -> Tensor | None:
    """The product of codes that `gate_up` has just made, in the same tiles: BF16 [P, n] in sorted order."""
    out = torch.empty(len(at.order), w.n, dtype=torch.bfloat16, device=at.order.device)
    return out if _launch(Variant(tokens, w.by_tile, False), given, w, at, w.n, out, None) else None


def fused_experts(x: Operand, routed: Routed, w_in: PackedStack, w_out: PackedStack) -> Uncombined:
    at = routed.at if routed.at is not None else gpu.dispatch(routed.experts, w_in.experts)
    y = None
    if (reason := refusal(x, routed, w_in, w_out)) is None:
        assert isinstance(w_in, gpu.PackedGrouped)
        assert isinstance(w_out, gpu.PackedGrouped)
        assert w_in.reads is not None
        assert w_out.reads is not None
        given = gpu.quantized(x, w_in.reads)
        x, tokens = (
            Activation(None if isinstance(x, Tensor) else x.dense, given),
            choose(len(at.order), w_in.experts),
        )
        if (made := gate_up(given, w_in, at, w_out.reads.width, tokens)) is not None:
            y = down(made, w_out, at, tokens)
    else:
        KERNELS.refused(reason)
    if y is None:
        y = w_out(gpu.silu_mul(w_in(x, at, of_tokens=True), (w_out,)), at, of_tokens=False)
    return Uncombined(y, routed, at)
