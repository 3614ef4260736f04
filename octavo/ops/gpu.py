"""The ops that all GPUs share: Triton kernels, and the library's (torch's) products for many tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.contract import (
    FEW_TOKENS,
    FP8_BLOCKS,
    FP8_EXACT_FEW,
    FP8_ROWS,
    FP8_WEIGHTS,
    INT4_GROUPS,
    PLAIN,
    CodeFormat,
    Dispatch,
    Operand,
    PackedStack,
    PackedWeight,
    Quantized,
    Unscaled,
    codes_of,
    not_taken,
    tokens_of,
    values_of,
)
from octavo.ops.triton.argmax import argmax
from octavo.ops.triton.attention import attend, attention
from octavo.ops.triton.block_linear import block_linear
from octavo.ops.triton.decode import decode_variant
from octavo.ops.triton.elementwise import combine_norm_quantize, gelu, layer_norm, quantize, rms_norm, silu_mul
from octavo.ops.triton.expanded_attention import expanded_attention
from octavo.ops.triton.experts import grouped_linear
from octavo.ops.triton.index_keys import write_index_keys
from octavo.ops.triton.int4 import GROUPS, int4_product, laid_out, uses_w4a8
from octavo.ops.triton.latent_attention import latent_attention
from octavo.ops.triton.latent_write import absorbed_queries, head_linear, write_latent
from octavo.ops.triton.linear import MAX_TOKENS, small_linear
from octavo.ops.triton.rope import rope_write_kv
from octavo.ops.triton.rotate import rotate
from octavo.ops.triton.routing import combine, dispatch, route
from octavo.ops.triton.sample import sample
from octavo.ops.triton.segment_attention import captures_segments, segment_attention
from octavo.ops.triton.select_keys import select_keys
from octavo.ops.triton.weight_only import codes_in_pairs, widened
from octavo.platform import Platform
from octavo.quant.qtensor import QTensor
from octavo.quant.scheme import FP8_W8A16, Granularity

__all__ = [
    "LINEAR",
    "STACKS",
    "Grouped",
    "ScaledMM",
    "absorbed_queries",
    "argmax",
    "attend",
    "attention",
    "captures_segments",
    "combine",
    "combine_norm_quantize",
    "decode_variant",
    "dispatch",
    "expanded_attention",
    "gelu",
    "head_linear",
    "latent_attention",
    "layer_norm",
    "rms_norm",
    "rope_write_kv",
    "rotate",
    "route",
    "sample",
    "segment_attention",
    "select_keys",
    "silu_mul",
    "write_index_keys",
    "write_latent",
]

# torch._scaled_mm is faster with per-tensor scales than with per-row and per-column ones: for up to UNSCALED_TOKENS tokens, and
# for any number of tokens if K exceeds UNSCALED_DEPTH (5% at 8192 tokens of K = 14,336, the card at its power limit).
UNSCALED_TOKENS, UNSCALED_DEPTH = 1024, 8192
TOKENS_AT_ONCE = 2048  # of two rows of codes each, whose products are twice as large as their sums
# Activations that are not rounded: from so many tokens on, codes widened to BF16 in memory, so many at a time, cost less than
# two codes a value, if the reader scales the product.
WIDENED_TOKENS, WIDENED_CODES = 1536, 64 << 20


def _foreign(q: QTensor, platform: Platform) -> str | None:
    """None, or why the device's FP8 tensor cores do not multiply these codes. None of them multiplies e5m2 by e5m2."""
    if q.data.dtype is platform.fp8_dtype:
        return None
    return f"its codes are {q.data.dtype}, and this device multiplies {platform.fp8_dtype}"


def _unfit(q: QTensor, platform: Platform) -> str | None:
    """None, or why torch._scaled_mm does not multiply by these codes."""
    if (reason := _foreign(q, platform)) is not None:
        return reason
    if any(size % platform.fp8_alignment for size in q.data.shape):
        return f"sides of {q.data.shape[0]} and {q.data.shape[1]}, not multiples of {platform.fp8_alignment}"
    return None


def quantized(x: Operand, form: CodeFormat) -> Quantized:
    """x [M, K] in this format: the codes that it holds, or made of its values."""
    return codes_of(x, form) or quantize(values_of(x), form.dtype, form.width, form.granularity)


class ScaledMM:
    """FP8 with one scale per token and one per output channel."""

    name = "Triton for few tokens, torch._scaled_mm for many"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return not_taken(q.scheme, FP8_ROWS) or _unfit(q, platform)

    def pack(self, q: QTensor, platform: Platform) -> PackedScaledMM:
        return PackedScaledMM(q)


