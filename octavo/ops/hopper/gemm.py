"""Common host code of the GEMMs built on csrc/gemm_mainloop.cuh: choice of a variant, and their arguments."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_int32, c_ubyte
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops import gpu
from octavo.ops.contract import Operand, PackedWeight, tokens_of
from octavo.ops.hopper.compile import no_warpgroups, tensor_map
from octavo.ops.triton import launch
from octavo.ops.triton.linear import MAX_TOKENS
from octavo.platform import Platform

__all__ = [
    "DEPTH",
    "OPTIONS",
    "OUT_BOX",
    "TOKENS",
    "Product",
    "Variant",
    "box_of",
    "choose",
    "num_ctas",
    "refusal",
]

log = logging.getLogger(__name__)

TOKENS, DEPTH = 128, 128  # tile's tokens and K step, as in gemm_mainloop.cuh
FEW_TOKENS = 4 * TOKENS  # of so many tokens a last tile that is not full counts
OPTIONS = "CLUSTER", "HALF", "SPLIT"  # the fields of a Variant
OUT_BOX = 128, 16  # bytes and tokens of a TMA box of results


class Variant(NamedTuple):
    """CTAs of a cluster that share the weight's rows; half of a tile's rows; CTAs of a cluster that share a tile (split-K)."""

    cluster: int
    half: int
    split: int = 1


# Cost model, in units of a tile's rows at Llama-3.1-8B's K: a tile's time besides its products, and the relative slowdown of
# products without a cluster that shares the weight (one H100).
AFTERWARDS, ALONE = 8, 1.06


def choose(variants: Sequence[Variant], tokens: int, rows: int, units: int) -> Variant:
    """The variant with the shortest estimated time for a weight of this many rows, from the number of tiles per CTA."""

    def took(v: Variant) -> float:
        tiles, places = -(-tokens // (TOKENS * v.cluster)) * -(-rows // (2 * v.half)), units // v.cluster
        return -(-tiles // places) * (v.half * (ALONE if v.cluster == 1 else 1.0) + AFTERWARDS)

    return min(variants, key=took)


def refusal(platform: Platform, x: Operand, w: PackedWeight) -> str | None:
    """None, or the reason why these kernels do not multiply such tokens by `w`."""
    if (reason := no_warpgroups(platform)) is not None:
        return reason
    if not isinstance(w, gpu.PackedScaledMM) or w.reads.dtype is not torch.float8_e4m3fn:
        return "not a weight of e4m3 with a scale a row"
    dense = x if isinstance(x, Tensor) else x.dense
    if dense is not None and dense.dtype is not torch.bfloat16:
        return "not BF16 activations"
    if tokens_of(x) <= MAX_TOKENS:
        return f"not more than {MAX_TOKENS} tokens"
    return None


def box_of(tokens: int) -> int:
    """Tokens of a TMA box: a tile's, or half, where the last of few tiles needs one of two.

    TMA fills rows beyond the end slower than it loads rows.
    """
    return TOKENS // 2 if tokens < FEW_TOKENS and 0 < tokens % TOKENS <= TOKENS // 2 else TOKENS


class Product(ctypes.Structure):
    """The arguments that all of these kernels begin with."""

    _fields_ = [
        ("maps", c_ubyte * 128 * 2), *((name, c_int32) for name in ("tokens", "across", "steps", "second", "box")),
        ("padding", c_ubyte * 44),  # pads to 64 bytes
    ]  # fmt: skip

    @classmethod
    def of(cls, codes: Tensor, weight: Tensor, half: int, across: int, second: int) -> Product:
        """Arguments for codes [M, K'] by a weight [N, K'], in `across` tiles of two halves of `half` rows, the halves `second`
        rows apart.
        """
        (tokens, depth), rows, box = codes.shape, weight.shape[0], box_of(len(codes))
        maps = (
            tensor_map(codes, (depth, tokens), (depth,), (DEPTH, box)),
            tensor_map(weight, (depth, rows), (depth,), (DEPTH, half)),
        )
        return cls((c_ubyte * 128 * 2).from_buffer_copy(b"".join(maps)), tokens, across, -(-depth // DEPTH), second, box)


def num_ctas(variant: Variant) -> int:
    size = variant.cluster * variant.split  # of a cluster
    return launch.device_units() // size * size
