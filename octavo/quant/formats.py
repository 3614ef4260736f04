"""Checkpoint formats of a weight: one decode function per format, chosen by the tensors that are present.

A stored FP8 weight is returned as a QTensor with its codes bit for bit (converted where the device has another FP8 dtype), and
so is packed INT4. Anything else is returned as the dense matrix. The formats and their writers:

    fp8                Hugging Face, DeepSeek      weight, weight_scale_inv: tiles, FP32 or E8M0; or one for the matrix
    fbgemm_fp8         Hugging Face                weight, weight_scale [N, 1]
    compressed-tensors llm-compressor, octavo      weight, weight_scale [1], [N, 1] or tiles; or INT4: weight_packed, ...
    modelopt           NVIDIA's ModelOpt           weight, weight_scale [], [N], or of tiles [n, 1, k, 1]
    quark              AMD's Quark                 weight, weight_scale [] or [N]

Scales of activations may stand beside them and are not read: Octavo computes activation scales per token at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Protocol

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant.qtensor import QTensor, int4_codes, to_device_fp8
from octavo.quant.scheme import BLOCK, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, FP8_W8A16, Granularity, Scheme, int4_of

__all__ = [
    "COMPANIONS", "WHOLE", "Reader", "Shard", "int4_group", "read_weight", "served_scheme", "stored_scheme", "stored_shape",
    "whole_unit",
]  # fmt: skip

# Tensors that may stand beside a quantized `weight`. The last six are for activations (AutoFP8 was first with act_scale).
COMPANIONS = ("weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point", "input_scale", "activation_scale",
              "act_scale", "input_scale_ub", "input_zero_point", "output_zero_point")  # fmt: skip
INT4_IN_INT32 = 8
ZERO_POINTS = 0x8888_8888 - (1 << 32)  # a word of eight that are 0, each stored plus 8


@dataclass(frozen=True)
class Shard:
    """One rank's part of a dimension. `copies` ranks hold the same part (KV heads where there are more ranks than heads).

    `unit`: 0 where all parts must be equal; else part lengths are multiples of it, and the last ones may be shorter.
    `balanced`: parts differ by one unit at most, the first ones being longer; with fewer units than parts some are empty.
    `within`: (start, length) of the rows that are split, for a matrix that stacks several; None: all rows.
    """

    dim: int = 0
    rank: int = 0
    size: int = 1
    copies: int = 1
    unit: int = 0
    within: tuple[int, int] | None = None
    balanced: bool = False

    def longest(self, length: int) -> int:
        """The longest part of a dimension of `length`."""
        parts = self.size // self.copies
        return -(-length // (parts * self.unit)) * self.unit if self.unit else length // parts

    def slice(self, length: int) -> slice:
        """This rank's part of a dimension of `length`. Raises OctavoError if the dimension does not split evenly."""
        first, length = self.within or (0, length)
        parts, step, at = self.size // self.copies, self.longest(length), self.rank // self.copies
        if self.balanced:
            each, more = divmod(-(-length // self.unit), parts)
            start, stop = (min(length, (i * each + min(i, more)) * self.unit) for i in (at, at + 1))
            return slice(first + start, first + stop)
        if (step * (parts - 1) >= length) if self.unit else length % parts:
            raise OctavoError(
                f"a dimension of {length} does not split over {parts} ranks; use a --tensor-parallel-size that divides it."
            )
        return slice(first + at * step, first + min((at + 1) * step, length))

    def whole(self, shape: Sequence[int]) -> int:
        """The number of values of the matrix of which this is a part, stored alone or within one of `shape`."""
        return prod(shape) if self.within is None else self.within[1] * prod(shape[1:])


WHOLE = Shard()


class Reader(Protocol):
    """The part of a Loader that formats use."""

    platform: Platform
    prefix: str  # prepended to names in error messages

    def has(self, name: str) -> bool: ...
    def is_weight_only(self, module: str) -> bool: ...
    def skip(self, name: str) -> None: ...
    def stored_shape(self, name: str) -> list[int]: ...
    def read(self, name: str, shape: Sequence[int] | None, shard: Shard = WHOLE, part: slice | None = None) -> Tensor: ...


def read_weight(reader: Reader, name: str, shape: tuple[int, int], shard: Shard) -> QTensor | Tensor:
    """This rank's part of the matrix `name` [N, K], in the form that the checkpoint stores."""
    if (packed := int4_packed(reader, name, shape, shard)) is not None:
        return packed
    for decode in (fp8_block, fp8_scaled):
        if (found := decode(reader, name, shape, shard)) is not None:
            return found
    dense = reader.read(f"{name}.weight", shape, shard)
    if dense.dtype.itemsize == 1 or not dense.is_floating_point():
        raise OctavoError(
            f"{reader.prefix}{name}.weight is stored as {dense.dtype} without a scale beside it; "
            "the checkpoint is of an unknown format."
        )
    return dense


def stored_shape(reader: Reader, name: str) -> tuple[int, int]:
    """[N, K] of the matrix `name`, packed or dense."""
    if not reader.has(f"{name}.weight_packed"):
        n, k = reader.stored_shape(f"{name}.weight")
    elif reader.has(f"{name}.weight_shape"):
        n, k = reader.read(f"{name}.weight_shape", None).tolist()
    else:
        n, k = reader.stored_shape(f"{name}.weight_packed")
        k *= INT4_IN_INT32
    return n, k


def stored_scheme(reader: Reader, name: str, shape: tuple[int, int]) -> Scheme | None:
    """The scheme implied by the stored scale's shape; None for a dense or packed weight. Raises OctavoError for others."""
    if (scale_name := _scale_name(reader, name)) is None or reader.has(f"{name}.weight_packed"):
        return None
    stored, grid = reader.stored_shape(scale_name), [-(-n // BLOCK) for n in shape]
    if len(stored) == 4 and stored == [grid[0], 1, grid[1], 1]:
        return FP8_BLOCK
    if len(stored) > 2:
        raise OctavoError(
            f"{reader.prefix}{scale_name} has shape {stored}; scales of a matrix have at most 2 dimensions, "
            "so the checkpoint is of an unknown format."
        )
    if stored == grid:
        return FP8_BLOCK
    if stored in ([shape[0]], [shape[0], 1]) and shape[0] > 1:
        return FP8_PER_CHANNEL
    if stored in ([], [1], [1, 1]):
        return FP8_PER_TENSOR
    raise OctavoError(
        f"{reader.prefix}{scale_name} has shape {stored}, which is neither one scale for the matrix {list(shape)}, "
        "nor one for each of its channels, nor one for each 128x128 tile; Octavo knows no other."
    )


def served_scheme(reader: Reader, name: str, shape: tuple[int, int]) -> Scheme | None:
    """`stored_scheme`, or FP8_W8A16 where the checkpoint says that activations stay as they are."""
    by_row = (stored := stored_scheme(reader, name, shape)) in (FP8_PER_CHANNEL, FP8_PER_TENSOR)
    return FP8_W8A16 if by_row and reader.is_weight_only(name) else stored


def whole_unit(reader: Reader, name: str, shape: tuple[int, int], dim: int, scheme: Scheme) -> int:
    """What parts of dimension `dim` of the matrix `name` must be multiples of, so that values that share a scale stay together.
    scheme: what it gets if it is not stored in codes."""
    if reader.has(f"{name}.weight_packed"):
        group = int4_group(reader, name, shape)
        return lcm(group, INT4_IN_INT32) if dim == 1 and group < shape[1] else 1
    found = stored_scheme(reader, name, shape) or scheme
    return BLOCK if found.weight is Granularity.BLOCK else 1


def fp8_block(reader: Reader, name: str, shape: tuple[int, int], shard: Shard) -> QTensor | None:
    """DeepSeek's format and compressed-tensors' FP8_BLOCK: e4m3 `weight` [N, K] and a scale per 128x128 tile.

    A part of the rows that splits a tile has a row of scales per channel.
    """
    scale_name = _scale_name(reader, name)
    if scale_name is None or stored_scheme(reader, name, shape) is not FP8_BLOCK:
        return None
    part = shard.slice(shape[shard.dim])
    at = next((at for at in (part.start, part.stop) if at % BLOCK and at < shape[shard.dim]), 0)
    if at and shard.dim == 1:  # on all ranks
        raise OctavoError(
            f"{reader.prefix}{name}: a part that starts at {at} splits a 128x128 tile; "
            f"tiles do not split into parts of {part.stop - part.start}, use a smaller --tensor-parallel-size."
        )
    data = _codes(reader, name, shape, shard)
    along = shard if len(reader.stored_shape(scale_name)) == 2 else replace(shard, dim=2 * shard.dim)  # [n, 1, k, 1]
    scale = _scale(reader.read(scale_name, None, along, _covering(part, BLOCK)))
    scale = scale.flatten(1)
    if at:
        scale = scale.repeat_interleave(BLOCK, 0)[part.start % BLOCK :][: len(data)]
    return to_device_fp8(QTensor(data, scale, FP8_BLOCK, (data.shape[0], data.shape[1])), reader.platform.fp8_dtype)


def fp8_scaled(reader: Reader, name: str, shape: tuple[int, int], shard: Shard) -> QTensor | None:
    """Other FP8 formats: e4m3 `weight` and a scale of [], [1], [N] or [N, 1]."""
    if (scale_name := _scale_name(reader, name)) is None:
        return None
    scheme = served_scheme(reader, name, shape)
    assert scheme is not None
    of_rows = stored_scheme(reader, name, shape) is FP8_PER_CHANNEL and shard.dim == 0
    scale = _scale(reader.read(scale_name, None, shard if of_rows else WHOLE)).view(-1, 1)
    data = _codes(reader, name, shape, shard)
    n, k = data.shape
    return to_device_fp8(QTensor(data, scale.expand(n, 1).contiguous(), scheme, (n, k)), reader.platform.fp8_dtype)


def _codes(reader: Reader, name: str, shape: tuple[int, int], shard: Shard) -> Tensor:
    data = reader.read(f"{name}.weight", shape, shard)
    if data.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise OctavoError(
            f"{reader.prefix}{name}.weight is stored as {data.dtype} with a scale beside it, neither FP8 nor packed INT4; "
            "the checkpoint is of an unknown format."
        )
    return data


def int4_group(reader: Reader, name: str, shape: tuple[int, int]) -> int:
    """The group size of a packed INT4 matrix. Raises OctavoError for other kinds of INT4."""
    if not reader.has(f"{name}.weight_scale"):
        raise OctavoError(
            f"{reader.prefix}{name} is stored as packed INT4 without a scale beside it; is the checkpoint complete?"
        )
    reader.skip(f"{name}.weight_shape")
    packed, scale = (reader.stored_shape(f"{name}.{end}") for end in ("weight_packed", "weight_scale"))
    if len(packed) != 2 or len(scale) != 2:
        raise OctavoError(
            f"{reader.prefix}{name} is stored as packed INT4 of shape {packed} with scales of shape {scale}; "
            "Octavo reads rows of words with rows of scales."
        )
    words, groups = packed[1], scale[1]
    if words * INT4_IN_INT32 - shape[1] not in range(INT4_IN_INT32) or not groups or shape[1] % groups:
        raise OctavoError(
            f"{reader.prefix}{name}: {words} packed words and {groups} scales a row do not make INT4 rows of {shape[1]} values."
        )
    group = shape[1] // groups
    symmetric = _is(reader, f"{name}.weight_zero_point", lambda points: ZERO_POINTS if points.dtype is torch.int32 else 0)
    if not symmetric or not _is(reader, f"{name}.weight_g_idx", lambda of: torch.arange(len(of)) // group):
        raise OctavoError(
            f"{reader.prefix}{name} is stored as packed INT4 with zero points or reordered columns; "
            "Octavo reads symmetric INT4 in its own order only."
        )
    return group


def _is(reader: Reader, name: str, expected: Callable[[Tensor], Tensor | int]) -> bool:
    """Whether the tensor `name` is absent or all as expected. Where there are no values, in a plan, it is not: tools leave out
    what says nothing."""
    if not reader.has(name):
        return True
    found = reader.read(name, None)
    return not found.is_meta and bool((found.cpu() == expected(found)).all())


def int4_packed(reader: Reader, name: str, shape: tuple[int, int], shard: Shard) -> QTensor | Tensor | None:
    """compressed-tensors' `pack-quantized`: returns the packed codes.

    `weight_packed` int32 [N, ceil(K/8)] holds element i of a row in bits 4(i%8) of word i//8, stored plus 8; `weight_scale` is
    [N, K/group]. A part that splits a word or a group is returned as FP32 values: each the exact product of an integer and its
    group's scale. Rounded to the scale's dtype this is compressed-tensors' result.
    """
    if not reader.has(f"{name}.weight_packed"):
        return None
    group = int4_group(reader, name, shape)
    if shard.dim == 0:
        columns, packed = slice(0, shape[1]), reader.read(f"{name}.weight_packed", None, shard)
        scale = reader.read(f"{name}.weight_scale", None, shard)
    else:
        columns = shard.slice(shape[1])
        packed = reader.read(f"{name}.weight_packed", None, shard, _covering(columns, INT4_IN_INT32))
        scale = reader.read(f"{name}.weight_scale", None, shard, _covering(columns, group))
    if not (columns.start % INT4_IN_INT32 or columns.start % group) and (
        columns.stop == shape[1] or not (columns.stop % INT4_IN_INT32 or columns.stop % group)
    ):
        n, k = len(packed), columns.stop - columns.start
        return QTensor(_bytes(packed), scale if scale.dtype is torch.bfloat16 else scale.float(), int4_of(group), (n, k))
    start, width = columns.start, columns.stop - columns.start
    codes = int4_codes(_bytes(packed))[:, start % INT4_IN_INT32 :][:, :width]
    return codes.mul_(scale.float().repeat_interleave(group, 1)[:, start % group :][:, :width])


def _bytes(words: Tensor) -> Tensor:
    """UINT8 [N, 4 W] from int32 [N, W]; a copy if the rows are not contiguous."""
    return words.contiguous().view(torch.uint8)


def _covering(columns: slice, unit: int) -> slice:
    """The units that cover the rows or columns; none for none."""
    return slice(columns.start // unit, -(-columns.stop // unit) if columns.stop > columns.start else columns.start // unit)


def _scale_name(reader: Reader, name: str) -> str | None:
    """Name of the dequantization scale. Hugging Face's `weight_scale_inv` is one too: the inverse of the quantization scale."""
    return next((full for full in (f"{name}.weight_scale_inv", f"{name}.weight_scale") if reader.has(full)), None)


def _scale(stored: Tensor) -> Tensor:
    """The scale in FP32. One-byte scales are E8M0, powers of two (DeepSeek's `ue8m0`), stored with that dtype or as bytes."""
    return (stored.view(torch.float8_e8m0fnu) if stored.dtype is torch.uint8 else stored).float()