class PackedScaledMM(PackedWeight):
    """Codes [N', K'] and channel scales [1, N'], padded to the alignment of the FP8 tensor cores."""

    def __init__(self, q: QTensor):
        assert q.scale is not None
        self.weight, (self.n, self.k) = q.data, q.shape
        self.scale = F.pad(q.scale, (0, 0, 0, q.data.shape[0] - self.n), value=1.0).view(1, -1)
        self.one = torch.ones((), dtype=torch.float32, device=q.data.device)
        self.held_bytes = q.nbytes
        self.reads: CodeFormat = CodeFormat(q.data.dtype, Granularity.ROW, q.data.shape[1])

    def __call__(self, x: Operand) -> Tensor:
        return self._product(self.codes(x)).to(_dtype(x))

    def biased(self, x: Operand, bias: Tensor) -> Tensor:
        given = codes, scale = self.codes(x)
        if codes.shape[0] <= MAX_TOKENS or self.n != self.weight.shape[0] or bias.dtype is not torch.bfloat16:
            return self._product(given).to(_dtype(x)).add_(bias)
        return self._scaled_mm(codes, scale, self.scale, bias).to(_dtype(x))

    def unscaled(self, x: Operand) -> Tensor | Unscaled:
        if _dtype(x) is not torch.bfloat16:
            return self(x)
        codes, scale = given = self.codes(x)
        faster = codes.shape[0] <= UNSCALED_TOKENS or self.reads.width > UNSCALED_DEPTH
        if codes.shape[0] <= MAX_TOKENS or not faster or self.n != self.weight.shape[0]:
            return self._product(given)
        return Unscaled(self._scaled_mm(codes, self.one, self.one), scale, self.scale)

    def _product(self, given: Quantized) -> Tensor:
        """The scaled product in BF16, [M, N]."""
        if len(given.codes) <= MAX_TOKENS:
            return small_linear(given, self.weight, self.scale, self.n)
        return self.scaled(given)

    def scaled(self, given: Quantized) -> Tensor:
        """The same by the library, whatever the number of tokens."""
        return self._scaled_mm(*given, self.scale)[:, : self.n]

    def _scaled_mm(self, codes: Tensor, by_row: Tensor, by_column: Tensor, bias: Tensor | None = None) -> Tensor:
        """FP8 tensor cores keep about 14 bits of their sums (use_fast_accum). This adds 0.13% of noise at K = 4096 and 0.29% at
        14,336 (one H200) to the 3.7% of rounding both factors to FP8, and saves a tenth of a product's time and power.
        """
        return torch._scaled_mm(
            codes, self.weight.mT, scale_a=by_row, scale_b=by_column, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def codes(self, x: Operand) -> Quantized:
        """x [M, K] quantized in the format that this weight reads."""
        return quantized(x, self.reads)


def _dtype(x: Operand) -> torch.dtype:
    """The dtype of x times a weight: BF16 if x has no dense values."""
    dense = x if isinstance(x, Tensor) else x.dense
    return torch.bfloat16 if dense is None else dense.dtype


class Blocks:
    """FP8 with one scale per 128x128 tile of the weight and one per 128 activations of a token."""

    name = "Triton, tiles of 128x128"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return not_taken(q.scheme, FP8_BLOCKS) or _foreign(q, platform)

    def pack(self, q: QTensor, platform: Platform) -> PackedBlocks:
        return PackedBlocks(q)


class PackedBlocks(PackedWeight):
    """Codes [N', K'] and the grid of the tiles' scales."""

    def __init__(self, q: QTensor):
        assert q.scale is not None
        self.weight, self.scale, self.held_bytes = q.data, q.scale, q.nbytes
        self.n, self.k = q.shape
        self.reads: CodeFormat = CodeFormat(q.data.dtype, Granularity.BLOCK, q.data.shape[1])

    def __call__(self, x: Operand) -> Tensor:
        return self._product(self.codes(x)).to(_dtype(x))

    def codes(self, x: Operand) -> Quantized:
        """x [M, K] quantized in the format that this weight reads."""
        return quantized(x, self.reads)

    def _product(self, given: Quantized) -> Tensor:
        """The product in BF16, [M, N]."""
        return block_linear(*given, self.weight, self.scale, self.n)


class WeightOnly:
    """FP8 with one scale per output channel, multiplied by values as they are."""

    name = "of two codes a value, Triton for few tokens, torch._scaled_mm for more, and torch, of widened ones, for many"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return not_taken(q.scheme, FP8_WEIGHTS) or _unfit(q, platform)

    def pack(self, q: QTensor, platform: Platform) -> PackedWeightOnly:
        return PackedWeightOnly(q)


class PackedWeightOnly(PackedWeight):
    """The weight as PackedScaledMM has it, whose products of a value's two codes are added."""

    def __init__(self, q: QTensor):
        self.codes = PackedScaledMM(q)
        self.held_bytes = self.codes.held_bytes

    def __call__(self, x: Operand) -> Tensor:
        x, own = values_of(x), self.codes
        if len(x) <= MAX_TOKENS:
            pairs = codes_in_pairs(x, own.reads.dtype, own.reads.width, adjacent=True)
            return small_linear(pairs, own.weight, own.scale, own.n, pairs=True).to(x.dtype)
        out = x.new_empty(len(x), own.n, dtype=torch.bfloat16)
        for start in range(0, len(x), TOKENS_AT_ONCE):
            part = slice(start, min(start + TOKENS_AT_ONCE, len(x)))
            both = own.scaled(codes_in_pairs(x[part], own.reads.dtype, own.reads.width, adjacent=False))
            torch.add(*both.chunk(2), out=out[part])
        return out.to(x.dtype)

    def unscaled(self, x: Operand) -> Tensor | Unscaled:
        x, codes = values_of(x), self.codes.weight
        if len(x) < WIDENED_TOKENS or x.dtype is not torch.bfloat16 or codes.shape != (self.codes.n, x.shape[1]):
            return self(x)
        out, rows = x.new_empty(len(x), self.codes.n), max(1, WIDENED_CODES // x.shape[1])
        for start in range(0, self.codes.n, rows):
            part = slice(start, start + rows)
            torch.mm(x, widened(codes[part]).mT, out=out[:, part])
        return Unscaled(out, torch.ones(len(x), 1, device=x.device), self.codes.scale)

    def shared_bytes(self, q: QTensor) -> int:
        return self.codes.shared_bytes(q)


class ExactFew:
    """FP8 with one scale per output channel, multiplied by few tokens' values as they are, and by codes of more."""

    name = f"of two codes a value, Triton for up to {FEW_TOKENS} tokens, and torch._scaled_mm of codes for more"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return not_taken(q.scheme, FP8_EXACT_FEW) or _unfit(q, platform)

    def pack(self, q: QTensor, platform: Platform) -> PackedExactFew:
        return PackedExactFew(q)


class PackedExactFew(PackedWeightOnly):
    """One PackedScaledMM, whose few tokens PackedWeightOnly multiplies, and more it does itself, fused as it ever is."""

    def at(self, tokens: int) -> PackedWeightOnly | PackedScaledMM:
        return self if tokens <= FEW_TOKENS else self.codes

    def __call__(self, x: Operand) -> Tensor:
        return super().__call__(x) if tokens_of(x) <= FEW_TOKENS else self.codes(x)

    def unscaled(self, x: Operand) -> Tensor | Unscaled:
        return self(x) if tokens_of(x) <= FEW_TOKENS else self.codes.unscaled(x)

    def biased(self, x: Operand, bias: Tensor) -> Tensor:
        return super().biased(x, bias) if tokens_of(x) <= FEW_TOKENS else self.codes.biased(x, bias)


class Dense:
    """BF16 weights, multiplied by the library."""

    name = "torch"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return not_taken(q.scheme, PLAIN)

    def pack(self, q: QTensor, platform: Platform) -> PackedDense:
        return PackedDense(q)


class PackedDense(PackedWeight):
    """A weight [N, K] as stored."""

    def __init__(self, q: QTensor):
        self.weight, self.held_bytes = q.data, q.nbytes

    def __call__(self, x: Operand) -> Tensor:
        x = values_of(x)
        return F.linear(x, self.weight.to(x.dtype))

    def biased(self, x: Operand, bias: Tensor) -> Tensor:
        x = values_of(x)
        return F.linear(x, self.weight.to(x.dtype), bias.to(x.dtype))


class Grouped:
    """Expert stacks in BF16, in FP8 with per-token and per-channel scales or with 128x128 tiles, and in FP8 that is multiplied
    by values in BF16, of few tokens or of all."""

    name = "Triton, grouped"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        if (reason := not_taken(q.scheme, PLAIN | FP8_ROWS | FP8_EXACT_FEW | FP8_WEIGHTS | FP8_BLOCKS)) is not None:
            return reason
        return _foreign(q, platform) if q.scheme.quantized else None

    def pack(self, q: QTensor, platform: Platform) -> PackedGrouped:
        return PackedGrouped(q)


class PackedGrouped(PackedStack):
    """Codes or values [E, N', K'] and the codes' scales, as stored. few: the same as few tokens are multiplied by it."""

    def __init__(self, q: QTensor):
        self.experts, self.n, self.k = q.shape
        self.weight, self.scale, self.held_bytes = q.data, q.scale, q.nbytes
        if q.scheme.activation is not None:
            self.reads = CodeFormat(q.data.dtype, q.scheme.activation, q.data.shape[2])
        self.by_tile = q.scheme.activation is Granularity.BLOCK
        self.few = PackedGrouped(replace(q, scheme=FP8_W8A16)) if q.scheme.exact_few else None

    def at(self, tokens: int) -> PackedGrouped:
        return self.few if self.few is not None and tokens <= FEW_TOKENS else self

    def __call__(self, x: Operand, dispatch: Dispatch, *, of_tokens: bool) -> Tensor:
        if self.reads is None:
            y = grouped_linear(values_of(x), None, self.weight, self.scale, self.n, dispatch, of_tokens=of_tokens)
            return y.to(_dtype(x))
        codes, scale = quantized(x, self.reads)
        return grouped_linear(
            codes, scale, self.weight, self.scale, self.n, dispatch, of_tokens=of_tokens, by_tile=self.by_tile
        ).to(_dtype(x))


class PackedInt4:
    """Group-wise INT4, two codes in a byte, for dense weights and expert stacks.

    Activations stay in BF16 (W4A16), except where `octavo.ops.triton.int4.uses_w4a8` says that FP8 was measured to be faster:
    there they are quantized to FP8 with one scale per token (W4A8), as the FP8 schemes do for any number of tokens.
    """

    name = "Triton, packed INT4"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        if (reason := not_taken(q.scheme, INT4_GROUPS)) is not None:
            return reason
        if q.data.dtype is not torch.uint8:
            return f"its codes are {q.data.dtype}, not two in each byte"
        if q.scheme.group not in GROUPS:
            return f"its groups are of {q.scheme.group} values, and these kernels take {' and '.join(map(str, GROUPS))}"
        return None


class Int4(PackedInt4):
    """INT4 for dense weights [N, K]."""

    def pack(self, q: QTensor, platform: Platform) -> Int4Weight:
        return Int4Weight(q, platform.fp8_dtype)


class Int4Experts(PackedInt4):
    """INT4 for expert stacks [E, N, K]."""

    def pack(self, q: QTensor, platform: Platform) -> Int4Stack:
        return Int4Stack(q, platform.fp8_dtype)


class Int4Weight(PackedWeight):
    """Codes [N, bytes] and BF16 scales [N, groups], as stored, with rows padded to whole steps of the kernel."""

    def __init__(self, q: QTensor, fp8: torch.dtype):
        assert q.scale is not None
        self.codes, self.scale = laid_out(q.data, q.scale, q.scheme.group)
        self.group, self.fp8, self.held_bytes = q.scheme.group, fp8, self.codes.nbytes + self.scale.nbytes

    def __call__(self, x: Operand) -> Tensor:
        x = values_of(x)
        fp8 = self.fp8 if uses_w4a8(len(x), self.group, dense=True) else None
        return int4_product(x, self.codes.unsqueeze(0), self.scale.unsqueeze(0), self.group, fp8=fp8)


class Int4Stack(PackedStack):
    """Codes [E, N, bytes] and BF16 scales [E, N, groups]; each expert is laid out as in Int4Weight."""

    def __init__(self, q: QTensor, fp8: torch.dtype):
        assert q.scale is not None
        self.experts, self.n, self.k = q.shape
        self.codes, self.scale = laid_out(q.data, q.scale, q.scheme.group)
        self.group, self.fp8, self.held_bytes = q.scheme.group, fp8, self.codes.nbytes + self.scale.nbytes

    def __call__(self, x: Operand, dispatch: Dispatch, *, of_tokens: bool) -> Tensor:
        fp8 = self.fp8 if uses_w4a8(len(dispatch.order) / self.experts, self.group, dense=False) else None
        return int4_product(values_of(x), self.codes, self.scale, self.group, dispatch, of_tokens=of_tokens, fp8=fp8)


LINEAR = [ScaledMM(), Blocks(), WeightOnly(), ExactFew(), Int4(), Dense()]
STACKS = [Grouped(), Int4Experts()]
