"""FP8 products of few tokens by weights of which every part of a CTA fits in shared memory, csrc/few_tokens_gemm.cu."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_ubyte, c_void_p

import torch
from torch import Tensor

from octavo.ops import gpu
from octavo.ops.contract import Quantized
from octavo.ops.hopper.compile import Kernels, no_warpgroups, tensor_map
from octavo.ops.triton.linear import MAX_TOKENS
from octavo.platform import Platform
from octavo.quant.qtensor import QTensor
from octavo.quant.scheme import BLOCK

__all__ = ["BLOCK_KERNELS", "KERNELS", "SPLITS", "PackedScaledMM", "ScaledMM", "multiply", "splits_of"]

SPLITS = 2, 4, 8  # parts of K, the CTAs of a cluster
ROWS, STEPS, RESIDENT = 64, 8, 2  # rows and most K steps of a CTA, CTAs that an SM has room for
KERNELS, BLOCK_KERNELS = (
    Kernels(
        "few_tokens_gemm.cu", "few_tokens_product", "products of few tokens are Triton's", ("SPLITS",), [(n,) for n in SPLITS],
        BLOCKS=blocks,
    ) for blocks in (0, 1)
)  # fmt: skip


class _Few(ctypes.Structure):
    _fields_ = [
        ("weight", c_ubyte * 128), ("x", c_ubyte * 128), *((name, c_void_p) for name in ("by_row", "by_token", "out")),
        *((name, c_int32) for name in ("tokens", "rows", "steps")), ("padding", c_ubyte * 28),  # pads to 64 bytes
    ]  # fmt: skip


def splits_of(rows: int, depth: int, units: int) -> int | None:
    """Into how many parts K is split: the most whose CTAs have an SM each, or the fewest that are all resident. None: there is
    no such number.
    """
    tiles, steps = -(-rows // ROWS), -(-depth // BLOCK)
    fit = [n for n in SPLITS if steps <= n * STEPS and tiles * n <= RESIDENT * units and n <= steps]
    return max((n for n in fit if tiles * n <= units), default=min(fit, default=None))


def multiply(given: Quantized, w: gpu.PackedScaledMM | gpu.PackedBlocks, splits: int) -> Tensor | None:
    """BF16 [M, n] of codes [M, K'], M at most MAX_TOKENS, whose scales are one a row or, as a weight's tiles have them, one for
    each 128 codes. None if the kernel is not available.
    """
    codes, scale = given
    kernels = BLOCK_KERNELS if isinstance(w, gpu.PackedBlocks) else KERNELS
    if (kernel := kernels.kernel((splits,), codes.device)) is None:
        return None
    (tokens, depth), rows = codes.shape, len(w.weight)
    out = torch.empty(tokens, w.n, dtype=torch.bfloat16, device=codes.device)
    if not tokens:
        return out
    maps = (
        tensor_map(w.weight, (depth, rows), (depth,), (BLOCK, ROWS)),
        tensor_map(codes, (depth, tokens), (depth,), (BLOCK, MAX_TOKENS)),
    )
    arguments = _Few(
        *((c_ubyte * 128).from_buffer_copy(one) for one in maps), w.scale.data_ptr(), scale.data_ptr(), out.data_ptr(), tokens,
        w.n, -(-depth // BLOCK),
    )  # fmt: skip
    kernel.launch(-(-rows // ROWS) * splits, arguments, early=True)
    return out


class ScaledMM(gpu.ScaledMM):
    """As the base class, with products of few tokens by csrc/few_tokens_gemm.cu where the weight is not too large for it."""

    name = "WGMMA or Triton for few tokens, torch._scaled_mm for many"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return super().supports(q, platform) or no_warpgroups(platform)

    def pack(self, q: QTensor, platform: Platform) -> PackedScaledMM:
        KERNELS.configure(platform)
        return PackedScaledMM(q, platform.multiprocessors)


class PackedScaledMM(gpu.PackedScaledMM):
    """As the base class. splits: those of K for few tokens; None: they are Triton's."""

    def __init__(self, q: QTensor, units: int):
        super().__init__(q)
        rows, depth = self.weight.shape
        self.splits = splits_of(rows, depth, units) if self.n % 8 == 0 else None

    def _product(self, given: Quantized) -> Tensor:
        if len(given.codes) <= MAX_TOKENS and self.splits is not None:
            found = multiply(given, self, self.splits)
            if found is not None:
                return found
        return super()._product(given)
