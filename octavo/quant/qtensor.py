"""A stored weight: its codes, their scales, and its logical shape without padding.

An FP8 code c stands for c * scale. Codes are w / scale rounded to nearest even, computed in FP32: dividing in BF16, as some
tools do, rounds twice and adds 0.6-0.8% to the error. The scale is amax / 448, amax over the values that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import OctavoError
from octavo.platform import FP8_MAX
from octavo.quant.scheme import BF16, BLOCK, Granularity, Scheme, WeightDType

__all__ = [
    "QTensor",
    "Stacker",
    "concat",
    "dequantize",
    "expand_scale",
    "int4_codes",
    "quantize",
    "scale_of",
    "scale_shape",
    "to_device_fp8",
    "weight_amax",
]

# Values converted through FP32 at a time. It bounds the memory that quantizing takes, and on a CPU keeps it in the cache.
CHUNK = 1 << 19
DEVICE_CHUNK = 1 << 26


@dataclass
class QTensor:
    """A weight [N, K] as stored, or a stack of experts [E, N, K], whose data and scales have an additional first dimension.

    data: [N', K'] FP8 codes, or BF16 values. N' and K' are N and K rounded up to what the device's FP8 tensor cores need; the
        padding is zero, and only `ops` knows about it. INT4: UINT8 [N, K''], at least K / 2 bytes a row, element 2i in the low
        half of byte i and 2i + 1 in the high half, each plus 8: the memory layout of compressed-tensors' words.
    scale: FP32 [N, 1], or [ceil(N/128), ceil(K/128)] per tile, or [N, ceil(K/128)] where matrices whose heights are not
        multiples of 128 are stacked. INT4: BF16 or FP32 [N, K / group]. None for BF16. Never a scalar, so that a stack of
        matrices needs no special case.
    """

    data: Tensor
    scale: Tensor | None
    scheme: Scheme
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def expert(self, number: int) -> QTensor:
        """One weight of a stack. It shares the stack's memory."""
        scale = None if self.scale is None else self.scale[number]
        return QTensor(self.data[number], scale, self.scheme, self.shape[1:])

    def padded(self, multiple: int) -> QTensor:
        """The same weight with both dimensions of FP8 `data` rounded up to `multiple` and padded with zeros."""
        n, k = self.data.shape
        if self.scheme.dtype is not WeightDType.FP8 or (n % multiple == 0 and k % multiple == 0):
            return self
        data = torch.zeros(n + -n % multiple, k + -k % multiple, dtype=torch.uint8, device=self.data.device)
        data[:n, :k] = self.data.view(torch.uint8)
        return QTensor(data.view(self.data.dtype), self.scale, self.scheme, self.shape)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [T] (int32 or int64), dequantized and rounded to `dtype`: [T, K]. Never waits for the device."""
        if (scale := _fp8_scale(self)) is None:
            return F.embedding(ids, self.data).to(dtype)
        n, k = self.shape
        codes = F.embedding(ids, self.data.view(torch.uint8))[:, :k].view(self.data.dtype)  # torch gathers bytes, not FP8
        scale = F.embedding(ids if scale.shape[0] == n else ids // BLOCK, scale)
        if scale.shape[1] > 1:
            scale = scale.unsqueeze(2).expand(-1, -1, BLOCK).flatten(1)[:, :k]
        return codes.to(dtype).mul_(scale)  # BF16 holds every code exactly, so only the FP32 product is rounded


def quantize(
    w: Tensor,
    scheme: Scheme,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    max_reduce: Callable[[Tensor], Tensor] | None = None,
    codes: Tensor | None = None,
) -> QTensor:
    """Quantizes a weight [N, K] of any float dtype.

    `max_reduce` takes the largest amax over the ranks that hold other values sharing a scale. codes: memory of FP8 codes [N, K]
    to write them into. Raises OctavoError for a scheme that is neither BF16 nor FP8.
    """
    n, k = w.shape
    if scheme.dtype is WeightDType.BF16:
        return QTensor(w, None, scheme, (n, k))
    if scheme.dtype is not WeightDType.FP8:
        raise OctavoError(f"Octavo quantizes to FP8 and not to {scheme.name}; use fp8, ptpc_fp8, fp8_block or fp8_w8a16.")
    if w.is_meta:  # a meta tensor has no values, and arithmetic on it would import torch's compiler
        scale = torch.empty(scale_shape((n, k), scheme.weight), device="meta")
        return QTensor(w.new_empty(n, k, dtype=fp8_dtype) if codes is None else codes, scale, scheme, (n, k))
    peak = weight_amax(w, scheme.weight)
    if max_reduce is not None and scheme.weight is Granularity.TENSOR:  # ranks may have unequal parts, one of them none
        one = peak[:1].clone() if n else peak.new_zeros(1, 1)
        peak = max_reduce(one).expand(n, 1).contiguous()
    elif max_reduce is not None:
        peak = max_reduce(peak)
    scale = scale_of(peak, fp8_dtype)
    data = w.new_empty(n, k, dtype=fp8_dtype) if codes is None else codes
    for rows in _row_chunks(w):
        data[rows] = _codes(w[rows], _rows_of(scale, rows, (n, k)), fp8_dtype)
    return QTensor(data, scale, scheme, (n, k))


def scale_shape(shape: tuple[int, int], granularity: Granularity | None) -> tuple[int, int]:
    """The shape of a QTensor's scale: one per row (also for per-tensor schemes), or one per tile."""
    n, k = shape
    return (-(-n // BLOCK), -(-k // BLOCK)) if granularity is Granularity.BLOCK else (n, 1)


def _codes(values: Tensor, scale: Tensor, fp8_dtype: torch.dtype) -> Tensor:
    """The codes of some rows. A separate function, so that the FP32 values are freed before the next rows are converted."""
    limit = FP8_MAX[fp8_dtype]
    divided = values.to(torch.float32, copy=True).div_(scale)
    return divided.clamp_(-limit, limit).to(fp8_dtype)  # the cast alone overflows to NaN in e4m3fnuz


def scale_of(peak: Tensor, fp8_dtype: torch.dtype) -> Tensor:
    """The scale of values whose largest magnitude is `peak`; 1 where all are zero, or too small for a scale."""
    # Divided by a tensor: a GPU divides by a number with its reciprocal, whose last bit would change codes from a CPU's.
    scale = peak / torch.full_like(peak, FP8_MAX[fp8_dtype])
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def weight_amax(w: Tensor, granularity: Granularity | None) -> Tensor:
    """Largest magnitude of the values that share a scale, FP32, in the scale's shape."""
    n, k = w.shape
    if not n * k:  # a rank's part, where there are fewer tiles than ranks
        return torch.zeros(scale_shape((n, k), granularity), device=w.device)
    peak = torch.cat([_amax(w[rows], granularity) for rows in _row_chunks(w)])
    return peak.amax(0, keepdim=True).expand(len(w), 1).contiguous() if granularity is Granularity.TENSOR else peak


def _amax(values: Tensor, granularity: Granularity | None) -> Tensor:
    magnitudes = values.to(torch.float32, copy=True).abs_()
    if granularity is not Granularity.BLOCK:
        return magnitudes.amax(1, keepdim=True)
    n, k = magnitudes.shape
    if n % BLOCK or k % BLOCK:
        magnitudes = F.pad(magnitudes, (0, -k % BLOCK, 0, -n % BLOCK))
    peaks: Tensor = magnitudes.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
    return peaks


def _row_chunks(w: Tensor) -> list[slice]:
    """Row ranges, multiples of a tile high, that are converted through FP32 one at a time."""
    n, k = w.shape
    values = CHUNK if w.device.type == "cpu" else DEVICE_CHUNK
    rows = max(BLOCK, values // max(k, 1) // BLOCK * BLOCK)
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def expand_scale(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """The scale of every value of a weight of `shape`, broadcastable to it: [N, 1] or [N, K]."""
    return _rows_of(scale, slice(0, shape[0]), shape)


def _rows_of(scale: Tensor, rows: slice, shape: Sequence[int]) -> Tensor:
    n, k = shape
    if scale.shape[0] == n and (n > 1 or scale.shape[1] == 1):  # one row of scales per channel
        part = scale[rows]
    else:
        part = scale.repeat_interleave(BLOCK, 0)[rows]
    return part if part.shape[1] == 1 else part.repeat_interleave(BLOCK, 1)[:, :k]


def dequantize(q: QTensor) -> Tensor:
    """The values [N, K] that codes stand for, in FP32, which holds INT4 products exactly. BF16 is returned as it is."""
    if q.data.is_meta and q.scheme.quantized:  # arithmetic would import torch's compiler
        return torch.empty(q.shape, device="meta")
    if q.scheme.dtype is WeightDType.INT4 and q.scale is not None:
        n, k = q.shape
        return int4_codes(q.data)[:, :k].mul_(q.scale.float().repeat_interleave(q.scheme.group, 1)[:, :k])
    if (scale := _fp8_scale(q)) is None:
        return q.data
    n, k = q.shape
    values: Tensor = q.data[:n, :k].float() * expand_scale(scale, q.shape)
    return values


def int4_codes(data: Tensor) -> Tensor:
    """The integers -8 to 7 of packed INT4 UINT8 [N, K''], in QTensor's layout: FP32 [N, 2 K'']."""
    return torch.stack([data & 15, data >> 4], 2).flatten(1).float().sub_(8)


def _fp8_scale(q: QTensor) -> Tensor | None:
    """The scales of FP8 codes; None for BF16 values. Raises OctavoError for codes of another dtype."""
    if q.scheme.dtype is WeightDType.BF16:
        return None
    if q.scheme.dtype is not WeightDType.FP8 or q.scale is None:
        raise OctavoError(f"a weight of {q.scheme.kind} is not made values of; store it in FP8 or BF16.")
    return q.scale


def concat(parts: Sequence[QTensor], codes: Tensor | None = None) -> QTensor:
    """Stacks matrices of equal K (q, k, v) into one operand. Codes and scales are kept bit for bit.

    Matrices of different schemes cannot share an operand. They are stacked in BF16, at the price of one rounding. codes: of all
    parts, [N, K], where these are its rows.
    """
    if len(parts) == 1:
        return parts[0] if codes is None else replace(parts[0], data=codes)
    shape = (sum(p.shape[0] for p in parts), parts[0].shape[1])
    if len({(p.scheme, p.data.dtype) for p in parts}) > 1:
        return QTensor(torch.cat([dequantize(p).bfloat16() for p in parts]), None, BF16, shape)
    scheme, scales = parts[0].scheme, [p.scale for p in parts if p.scale is not None]
    if not scales:
        return QTensor(_cat([p.data for p in parts]), None, scheme, shape)
    data = _cat([p.data.view(torch.uint8) for p in parts]).view(parts[0].data.dtype) if codes is None else codes
    heights = [p.shape[0] for p in parts]
    split = any(len(s) > -(-n // BLOCK) for s, n in zip(scales, heights, strict=True))  # a row of scales per channel already
    if scheme.weight is Granularity.BLOCK and (split or any(n % BLOCK for n in heights[:-1])):  # tiles would span two matrices
        scales = [s if len(s) == n else s.repeat_interleave(BLOCK, 0)[:n] for s, n in zip(scales, heights, strict=True)]
    return QTensor(data, _cat(scales), scheme, shape)


class Stacker:
    """Fills a stack of `count` weights one by one, so that only the stack and one weight are in memory.

    `where`: the experts' path, for error messages.
    """

    def __init__(self, count: int, where: str = ""):
        self.count, self.where = count, f"{where}: " if where else ""
        self._stack: QTensor | None = None

    def put(self, number: int, q: QTensor) -> None:
        """Copies one weight into the stack. Raises OctavoError if it is stored otherwise than the first one."""
        if self._stack is None:
            scale = None if q.scale is None else q.scale.new_empty(self.count, *q.scale.shape)
            self._stack = QTensor(q.data.new_empty(self.count, *q.data.shape), scale, q.scheme, (self.count, *q.shape))
        stack = self._stack
        if (q.scheme, q.data.dtype, q.shape) != (stack.scheme, stack.data.dtype, stack.shape[1:]):
            raise OctavoError(
                f"{self.where}expert {number} is stored in {q.scheme.name} and those before it in {stack.scheme.name}; "
                "the experts of a layer must be stored alike."
            )
        if q.data.is_meta:
            return
        stack.data[number].view(torch.uint8).copy_(q.data.view(torch.uint8))  # torch cannot copy values of all code dtypes
        if q.scale is not None and stack.scale is not None:
            stack.scale[number] = q.scale

    def finished(self) -> QTensor:
        assert self._stack is not None
        return self._stack


def _cat(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].is_meta:
        return parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    return torch.cat(list(parts))


def to_device_fp8(q: QTensor, fp8_dtype: torch.dtype) -> QTensor:
    """Converts stored codes to the device's FP8 dtype. An e4m3fn code means half as much in e4m3fnuz, whose 0x80 is NaN."""
    if q.data.dtype == fp8_dtype:
        return q
    if q.data.dtype is not torch.float8_e4m3fn or fp8_dtype is not torch.float8_e4m3fnuz or q.scale is None:
        raise OctavoError(
            f"FP8 weights stored as {q.data.dtype} cannot be used on this device, whose FP8 dtype is {fp8_dtype}."
        )
    codes = q.data.view(torch.uint8)
    codes = torch.where(codes == 0x80, torch.zeros_like(codes), codes)
    return QTensor(codes.view(fp8_dtype), q.scale * 2, q.scheme, q.shape)
