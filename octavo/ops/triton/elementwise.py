"""RMSNorm, LayerNorm, SiLU·mul, GELU and quantization of activations: one CTA a token, with FP8 codes written in the same pass.

The scale of a token, or of each 128 of its values, is amax / limit, and the codes are round(x / scale), as in
`reference.quantize_activation`. Values are rounded to x's dtype where the reference rounds them, so that the codes are equal
to the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.contract import Activation, CodeFormat, Norm, Quantized, Reader, Uncombined, Unscaled, wanted
from octavo.ops.reference import SCALE_FLOOR
from octavo.ops.triton.launch import launch, power_of_2, release, round_to, scale_of, to_fp8, wait
from octavo.platform import FP8_MAX
from octavo.quant.scheme import BLOCK, Granularity

__all__ = [
    "by_group", "codes_for", "combine_norm_quantize", "gelu", "layer_norm", "made_for", "quantize", "rms_norm", "silu_mul",
]  # fmt: skip


@triton.jit
def _store_codes(y, codes, scale, row, cols, width, GROUP: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr):
    """Quantize and store one token, with a scale for each GROUP values (0: for all). Columns that pad K are zero."""
    if GROUP:
        parts = tl.reshape(y, (y.shape[0] // GROUP, GROUP))
        group, groups = tl.arange(0, parts.shape[0]), tl.cdiv(width, GROUP)
        s = scale_of(tl.max(tl.abs(parts), 1), LIMIT, FLOOR)
        tl.store(scale + row * groups + group, s, mask=group < groups)
        y = tl.reshape(parts * (1.0 / s)[:, None], y.shape)
    else:
        s = scale_of(tl.max(tl.abs(y), 0), LIMIT, FLOOR)
        tl.store(scale + row, s)
        y = y * (1.0 / s)
    tl.store(codes + row * width + cols, to_fp8(y, LIMIT, codes.dtype.element_ty), mask=cols < width)


@triton.jit
def _norm_quant(
    x, x_row, x_column, experts, weights, place, residual, weight, shift, out, scale, dense, carried, eps, size, inner,
    outer_stride, inner_stride, width, TOP_K: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr,
    QUANT: tl.constexpr, BOTH: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    gain = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        bias = tl.load(shift + cols, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        column = tl.load(x_column + cols, mask=inside, other=0.0)
    release(PDL)
    wait(PDL)
    if TOP_K > 0:  # a token's pairs, as in `routing._combine`
        value = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(TOP_K):
            woken = tl.load(experts + row * TOP_K + i) >= 0
            at = x + tl.load(place + row * TOP_K + i).to(tl.int64) * size + cols
            part = tl.load(at, mask=inside & woken, other=0.0).to(tl.float32)
            value += tl.where(woken, part * tl.load(weights + row * TOP_K + i), 0.0)
        value = round_to(value, x.dtype.element_ty)
    else:
        at = x + (row // inner) * outer_stride + (row % inner) * inner_stride + cols
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value = round_to(value * tl.load(x_row + row) * column, x.dtype.element_ty)
    if ADD:
        value += tl.load(residual + row * size + cols, mask=inside, other=0.0).to(tl.float32)
        value = round_to(value, x.dtype.element_ty)
    if ADD or SCALED or TOP_K > 0:
        tl.store(carried + row * size + cols, value.to(x.dtype.element_ty), mask=inside)
    if CENTER:
        value = tl.where(inside, value - tl.sum(value, 0) / size, 0.0)
    factor = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    if CENTER:
        y = round_to(value * factor * gain + bias, x.dtype.element_ty)
    else:
        y = round_to(round_to(value * factor, x.dtype.element_ty) * gain, x.dtype.element_ty)
    if QUANT:
        _store_codes(y, out, scale, row, cols, width, GROUP, LIMIT, FLOOR)
        if BOTH:
            tl.store(dense + row * size + cols, y.to(x.dtype.element_ty), mask=inside)
    else:
        tl.store(out + row * size + cols, y.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_quant(
    x, x_row, x_column, out, scale, dense, size, width,
    SCALED: tl.constexpr, QUANT: tl.constexpr, BOTH: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    FLOOR: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    release(PDL)
    wait(PDL)
    gate = tl.load(x + row * 2 * size + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + cols, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        by_row = tl.load(x_row + row)
        gate = round_to(gate * by_row * tl.load(x_column + cols, mask=inside, other=0.0), x.dtype.element_ty)
        up = round_to(up * by_row * tl.load(x_column + size + cols, mask=inside, other=0.0), x.dtype.element_ty)
    y = round_to(gate / (1.0 + tl.exp(-gate)), x.dtype.element_ty) * up
    if QUANT:
        _store_codes(round_to(y, x.dtype.element_ty), out, scale, row, cols, width, GROUP, LIMIT, FLOOR)
        if BOTH:
            tl.store(dense + row * size + cols, y.to(x.dtype.element_ty), mask=inside)
    else:
        tl.store(out + row * size + cols, y.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(source, inside, TANH: tl.constexpr):
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if TANH:  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return round_to(y, source.dtype.element_ty)


@triton.jit
def _gelu_quant(
    x, out, scale, dense, size, stride, width,
    TANH: tl.constexpr, QUANT: tl.constexpr, BOTH: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row is BLOCK columns and REST more: arithmetic on 8,192 lanes for 4,304 columns would take twice the time."""
    row = tl.program_id(0).to(tl.int64)
    cols, more = tl.arange(0, BLOCK), BLOCK + tl.arange(0, REST)
    release(PDL)
    wait(PDL)
    a = _gelu(x + row * stride + cols, cols < size, TANH)
    b = _gelu(x + row * stride + more, more < size, TANH)
    if QUANT:
        s = scale_of(tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)), LIMIT, FLOOR)
        tl.store(scale + row, s)
        to = out + row * width
        tl.store(to + cols, to_fp8(a * (1.0 / s), LIMIT, out.dtype.element_ty), mask=cols < width)
        tl.store(to + more, to_fp8(b * (1.0 / s), LIMIT, out.dtype.element_ty), mask=more < width)
    if BOTH or not QUANT:
        to = (dense if BOTH else out) + row * size
        tl.store(to + cols, a.to(x.dtype.element_ty), mask=cols < size)
        tl.store(to + more, b.to(x.dtype.element_ty), mask=more < size)


