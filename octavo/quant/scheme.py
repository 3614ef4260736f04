"""A scheme says which values share a scale: of a weight, and of the activations it meets.

FP8 has 3 mantissa bits, so a value is stored to within 1/16 of itself, but only over a range of about 2^18 (e4m3).
A scale moves a group of values into that range. The smaller the group, the less one outlier costs the others:

    scheme      weight             activation           also called
    bf16        no scale           no scale
    fp8         one a matrix       one a token          fp8_per_tensor
    ptpc_fp8    one a channel      one a token          fp8_per_channel
    fp8_block   one a 128x128 tile one a 1x128 group    fp8_per_block, DeepSeek's format

A channel's or a token's scale can be applied after the matrix product, so those two run at full speed on FP8 matrix
units. A tile's scale must be applied to every partial sum of 128 products.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["BF16", "BLOCK", "FP8_BLOCK", "FP8_PER_CHANNEL", "FP8_PER_TENSOR", "SCHEMES", "Granularity", "Scheme"]

BLOCK = 128  # side of a tile and length of a group


class Granularity(Enum):
    """Which values share one scale."""

    TENSOR = "tensor"
    ROW = "row"  # an output channel of a weight, a token of activations
    BLOCK = "block"


@dataclass(frozen=True)
class Scheme:
    """Scale granularity of weights and of activations; None keeps the weight as it is."""

    name: str
    weight: Granularity | None = None
    activation: Granularity | None = None

    @property
    def quantized(self) -> bool:
        return self.weight is not None


BF16 = Scheme("bf16")
FP8_PER_TENSOR = Scheme("fp8", Granularity.TENSOR, Granularity.ROW)
FP8_PER_CHANNEL = Scheme("ptpc_fp8", Granularity.ROW, Granularity.ROW)
FP8_BLOCK = Scheme("fp8_block", Granularity.BLOCK, Granularity.BLOCK)
SCHEMES = {scheme.name: scheme for scheme in (BF16, FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK)}
