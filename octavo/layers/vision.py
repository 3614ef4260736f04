"""Layers of vision transformers: attention over images of any sizes at once, without a cache, and what surrounds it.

Patches of all images of a step lie one behind the other, [P, hidden]. An image is a grid (frames, rows, columns) of patches.
Heads and the MLP's inner dimension are split over ranks; weights are quantized and padded as those of text layers are.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import ops
from octavo.batch import to_device
from octavo.distributed import TensorParallel
from octavo.images import Grid
from octavo.layers.linear import ColumnParallelLinear, InnerSplit, RowParallelLinear, query_heads
from octavo.weights import Loader

__all__ = [
    "EncoderInput",
    "FusedQKVLinear",
    "Grid",
    "ImageInput",
    "PatchEmbedding",
    "VisionAttention",
    "VisionMLP",
    "axial_angles",
    "finish",
    "patch_values",
    "positions_of",
    "resampled",
    "segments_of",
    "splice",
]


class ImageInput(NamedTuple):
    """What images bring to a step of T tokens.

    features: [F, W], the tower's outputs for the F image tokens among them. places: int64 [F], which of the T tokens those are,
    ascending. positions: int64 [3, T], in time, rows and columns; None for a model whose tokens have one position.
    """

    features: Tensor
    places: Tensor
    positions: Tensor | None


class EncoderInput(NamedTuple):
    """The input of a tower's layers: embedded patches x [P, hidden], rotation and segments of them."""

    x: Tensor
    rotation: ops.Rotation
    segments: ops.Segments