@triton.jit
def _quantize(
    x, out, scale, size, stride, width,
    GROUP: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    release(PDL)
    wait(PDL)
    y = tl.load(x + row * stride + cols, mask=cols < size, other=0.0).to(tl.float32)
    _store_codes(y, out, scale, row, cols, width, GROUP, LIMIT, FLOOR)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def made_for(readers: Sequence[Reader], tokens: int, dtype: torch.dtype) -> tuple[bool, CodeFormat | None]:
    """(whether to write dense values, the code format to write) for readers of so many tokens' results in `dtype`.

    In an FP32 model, products of codes would come out in BF16, so no codes are written.
    """
    dense, form = wanted(readers, tokens)
    return (True, None) if form is None or dtype is not torch.bfloat16 else (dense, form)


class _Outputs:
    """Output tensors for the readers of results [rows, size] with the dtype and device of `like`."""

    def __init__(self, readers: Sequence[Reader], rows: int, size: int, like: Tensor):
        dense, form = made_for(readers, rows, like.dtype)
        self.dense = torch.empty(rows, size, dtype=like.dtype, device=like.device) if dense else None
        self.quantized = None if form is None else codes_for(rows, form, like.device)
        group = BLOCK if form is not None and by_group(form) else 0
        self.block = power_of_2(max(size, group, 0 if form is None else form.width))
        out, scale = (self.dense, like) if self.quantized is None else self.quantized  # `like` is a dummy pointer
        both = dense and form is not None
        self.pointers = out, scale, self.dense if both else None
        self.options = {
            "QUANT": form is not None, "BOTH": both, "GROUP": group,
            "LIMIT": FP8_MAX[form.dtype] if form is not None else 1.0,
            "FLOOR": SCALE_FLOOR, "BLOCK": self.block, "num_warps": _warps(self.block),
        }  # fmt: skip
        self.width = size if form is None else form.width


def by_group(form: CodeFormat) -> bool:
    return form.granularity is Granularity.BLOCK


def codes_for(rows: int, form: CodeFormat, device: torch.device) -> Quantized:
    """Uninitialized codes of `rows` tokens in this format, and their scales."""
    codes = torch.empty(rows, form.width, dtype=form.dtype, device=device)
    return Quantized(codes, torch.empty(rows, form.groups, dtype=torch.float32, device=device))


def rms_norm(
    x: Tensor | Unscaled, weight: Tensor, eps: float, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    return layer_norm(x, Norm(weight, eps), residual, readers)


def layer_norm(
    x: Tensor | Unscaled, norm: Norm, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    """LayerNorm, or RMSNorm where `norm` has no bias."""
    x, by_row, by_column = x if isinstance(x, Unscaled) else (x, None, None)
    size = x.shape[-1]
    if x.stride(-1) != 1 or x.dim() not in (2, 3):
        x = x.reshape(-1, size)
    inner = x.shape[1] if x.dim() == 3 else 1
    rows = x.numel() // size
    to = _Outputs(readers, rows, size, x)
    carried = x if residual is None and by_row is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows:
        launch(_norm_quant, (rows,),
            x, by_row, by_column, None, None, None, residual, norm.weight, norm.bias, *to.pointers, carried, norm.eps, size,
            inner, x.stride(0), x.stride(1) if x.dim() == 3 else 0, to.width, TOP_K=0, SCALED=by_row is not None,
            ADD=residual is not None, CENTER=norm.bias is not None, **to.options,
        )  # fmt: skip
    return Activation(None if to.dense is None else to.dense.view(x.shape), to.quantized), carried


def combine_norm_quantize(
    x: Uncombined, weight: Tensor, eps: float, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    """`rms_norm` of each token's weighted sum of its pairs' rows."""
    y, routed, at = x
    (rows, top_k), size = routed.experts.shape, y.shape[1]
    to = _Outputs(readers, rows, size, y)
    carried = torch.empty(rows, size, dtype=y.dtype, device=y.device)
    if rows:
        launch(_norm_quant, (rows,),
            y, None, None, routed.experts, routed.weights, at.place, residual, weight, None, *to.pointers, carried, eps, size,
            1, 0, 0, to.width, TOP_K=top_k, SCALED=False, ADD=residual is not None, CENTER=False, **to.options,
        )  # fmt: skip
    return Activation(to.dense, to.quantized), carried


def silu_mul(x: Tensor | Unscaled, readers: Sequence[Reader] = ()) -> Activation:
    x, by_row, by_column = x if isinstance(x, Unscaled) else (x.contiguous(), None, None)
    rows, size = x.shape[0], x.shape[1] // 2
    to = _Outputs(readers, rows, size, x)
    if rows:
        launch(_silu_mul_quant, (rows,),
            x, by_row, by_column, *to.pointers, size, to.width, SCALED=by_row is not None, **to.options,
        )  # fmt: skip
    return Activation(to.dense, to.quantized)


def gelu(x: Tensor, approximate: str, readers: Sequence[Reader] = ()) -> Activation:
    """Readers with a scale per group quantize for themselves: none of the models' towers has them."""
    rows, size = x.shape
    form = wanted(readers, rows)[1]
    to = _Outputs((None,) if form is not None and by_group(form) else readers, rows, size, x)
    if rows:
        block = 1 << (to.width.bit_length() - 1)
        launch(_gelu_quant, (rows,),
            x, *to.pointers, size, x.stride(0), to.width, TANH=approximate == "tanh", REST=power_of_2(to.width - block, 16),
            **{name: value for name, value in to.options.items() if name != "GROUP"}
            | {"BLOCK": block, "num_warps": _warps(block)},
        )  # fmt: skip
    return Activation(to.dense, to.quantized)


def quantize(x: Tensor, fp8: torch.dtype, width: int, granularity: Granularity = Granularity.ROW) -> Quantized:
    """Quantize x [M, K]: codes [M, width] and scales [M, groups], one per token or per 128 of its values."""
    rows, size = x.shape
    codes, scale = made = codes_for(rows, form := CodeFormat(fp8, granularity, width), x.device)
    if rows:
        group = BLOCK if by_group(form) else 0
        block = power_of_2(max(size, width, group))
        launch(_quantize, (rows,),
            x, codes, scale, size, x.stride(0), width, GROUP=group, LIMIT=FP8_MAX[fp8], FLOOR=SCALE_FLOOR, BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return made
