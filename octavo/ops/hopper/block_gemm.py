"""Products of many tokens by weights with block scales, csrc/block_gemm.cu; and what the fused ones have in common with it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_ubyte, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops import gpu
from octavo.ops.contract import Operand, Quantized, tokens_of
from octavo.ops.hopper import few_tokens
from octavo.ops.hopper.compile import Kernels, no_warpgroups, tensor_map
from octavo.ops.hopper.gemm import DEPTH, OPTIONS, OUT_BOX, TOKENS, Product, Variant, num_ctas
from octavo.ops.triton import launch
from octavo.ops.triton.linear import MAX_TOKENS
from octavo.platform import Platform
from octavo.quant.qtensor import QTensor
from octavo.quant.scheme import BLOCK

__all__ = ["KERNELS", "ROW_KERNELS", "VARIANTS", "BlockProduct", "Blocks", "PackedBlocks", "choose", "multiply", "refusal"]

VARIANTS = Variant(1, 64), Variant(2, 64), Variant(2, 128), Variant(1, 32), Variant(1, 64, 2), Variant(1, 32, 2)
ROW_VARIANTS = VARIANTS[:2]
KERNELS = Kernels("block_gemm.cu", "block_product", "block products of many tokens are Triton's", OPTIONS, VARIANTS, BY_ROW=0)
ROW_KERNELS = Kernels(
    "block_gemm.cu", "block_product", "products of many tokens by rows of tiles are Triton's", OPTIONS, ROW_VARIANTS, BY_ROW=1
)
ALIGNMENT = 16  # bytes, of TMA's strides

# Cost model, µs on one H200 at 256 tokens: of a K step and of a launch, by half and split of a Variant; of a tile besides its
# steps; the slowdown of products without a cluster that shares the weight; and what a launch of such clusters takes longer.
COSTS = {(32, 1): (0.28, 2.3), (64, 1): (0.355, 3.8), (128, 1): (0.67, 4.7), (32, 2): (0.28, 5.1), (64, 2): (0.42, 5.0)}
AFTERWARDS, ALONE, COUPLED = 0.9, 1.02, 1.5


class BlockProduct(ctypes.Structure):
    """The arguments that the kernels of block scales begin with."""

    _fields_ = [
        ("product", Product), ("x_scale", c_void_p), ("weight_scale", c_void_p), ("last_tile", c_int32),
        ("stride", c_int32), ("padding", c_ubyte * 40),  # pads to 64 bytes
    ]  # fmt: skip

    @classmethod
    def of(cls, x: Quantized, w: PackedBlocks, half: int, across: int, second: int) -> BlockProduct:
        """As Product.of, with scales."""
        product, scale = Product.of(x.codes, w.weight, half, across, second), w.scale if w.by_row is None else w.by_row
        return cls(product, x.scale.data_ptr(), scale.data_ptr(), len(scale) - 1, scale.shape[1])


class _Plain(ctypes.Structure):
    _fields_ = [
        ("product", BlockProduct), ("out", c_ubyte * 128), ("rows", c_int32),
        ("padding", c_ubyte * 60),  # pads to 64 bytes
    ]  # fmt: skip


class Blocks(gpu.Blocks):
    """As the base class, with its products of many tokens by csrc/block_gemm.cu.

    kernels: those to compile when a weight whose scales are of tiles is packed.
    """

    name = "WGMMA, or Triton for few tokens by large weights"

    def __init__(self, *kernels: Kernels):
        self.kernels = kernels

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        if (reason := super().supports(q, platform) or no_warpgroups(platform)) is not None:
            return reason
        if any(size % ALIGNMENT for size in q.data.shape):
            return f"sides of {q.data.shape[0]} and {q.data.shape[1]}, not multiples of {ALIGNMENT}"
        return None

    def pack(self, q: QTensor, platform: Platform) -> PackedBlocks:
        packed = PackedBlocks(q, platform.multiprocessors)
        for kernels in self.kernels if packed.by_row is None else (ROW_KERNELS,):
            kernels.configure(platform)
        if packed.splits is not None:
            few_tokens.BLOCK_KERNELS.configure(platform)
        return packed


class PackedBlocks(gpu.PackedBlocks):
    """As the base class. by_row: the scales of rows of tiles, [groups, N'], N' a multiple of 128; None for those of tiles.
    splits: those of K for few tokens; None: they are Triton's.
    """

    def __init__(self, q: QTensor, units: int):
        super().__init__(q)
        self.by_row: Tensor | None = None
        rows, depth = self.weight.shape
        self.splits = few_tokens.splits_of(rows, depth, units) if self.n % 8 == 0 else None
        if len(self.scale) != -(-self.n // BLOCK):
            self.by_row, self.splits = F.pad(self.scale.T, (0, -self.n % BLOCK)).contiguous(), None
            self.held_bytes += self.by_row.nbytes

    def _product(self, given: Quantized) -> Tensor:
        tokens, rows = len(given.codes), len(self.weight)
        if tokens <= MAX_TOKENS and self.splits is not None:
            found = few_tokens.multiply(given, self, self.splits)
            if found is not None:
                return found
        if tokens > MAX_TOKENS:
            out = torch.empty(tokens, rows, dtype=torch.bfloat16, device=given.codes.device)
            variants = VARIANTS if self.by_row is None else ROW_VARIANTS
            if multiply(given, self, out, choose(variants, tokens, self.weight.shape, launch.device_units())):
                return out[:, : self.n]
        return super()._product(given)


def choose(variants: Sequence[Variant], tokens: int, shape: Sequence[int], units: int) -> Variant:
    """The variant with the shortest estimated time for a weight [rows, K] of this shape. Every CTA of a cluster has tokens."""
    rows, depth = shape

    def took(v: Variant) -> float:
        tiles, places = -(-tokens // (TOKENS * v.cluster)) * -(-rows // (2 * v.half)), units // (v.cluster * v.split)
        (step, start), steps, alone = COSTS[v.half, v.split], -(-depth // (DEPTH * v.split)), v.cluster == 1
        return -(-tiles // places) * (steps * step * (ALONE if alone else 1.0) + AFTERWARDS) + start + (0 if alone else COUPLED)

    return min((v for v in variants if v.cluster == 1 or tokens > TOKENS), key=took)


def multiply(x: Quantized, w: PackedBlocks, out: Tensor, variant: Variant) -> bool:
    """Compute out [M, N'] BF16, the product by all of the stored rows. Returns whether the kernel is available."""
    if (kernel := (KERNELS if w.by_row is None else ROW_KERNELS).kernel(variant, out.device)) is None:
        return False
    tokens, rows = out.shape
    given = BlockProduct.of(x, w, variant.half, -(-rows // (2 * variant.half)), variant.half)
    to = (c_ubyte * 128).from_buffer_copy(tensor_map(out, (2 * rows, tokens), (2 * rows,), OUT_BOX))
    kernel.launch(num_ctas(variant), _Plain(given, to, rows), early=True)
    return True


def refusal(x: Operand, w: object) -> str | None:
    """None, or the reason why the fused kernels do not multiply such tokens by `w`."""
    if not isinstance(w, PackedBlocks):
        return "not a weight whose block scales a Hopper GPU's kernels take"
    if w.by_row is not None:
        return "a scale per row and 128 values"
    dense = x if isinstance(x, Tensor) else x.dense
    if dense is not None and dense.dtype is not torch.bfloat16:
        return "not BF16 activations"
    return f"not more than {MAX_TOKENS} tokens" if tokens_of(x) <= MAX_TOKENS else None
