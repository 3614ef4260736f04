"""Quantization schemes: the dtype of a weight's values, and the granularity of weight and activation scales.

FP8 has 3 mantissa bits, so a value is stored to within 1/16 of itself, but only over a range of about 2^18 (e4m3).
A scale moves a group of values into that range. The smaller the group, the fewer values an outlier affects:

    scheme      weight             activation           also called
    bf16        no scale           no scale
    fp8         one a matrix       one a token          fp8_per_tensor
    ptpc_fp8    one a channel      one a token          fp8_per_channel
    fp8_block   one a 128x128 tile one a 1x128 group    fp8_per_block, DeepSeek's format
    fp8_w8a16   one a channel      no scale

Scales per channel and per token can be applied in the epilogue of the matrix product, so those two schemes run at full speed
on FP8 tensor cores. A tile's scale must be applied in the mainloop, to every partial sum of 128 products.
fp8_w8a16 has ptpc_fp8's codes, each widened where it is multiplied by activations that are not rounded: as fast where reading
the weight bounds the product, and as slow as BF16 where arithmetic does. `with_exact_few` is both: activations of few tokens
stay as they are, and those of more are codes.

INT4 cannot be asked for. Some checkpoints store experts in it, with a scale per 32 or 128 values of a row. Its codes, -8 to 7,
stay packed, two a byte, and are multiplied by unquantized activations (W4A16).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

__all__ = [
    "BF16", "BLOCK", "FEW_TOKENS", "FP8_BLOCK", "FP8_PER_CHANNEL", "FP8_PER_TENSOR", "FP8_W8A16", "INT4", "SCHEMES",
    "Granularity", "Scheme", "WeightDType", "int4_of",
]  # fmt: skip

BLOCK = 128  # side of a weight tile, and length of an activation group
FEW_TOKENS = 32  # the most of a product whose activations stay as they are in a scheme `with_exact_few`


class WeightDType(Enum):
    """The dtype of a weight's values."""

    BF16 = "bf16"  # unquantized, in the model's dtype
    FP8 = "fp8"
    INT4 = "int4"


class Granularity(Enum):
    """Which values share one scale."""

    TENSOR = "tensor"
    ROW = "row"  # an output channel of a weight, or a token's activations
    BLOCK = "block"  # a 128x128 tile of a weight, or 128 activations of a token
    GROUP = "group"  # `Scheme.group` values of a weight's row


@dataclass(frozen=True)
class Scheme:
    """A weight's dtype, and the granularity of its scales and of its activations' scales; None: no scales.

    `group`: the length of a weight's groups, 0 without them. `exact_few`: activations of at most FEW_TOKENS tokens stay as they
    are. Raises ValueError for a contradiction.
    """

    name: str
    dtype: WeightDType = WeightDType.BF16
    weight: Granularity | None = None
    activation: Granularity | None = None
    group: int = 0
    exact_few: bool = False

    def __post_init__(self) -> None:
        if (self.dtype is WeightDType.BF16) != (self.weight is None):
            raise ValueError(f"{self.name}: values have no scale, codes need one")
        if (self.weight is Granularity.GROUP) != (self.group > 0):
            raise ValueError(f"{self.name}: a group's length belongs to scales a group, and to no others")
        if self.exact_few and self.activation is not Granularity.ROW:
            raise ValueError(f"{self.name}: activations of few tokens differ from others only if these have a scale a token")

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored as codes with scales."""
        return self.dtype is not WeightDType.BF16

    def activation_of(self, tokens: int) -> Granularity | None:
        """The granularity of the scales of so many tokens' activations; None: they stay as they are."""
        return None if self.exact_few and tokens <= FEW_TOKENS else self.activation

    @property
    def with_exact_few(self) -> Scheme:
        """The same codes, whose products of at most FEW_TOKENS tokens are of activations as they are."""
        return replace(self, name=f"{self.name}+decode_bf16", exact_few=True)

    def has_codes_of(self, other: Scheme) -> bool:
        """Whether a weight in `other` is one in this scheme too, whatever becomes of activations. A scale of a whole matrix is
        held as one of each channel."""
        by_row = (Granularity.TENSOR, Granularity.ROW)
        weight_only = self.weight is Granularity.ROW and self.activation is None
        return self.dtype is other.dtype and (self.weight is other.weight or (weight_only and other.weight in by_row))

    @property
    def kind(self) -> str:
        """The scheme in words: "fp8 with a scale a row, activations with a scale a row"."""
        if self.weight is None:
            return self.dtype.value
        length = f" of {self.group}" if self.weight is Granularity.GROUP else ""
        activations = "as they are" if self.activation is None else f"with a scale a {self.activation.value}"
        if self.exact_few:
            activations += f", of up to {FEW_TOKENS} tokens as they are"
        return f"{self.dtype.value} with a scale a {self.weight.value}{length}, activations {activations}"


_FP8, _ROW, _BLOCK = WeightDType.FP8, Granularity.ROW, Granularity.BLOCK
BF16 = Scheme("bf16")
FP8_PER_TENSOR = Scheme("fp8", _FP8, Granularity.TENSOR, _ROW)
FP8_PER_CHANNEL = Scheme("ptpc_fp8", _FP8, _ROW, _ROW)
FP8_BLOCK = Scheme("fp8_block", _FP8, _BLOCK, _BLOCK)
FP8_W8A16 = Scheme("fp8_w8a16", _FP8, _ROW, None)


@cache
def int4_of(group: int) -> Scheme:
    """Packed INT4 with a scale per `group` values of a row. Returns the same object for the same group."""
    return Scheme("int4" if group == 32 else f"int4_g{group}", WeightDType.INT4, Granularity.GROUP, None, group)


INT4 = int4_of(32)
# Those that a user may ask for.
SCHEMES = {scheme.name: scheme for scheme in (BF16, FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK, FP8_W8A16)}
