"""Ops by the C kernels: FP8 stays one byte a value in memory.

A weight is used where it lies, as it is stored. Whatever the kernels do not take goes to torch.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import Views
from octavo.ops import reference
from octavo.ops.contract import Activation, HeadNorms, PackedWeight
from octavo.ops.cpu.attention import attention as attention_by_torch
from octavo.ops.cpu.library import KINDS, Attention, Cache, Linear, Rows, Write, kernels, missing, use
from octavo.ops.cpu.widen import WIDEN_FACTOR
from octavo.platform import FP8_MAX, Platform
from octavo.quant.qtensor import QTensor
from octavo.quant.scheme import BLOCK, Granularity

__all__ = ["Native", "attention", "rms_norm", "rope_write_kv", "rotate", "silu_mul", "write_kv"]

_QUANTIZED = {None: 0, Granularity.ROW: 1, Granularity.BLOCK: 2}
_MAX_DIM = 256  # of a head: csrc/attention.h


class Native:
    """The C kernels' product."""

    def __init__(self) -> None:
        self.name = "C kernels" if missing() else f"C kernels, {use(None)}"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        if (reason := missing()) is not None:
            return reason
        if platform.widened_dtype is not None:
            return "weights are to be widened in memory"
        if q.data.dtype not in KINDS or q.data.stride(1) != 1:
            return f"{q.data.dtype} is not theirs"
        if q.scale is None:
            if q.data.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return "oneDNN has BF16 instructions here"
            return None
        codes = q.data
        if codes.is_contiguous() and kernels().octavo_not_finite(codes.data_ptr(), codes.numel(), KINDS[codes.dtype]):
            return "codes that are not numbers"
        return None

    def pack(self, q: QTensor, platform: Platform) -> PackedNative:
        return PackedNative(q)


