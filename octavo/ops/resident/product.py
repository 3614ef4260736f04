"""What products of many tokens by csrc/product.cuh have in common: variants of a kernel, their choice, their arguments."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_int32, c_ubyte
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops import gpu
from octavo.ops.contract import Activation, PackedWeight, Quantized
from octavo.ops.resident.compile import Kernel, NoKernel, compile_cubin, missing, no_warpgroups, tensor_map
from octavo.ops.triton import launch
from octavo.ops.triton.linear import MOST_TOKENS
from octavo.platform import Platform

__all__ = ["OUT_BOX", "TOKENS", "Product", "Variant", "Variants", "choose", "programs", "refusal"]

log = logging.getLogger(__name__)

TOKENS, DEPTH = 128, 128  # of a tile, and of a step over K, as in product.cuh
OUT_BOX = 128, 16  # bytes and tokens of a box of results


class Variant(NamedTuple):
    """Programs that share the weight's rows, and half of a tile's."""

    cluster: int
    half: int


# In units of a tile's rows at Llama-3.1-8B's K: what a tile takes beside its products, and how much longer those take where no
# other program shares the weight (one H100).
AFTERWARDS, ALONE = 8, 1.06


def choose(variants: Sequence[Variant], tokens: int, rows: int, units: int) -> Variant:
    """The variant that is done first with a weight of so many rows, counting tiles that follow one another."""

    def took(v: Variant) -> float:
        tiles, places = -(-tokens // (TOKENS * v.cluster)) * -(-rows // (2 * v.half)), units // v.cluster
        return -(-tiles // places) * (v.half * (ALONE if v.cluster == 1 else 1.0) + AFTERWARDS)

    return min(variants, key=took)


def refusal(arch: str, x: Activation, w: PackedWeight) -> str | None:
    """None, or why such tokens are not multiplied by `w` here."""
    if (reason := no_warpgroups(arch) or missing()) is not None:
        return reason
    if not isinstance(w, gpu.PackedScaledMM) or w.reads is not torch.float8_e4m3fn:
        return "not a weight of e4m3 with a scale a row"
    if isinstance(x, Tensor) and x.dtype is not torch.bfloat16:
        return "not BF16 activations"
    if (x.codes if isinstance(x, Quantized) else x).shape[0] <= MOST_TOKENS:
        return f"not more than {MOST_TOKENS} tokens"
    return None


class Variants:
    """A kernel in variants; `what` it computes is what is the library's where it is not there."""

    def __init__(self, source: str, function: str, what: str, variants: Sequence[Variant]):
        self.source, self.function, self.what, self.variants = source, function, what, variants
        self.arch = ""
        self.compiling, self.kernel, self.refused = cache(self._compiling), cache(self._kernel), cache(self._refused)

    def configure(self, platform: Platform) -> None:
        """The kernels are compiled while the model is loaded: nothing in them depends on it."""
        self.arch = platform.arch
        if no_warpgroups(self.arch) is None and missing() is None:
            self.compiling()

    def _compiling(self) -> dict[Variant, Future[bytes]]:
        pool = ThreadPoolExecutor(len(self.variants))
        started = {
            v: pool.submit(compile_cubin, self.source, "sm_90a", {"CLUSTER": v.cluster, "HALF": v.half}) for v in self.variants
        }
        pool.shutdown(wait=False)
        return started

    def _kernel(self, variant: Variant, device: torch.device) -> Kernel | None:
        """On a device; None, and a warning, where it cannot be compiled or loaded."""
        try:
            return Kernel(self.compiling()[variant].result(), self.function)
        except NoKernel as error:
            log.warning("%s: the library's, %s", self.what, error)
            return None

    def _refused(self, reason: str) -> None:
        """Says so, once."""
        log.info("%s: the library's, %s", self.what, reason)


class Product(ctypes.Structure):
    """The arguments that all kernels begin with."""

    _fields_ = [
        ("maps", c_ubyte * 128 * 2), *((name, c_int32) for name in ("tokens", "across", "steps", "second")),
        ("padding", c_ubyte * 48),  # to 64 bytes
    ]  # fmt: skip

    @classmethod
    def of(cls, codes: Tensor, weight: Tensor, half: int, across: int, second: int) -> Product:
        """Codes [M, K'] by a weight [N, K'], in `across` tiles of twice `half` rows, the halves `second` rows apart."""
        (tokens, depth), rows = codes.shape, weight.shape[0]
        maps = (
            tensor_map(codes, (depth, tokens), (depth,), (DEPTH, TOKENS)),
            tensor_map(weight, (depth, rows), (depth,), (DEPTH, half)),
        )
        return cls((c_ubyte * 128 * 2).from_buffer_copy(b"".join(maps)), tokens, across, -(-depth // DEPTH), second)


def programs(variant: Variant) -> int:
    return launch.device_units() // variant.cluster * variant.cluster
