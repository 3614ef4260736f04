"""How checkpoints spell a weight: one function a format, tried in order, found by the tensors that are there.

A stored FP8 weight comes back as a QTensor with its codes bit for bit (converted where the device's FP8 dtype is another);
anything else as the dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant.qtensor import QTensor
from octavo.quant.scheme import BLOCK, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR

__all__ = ["WHOLE", "Shard", "read_weight", "to_device_fp8"]


@dataclass(frozen=True)
class Shard:
    """One rank's part of a dimension; `copies` ranks hold the same part (KV heads where there are more ranks than heads)."""

    dim: int = 0
    rank: int = 0
    size: int = 1
    copies: int = 1

    def slice(self, length: int) -> slice:
        """This rank's part of a dimension of `length`. Raises OctavoError if it does not split evenly."""
        parts = self.size // self.copies
        if length % parts:
            raise OctavoError(
                f"a dimension of {length} does not split over {parts} ranks; use a --tensor-parallel-size that divides it."
            )
        step = length // parts
        return slice(self.rank // self.copies * step, (self.rank // self.copies + 1) * step)


WHOLE = Shard()


class Reader(Protocol):
    """What a format needs of a Loader."""

    platform: Platform
    prefix: str  # of the names, for messages

    def has(self, name: str) -> bool: ...
    def skip(self, name: str) -> None: ...
    def stored_shape(self, name: str) -> list[int]: ...
    def read(self, name: str, shape: Sequence[int] | None, shard: Shard = WHOLE, part: slice | None = None) -> Tensor: ...


def read_weight(reader: Reader, name: str, shape: tuple[int, int], shard: Shard) -> QTensor | Tensor:
    """This rank's part of the matrix `name` [N, K], whatever the checkpoint stored."""
    if reader.has(f"{name}.weight_packed"):
        raise OctavoError(
            f"{reader.prefix}{name} is stored as packed INT4, which this version does not read; "
            "use the model's BF16 or FP8 checkpoint."
        )
    for calibrated in ("input_scale", "activation_scale"):  # activations are scaled by what they are, not by what was seen
        reader.skip(f"{name}.{calibrated}")
    for decode in (fp8_block, fp8_scaled):
        if (found := decode(reader, name, shape, shard)) is not None:
            return found
    dense = reader.read(f"{name}.weight", shape, shard)
    if dense.dtype.itemsize == 1:
        raise OctavoError(
            f"{reader.prefix}{name}.weight is stored as {dense.dtype} without a scale beside it; "
            "the checkpoint is of an unknown format."
        )
    return dense


def fp8_block(reader: Reader, name: str, shape: tuple[int, int], shard: Shard) -> QTensor | None:
    """DeepSeek's, and compressed-tensors' FP8_BLOCK: e4m3 `weight` [N, K] and a scale for each 128x128 tile."""
    grid = [-(-n // BLOCK) for n in shape]
    scale_name = _scale_name(reader, name)
    if scale_name is None or reader.stored_shape(scale_name) != grid:
        return None
    part = shard.slice(shape[shard.dim])
    if part.start % BLOCK:
        raise OctavoError(
            f"{reader.prefix}{name}: a part that starts at {part.start} splits a 128x128 tile; "
            "use a smaller --tensor-parallel-size."
        )
    tiles = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    data = reader.read(f"{name}.weight", shape, shard)
    scale = reader.read(scale_name, grid, shard, tiles).float()
    return to_device_fp8(QTensor(data, scale, FP8_BLOCK, (data.shape[0], data.shape[1])), reader.platform.fp8_dtype)


def fp8_scaled(reader: Reader, name: str, shape: tuple[int, int], shard: Shard) -> QTensor | None:
    """compressed-tensors `float-quantized` and its kin: e4m3 `weight` and a scale of [], [1], [N] or [N, 1]."""
    if (scale_name := _scale_name(reader, name)) is None:
        return None
    stored = reader.stored_shape(scale_name)
    channels = stored in ([shape[0]], [shape[0], 1]) and shape[0] > 1
    if not channels and stored not in ([], [1], [1, 1]):
        raise OctavoError(
            f"{reader.prefix}{scale_name} has shape {stored}, which is neither one scale for the matrix {list(shape)}, "
            "nor one for each of its channels, nor one for each 128x128 tile; Octavo knows no other."
        )
    scale = reader.read(scale_name, stored, shard if channels and shard.dim == 0 else WHOLE).float().view(-1, 1)
    data = reader.read(f"{name}.weight", shape, shard)
    n, k = data.shape
    scheme = FP8_PER_CHANNEL if channels else FP8_PER_TENSOR
    return to_device_fp8(QTensor(data, scale.expand(n, 1).contiguous(), scheme, (n, k)), reader.platform.fp8_dtype)


def _scale_name(reader: Reader, name: str) -> str | None:
    """Both spellings multiply: Hugging Face calls it the inverse of what the weight was multiplied by."""
    return next((full for full in (f"{name}.weight_scale_inv", f"{name}.weight_scale") if reader.has(full)), None)


def to_device_fp8(q: QTensor, fp8_dtype: torch.dtype) -> QTensor:
    """Stored codes in the device's FP8 dtype: an e4m3fn code means half as much in e4m3fnuz, whose 0x80 is NaN, not -0."""
    if q.data.dtype == fp8_dtype:
        return q
    if q.data.dtype is not torch.float8_e4m3fn or fp8_dtype is not torch.float8_e4m3fnuz or q.scale is None:
        raise OctavoError(
            f"FP8 weights stored as {q.data.dtype} cannot be used on this device, whose FP8 dtype is {fp8_dtype}."
        )
    codes = q.data.view(torch.uint8)
    codes = torch.where(codes == 0x80, torch.zeros_like(codes), codes)
    return QTensor(codes.view(fp8_dtype), q.scale * 2, q.scheme, q.shape)