def finish(steps: Generator[None, None, Tensor]) -> Tensor:
    """What a generator returns that is run to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Tensor = end.value
            return found


def positions_of(grids: Sequence[Grid], merge: int, device: torch.device) -> Tensor:
    """int64 [P, 2]: row and column of each patch. The `merge` x `merge` patches that become one token are adjacent."""
    found = []
    for grid in grids:
        rows = torch.arange(grid.rows, device=device)[:, None].expand(grid.rows, grid.columns)
        columns = torch.arange(grid.columns, device=device).expand(grid.rows, grid.columns)
        both = torch.stack([rows, columns], -1).view(grid.rows // merge, merge, grid.columns // merge, merge, 2)
        found.append(both.transpose(1, 2).reshape(-1, 2).repeat(grid.frames, 1))
    return torch.cat(found)


def axial_angles(positions: Tensor, head_dim: int, theta: float, *, interleaved: bool = False) -> ops.Rotation:
    """Half of a head's pairs are rotated by the row, half by the column, of `positions` [P, 2].

    Half-split heads have the rows' pairs first, then the columns'; interleaved ones a column's and a row's in turn.
    """
    half, device = head_dim // 2, positions.device
    inv_freq = 1.0 / theta ** (torch.arange(0, half, 2, device=device).float() / half)
    angles = positions[..., None].float() * inv_freq
    angles = angles.flip(1).transpose(1, 2).flatten(1) if interleaved else angles.flatten(1)
    return ops.Rotation(torch.cat([angles.cos(), angles.sin()], 1), torch.arange(len(angles), device=device), interleaved)


def segments_of(lengths: Sequence[int], device: torch.device) -> ops.Segments:
    return ops.Segments(lengths, to_device([0, *accumulate(lengths)], torch.int32, device))


def resampled(table: Tensor, grid: Grid, mode: str, *, align_corners: bool) -> Tensor:
    """[rows, columns, hidden] of a learned table of positions [height, width, hidden], resampled in FP32.

    Rows and columns are resampled one after the other, as products: what each takes of the table's is what resampling makes of
    an identity matrix. (torch's kernels of a whole table take 2 ms for 64 x 64 positions of 1152 values on an H200.)
    """
    down, across = (
        F.interpolate(torch.eye(old, device=table.device)[None, None], (new, old), mode=mode, align_corners=align_corners)[0, 0]
        for old, new in zip(table.shape, (grid.rows, grid.columns), strict=False)
    )
    rows = (down @ table.float().flatten(1)).view(grid.rows, *table.shape[1:])
    return across @ rows


def splice(x: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """x [T, hidden] with the rows `places`, int64 [F], replaced by `features`, in x's dtype."""
    return x.index_copy(0, places, features.to(x.dtype))


def patch_values(pixels: Tensor, values: Tensor, frames: int) -> Tensor:
    """FP32 [P, 3 * frames * S], a tower's input, from the bytes of patches, uint8 [P, 3, F, S]; F is 1 or `frames`.

    values: FP32 [3, 256], what a byte of each color becomes.
    """
    rows = pixels.int() + 256 * torch.arange(3, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
    found = values.flatten().index_select(0, rows.flatten()).view(pixels.shape)
    return found.expand(-1, -1, frames, -1).flatten(1)


class PatchEmbedding(nn.Module):
    """A convolution whose kernel is its stride: one product a patch, not quantized. shape: the kernel's, [hidden, ...]."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", self.shape).flatten(1)
        self.bias = loader.vector("bias", self.shape[:1])

    def forward(self, patches: Tensor) -> Tensor:
        """[P, hidden] of the values of patches [P, ...]."""
        return F.linear(patches.flatten(1).to(self.weight.dtype), self.weight, self.bias)


class FusedQKVLinear(ColumnParallelLinear):
    """Queries, keys and values, which checkpoints stack in one matrix `name`; each is split by heads."""

    def __init__(self, name: str, hidden: int, heads: int, tp: TensorParallel):
        query_heads(heads, tp)
        super().__init__([name] * 3, hidden, [3 * hidden] * 3, bias=True, tp=tp, heads=[heads] * 3)
        self.shards = [replace(shard, within=(i * hidden, hidden)) for i, shard in enumerate(self.shards)]


class VisionAttention(nn.Module):
    """Each patch attends to its segment, an image's frame or a clip; `qkv` and `out` are the checkpoint's names."""

    def __init__(self, qkv: str, out: str, hidden: int, heads: int, tp: TensorParallel):
        super().__init__()
        self.heads, self.head_dim = query_heads(heads, tp), hidden // heads
        self.qkv = FusedQKVLinear(qkv, hidden, heads, tp)
        self.out = RowParallelLinear(out, hidden, hidden, bias=True, tp=tp)

    @property
    def readers(self) -> tuple[ops.Reader, ...]:
        """Readers of this layer's input."""
        return (self.qkv.weight,)

    def forward(self, x: ops.Operand, segments: ops.Segments, rotation: ops.Rotation) -> Tensor:
        """[P, hidden] of x [P, hidden]."""
        parts = self.qkv(x).unflatten(1, (3, self.heads, self.head_dim))
        q, k = ops.rotate(parts[:, :2].flatten(1, 2), *rotation).chunk(2, 1)
        return ops.finished(self.out(ops.segment_attention(q, k, parts[:, 2], segments).flatten(1)))


class VisionMLP(nn.Module):
    """down(gelu(up(x))), both with biases; `up` and `down` are the checkpoint's names, gelu torch's `approximate`.

    sizes: of what comes in, is between and goes out.
    """

    def __init__(self, up: str, down: str, sizes: tuple[int, int, int], gelu: str, tp: TensorParallel):
        super().__init__()
        hidden, inner, out = sizes
        split = InnerSplit(inner, (up,), down, (hidden, out), tp)
        self.up = ColumnParallelLinear([up], hidden, [inner], bias=True, tp=tp, inner=split)
        self.down = RowParallelLinear(down, inner, out, bias=True, tp=tp, inner=split)
        self.gelu = gelu

    @property
    def readers(self) -> tuple[ops.Reader, ...]:
        """Readers of this layer's input."""
        return (self.up.weight,)

    def forward(self, x: ops.Operand) -> Tensor:
        return ops.finished(self.down(ops.gelu(self.up(x), self.gelu, (self.down.weight,))))
