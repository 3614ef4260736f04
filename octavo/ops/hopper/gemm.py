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
from octavo.ops.contract import Operand, PackedWeight
from octavo.ops.hopper.compile import no_warpgroups, tensor_map
from octavo.ops.triton import launch
from octavo.ops.triton.linear import MAX_TOKENS
from octavo.platform import Platform

__all__ = ["OPTIONS", "OUT_BOX", "TOKENS", "Product", "Variant", "choose", "num_ctas", "refusal", "tokens_of"]

log = logging.getLogger(__name__)

TOKENS, DEPTH = 128, 128  # tile's tokens and K step, as in gemm_mainloop.cuh
OPTIONS = "CLUSTER", "HALF"  # the fields of a Variant
OUT_BOX = 128, 16  # bytes and tokens of a TMA box of results


class Variant(NamedTuple):
    """CTAs of a cluster, which share the weight's rows, and half of a tile's rows."""

    cluster: int
    half: int


# Cost model, in units of a tile's rows at Llama-3.1-8B's K: a tile's time besides its products, and the relative slowdown of
# products without a cluster that shares the weight (one H100).
AFTERWARDS, ALONE = 8, 1.06


def choose(variants: Sequence[Variant], tokens: int, rows: int, units: int) -> Variant:
    """The variant with the shortest estimated time for a weight of this many rows, from the number of tiles per CTA."""

    def took(v: Variant) -> float:
        tiles, places = -(-tokens // (TOKENS * v.cluster)) * -(-rows // (2 * v.half)), units // v.cluster
        return -(-tiles // places) * (v.half * (ALONE if v.cluster == 1 else 1.0) + AFTERWARDS)

    return min(variants, key=took)


def tokens_of(x: Operand) -> int:
    return len(x) if isinstance(x, Tensor) else x.tokens


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


class Product(ctypes.Structure):
    """The arguments that all of these kernels begin with."""

    _fields_ = [
        ("maps", c_ubyte * 128 * 2), *((name, c_int32) for name in ("tokens", "across", "steps", "second")),
        ("padding", c_ubyte * 48),  # pads to 64 bytes
    ]  # fmt: skip

    @classmethod
    def of(cls, codes: Tensor, weight: Tensor, half: int, across: int, second: int) -> Product:
        """Arguments for codes [M, K'] by a weight [N, K'], in `across` tiles of two halves of `half` rows, the halves `second`
        rows apart.
        """
        (tokens, depth), rows = codes.shape, weight.shape[0]
        maps = (
            tensor_map(codes, (depth, tokens), (depth,), (DEPTH, TOKENS)),
            tensor_map(weight, (depth, rows), (depth,), (DEPTH, half)),
        )
        return cls((c_ubyte * 128 * 2).from_buffer_copy(b"".join(maps)), tokens, across, -(-depth // DEPTH), second)


def num_ctas(variant: Variant) -> int:
    return launch.device_units() // variant.cluster * variant.cluster