class PackedNative(PackedWeight):
    """A weight [N, K] as stored, its scales beside it."""

    def __init__(self, q: QTensor):
        (self.n, k), self.data, scale = q.shape, q.data, q.scale
        self.held_bytes = q.nbytes
        factor = WIDEN_FACTOR.get(q.data.dtype, 1.0)
        self.scale = None if scale is None else (scale.float() * factor).contiguous()  # held as long as the pointer to it is
        by_group = scale is not None and q.scheme.weight is Granularity.BLOCK
        by_row = scale is not None and scale.shape[0] == self.n and (self.n > 1 or scale.shape[1] == 1)
        self.struct = Linear(
            weight=q.data.data_ptr(),
            scale=None if self.scale is None else self.scale.data_ptr(),
            n=self.n,
            k=k,
            stride=q.data.stride(0),
            scale_rows=1 if by_row else BLOCK,
            scale_columns=scale.shape[1] if by_group and scale is not None else 0,
            kind=KINDS[q.data.dtype],
            activation=_QUANTIZED[q.scheme.activation],
        )
        self.address = ctypes.addressof(self.struct)
        self.multiply = kernels().octavo_linear

    def __call__(self, x: Activation) -> Tensor:
        assert isinstance(x, Tensor)
        if x.stride(-1) != 1:
            x = x.contiguous()
        m = x.shape[0]
        y = torch.empty(m, self.n, dtype=x.dtype)
        if self.multiply(self.address, x.data_ptr(), m, x.stride(0), y.data_ptr(), KINDS[x.dtype], torch.get_num_threads()):
            raise MemoryError(f"no memory to multiply {m} rows")
        return y


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, feeds: PackedWeight | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.rms_norm`; x [M, width], or a view [T, H, width]."""
    width = x.shape[-1]
    if not (x.dtype is weight.dtype and x.dtype in (torch.float32, torch.bfloat16) and 2 <= x.dim() <= 3 and x.stride(-1) == 1):
        return reference.rms_norm(x, weight, eps, residual)
    y = torch.empty(x.shape, dtype=x.dtype)
    carried = x
    rows = _rows(x, y)
    rows.weight, rows.eps = weight.data_ptr(), eps
    if residual is not None:
        residual = residual.contiguous()
        carried = torch.empty(x.shape, dtype=x.dtype)
        rows.residual, rows.residual_stride, rows.sum = residual.data_ptr(), width, carried.data_ptr()
    kernels().octavo_rms_norm(rows, torch.get_num_threads())
    return y, carried


def _rows(x: Tensor, y: Tensor) -> Rows:
    """x [M, width] or [T, H, width] with whatever strides, y contiguous."""
    if x.dim() == 2:
        inner, strides = 1, (x.stride(0), 0)
    else:
        inner, strides = x.shape[1], (x.stride(0), x.stride(1))
    return Rows(
        x=x.data_ptr(), y=y.data_ptr(), rows=x.shape[0] * inner, width=y.shape[-1], inner=max(inner, 1),
        outer_stride=strides[0], inner_stride=strides[1], kind=KINDS[x.dtype],
    )  # fmt: skip


def silu_mul(x: Tensor, feeds: PackedWeight | None = None) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() != 2 or x.stride(1) != 1:
        return reference.silu_mul(x)
    y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
    kernels().octavo_silu_mul(_rows(x, y), torch.get_num_threads())
    return y


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.stride(-1) != 1 or not cos_sin.is_contiguous():
        return reference.rotate(x, cos_sin, positions)
    y = torch.empty(x.shape, dtype=x.dtype)
    rows = _rows(x, y)
    positions = positions.contiguous()
    rows.cos_sin, rows.positions, rows.rotated = cos_sin.data_ptr(), positions.data_ptr(), cos_sin.shape[1]
    kernels().octavo_rotate(rows, torch.get_num_threads())
    return y


def write_kv(views: Views, slots: Tensor, k: Tensor, v: Tensor, k_scale: float, v_scale: float) -> None:
    if not (k.dtype is v.dtype and k.dtype in (torch.float32, torch.bfloat16) and k.stride(-1) == v.stride(-1) == 1):
        return reference.write_kv(views, slots, k, v, k_scale, v_scale)
    cache, slots = _cache(views), slots.contiguous()
    kernels().octavo_write_kv(
        Write(
            cache=ctypes.addressof(cache), k=k.data_ptr(), v=v.data_ptr(), slots=slots.data_ptr(), tokens=k.shape[0],
            k_token=k.stride(0), k_head=k.stride(1), v_token=v.stride(0), v_head=v.stride(1),
            k_scale=k_scale, v_scale=v_scale, kind=KINDS[k.dtype],
        ),
        torch.get_num_threads(),
    )  # fmt: skip


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    cos_sin: Tensor,
    positions: Tensor,
    views: Views,
    slots: Tensor,
    k_scale: float,
    v_scale: float,
) -> Tensor:
    if norms is not None:
        q, k = rms_norm(q, norms.q, norms.eps)[0], rms_norm(k, norms.k, norms.eps)[0]
    write_kv(views, slots, rotate(k, cos_sin, positions), v, k_scale, v_scale)
    return rotate(q, cos_sin, positions)


def attention(
    q: Tensor, views: Views, batch: ForwardBatch, scale: float, window: int | None, k_scale: float, v_scale: float
) -> Tensor:
    if q.dtype not in (torch.float32, torch.bfloat16) or q.shape[2] > _MAX_DIM or q.stride(2) != 1:
        return attention_by_torch(q, views, batch, scale, window, k_scale, v_scale)
    dtype = views["k"].dtype
    factor = WIDEN_FACTOR.get(dtype, 1.0)
    if dtype not in FP8_MAX or "k_scale" in views:
        k_scale = v_scale = 1.0
    out = torch.empty(q.shape, dtype=q.dtype)
    wanted = Attention(
        q=q.data_ptr(), out=out.data_ptr(), q_token=q.stride(0), q_head=q.stride(1), tables=batch.block_tables.data_ptr(),
        starts=batch.query_start_loc.data_ptr(), lengths=batch.seq_lens.data_ptr(), table_stride=batch.block_tables.stride(0),
        requests=batch.seq_lens.shape[0], heads=q.shape[1], window=window or 0,
        k_factor=scale * factor * k_scale, v_factor=factor * v_scale, kind=KINDS[q.dtype],
    )  # fmt: skip
    if kernels().octavo_attention(wanted, ctypes.addressof(_cache(views)), torch.get_num_threads()):
        raise MemoryError("no memory for attention")
    return out


def _cache(views: Views) -> Cache:
    k, v = views["k"], views["v"]
    scales = tuple((views[name].data_ptr(), *views[name].stride()[:2]) for name in ("k_scale", "v_scale") if name in views)
    return _cache_struct(k.data_ptr(), v.data_ptr(), k.stride(), k.shape[1:], k.dtype, scales)


@lru_cache(maxsize=1024)
def _cache_struct(
    k: int, v: int, stride: tuple[int, ...], shape: torch.Size, dtype: torch.dtype, scales: tuple[tuple[int, int, int], ...]
) -> Cache:
    """Says where a layer's keys and values lie; depends on nothing but its arguments, so it cannot be out of date."""
    size = dtype.itemsize
    (k_scale, block, token), (v_scale, _, _) = scales or ((None, 0, 0),) * 2
    return Cache(
        k=k, v=v, k_scale=k_scale, v_scale=v_scale, block=stride[0] * size, token=stride[1] * size, head=stride[2] * size,
        scale_block=block * 4, scale_token=token * 4, kind=KINDS[dtype], block_size=shape[0], kv_heads=shape[1], dim=shape[2],
    )  # fmt: skip
