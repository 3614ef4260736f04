"""FP8 from its definition, in numpy's float64: what Octavo's conversions are held against. Shares no code with octavo."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """An FP8 format: its exponent's width and bias, which codes are not numbers, and the magnitude that codes stay under."""

    dtype: torch.dtype
    exponent_bits: int
    bias: int
    not_numbers: tuple[int, ...]
    limit: float

    @cached_property
    def values(self) -> Array:
        """What each of the 256 codes stands for; NaN for those that are no finite number."""
        mantissa_bits = 7 - self.exponent_bits
        out = np.empty(256)
        for code in range(256):
            exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (1 << mantissa_bits) - 1
            fraction = mantissa / (1 << mantissa_bits)
            size = fraction * 2.0 ** (1 - self.bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - self.bias)
            out[code] = -size if code & 0x80 else size
        out[list(self.not_numbers)] = np.nan
        return out

    def nearest(self, x: Array) -> Codes:
        """The codes nearest to x, which is clamped to the limit first; a tie goes to the even code."""
        table = self.values[:0x80]
        table = table[table <= self.limit]  # NaN compares false
        size = np.minimum(np.abs(x), self.limit)
        above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
        below = above - 1
        up = (table[above] - size < size - table[below]) | ((table[above] - size == size - table[below]) & (above % 2 == 0))
        code = np.where(up, above, below)
        negative = np.signbit(x) & ((code > 0) | (0x80 not in self.not_numbers))
        return (code | np.where(negative, 0x80, 0)).astype(np.uint8)


E4M3FN = Format(torch.float8_e4m3fn, 4, 7, (0x7F, 0xFF), 448.0)
E4M3FNUZ = Format(torch.float8_e4m3fnuz, 4, 8, (0x80,), 224.0)
E5M2 = Format(torch.float8_e5m2, 5, 15, (*range(0x7C, 0x80), *range(0xFC, 0x100)), 57344.0)
FORMATS = {"e4m3fn": E4M3FN, "e4m3fnuz": E4M3FNUZ, "e5m2": E5M2}


def quantize(x: Array, tile: tuple[int, int], fmt: Format, floor: float = 0.0) -> tuple[Codes, Array]:
    """(codes, one scale a tile) of x, whose values are FP32's. Scales and quotients are rounded to FP32, as contracted."""
    (n, k), (height, width) = x.shape, tile
    rows, columns = -(-n // height), -(-k // width)
    tiles = np.zeros((rows * height, columns * width))
    tiles[:n, :k] = x
    tiles = tiles.reshape(rows, height, columns, width)
    peaks = np.abs(tiles).max((1, 3), initial=0.0)
    scales = np.maximum((peaks / fmt.limit).astype(np.float32), np.float32(floor)).astype(np.float64)
    scales[scales == 0] = 1.0
    quotients = (tiles / scales[:, None, :, None]).astype(np.float32).astype(np.float64)
    return fmt.nearest(quotients).reshape(rows * height, columns * width)[:n, :k], scales


def dequantize(codes: Codes, scales: Array, tile: tuple[int, int], fmt: Format) -> Array:
    """What codes stand for under one scale a tile."""
    n, k = codes.shape
    return fmt.values[codes] * np.repeat(np.repeat(scales, tile[0], 0)[:n], tile[1], 1)[:, :k]


def tile_of(scheme: str, n: int, k: int) -> tuple[int, int]:
    """The values of a weight [n, k] that share a scale."""
    return {"fp8": (n, k), "ptpc_fp8": (1, k), "fp8_w8a16": (1, k), "fp8_block": (128, 128)}[scheme]


def group_of(scheme: str, k: int) -> tuple[int, int]:
    """The values of activations [m, k] that share a scale."""
    return (1, 128) if scheme == "fp8_block" else (1, k)


def linear(x: Array, w: Array, scheme: str, fmt: Format = E4M3FN) -> Array:
    """x [m, k] times w [n, k] transposed, both quantized as the scheme says (fp8_w8a16: w alone), summed in float64."""
    tile, group = tile_of(scheme, *w.shape), group_of(scheme, w.shape[1])
    weight = dequantize(*quantize(w, tile, fmt), tile, fmt)
    return (x if scheme == "fp8_w8a16" else quantized_activation(x, group, fmt)) @ weight.T


def quantized_activation(x: Array, group: tuple[int, int], fmt: Format) -> Array:
    """x as its codes have it; a scale is at least 1 / (448 * 512)."""
    return dequantize(*quantize(x, group, fmt, floor=1 / (448 * 512)), group, fmt)


def array(x: torch.Tensor) -> Array:
    """A tensor's values; float64 holds those of every dtype here."""
    return x.detach().cpu().double().numpy()


def codes_of(x: torch.Tensor) -> Codes:
    """An FP8 tensor's bytes."""
    return x.detach().cpu().view(torch.uint8).numpy()
