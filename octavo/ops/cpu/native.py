"""Ops by the C kernels, which read FP8 and packed INT4 weights in place, as stored.

Operands that the kernels do not support go to torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import byref
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, get_num_threads

from octavo.batch import ForwardBatch
from octavo.kvcache import KeyRounding, LayerCache
from octavo.ops import reference
from octavo.ops.contract import (
    ANY_KIND,
    FEW_TOKENS,
    Activation,
    Filters,
    Operand,
    PackedWeight,
    Reader,
    Rope,
    not_taken,
    values_of,
)
from octavo.ops.cpu.attention import attention as attention_by_torch
from octavo.ops.cpu.library import KINDS, PACKED_INT4, Cache, Linear, kernels, missing, used
from octavo.ops.cpu.op_recorder import launch
from octavo.ops.cpu.widen import WIDEN_FACTOR
from octavo.platform import FP8_MAX, Platform
from octavo.quant.qtensor import QTensor
from octavo.quant.scheme import BLOCK, Granularity, WeightDType

__all__ = [
    "MAX_SHARED",
    "TILE",
    "Native",
    "add_gram",
    "argmax",
    "attention",
    "captures",
    "descend",
    "held_scale",
    "is_readable",
    "is_tiled",
    "packed_bytes",
    "rms_norm",
    "rope_write_kv",
    "rotate",
    "round_columns",
    "round_keys",
    "sample",
    "scale_errors",
    "silu_mul",
    "struct_of",
    "tiled",
    "tiled_shape",
    "unsupported",
    "write_kv",
]

_QUANTIZED = {None: 0, Granularity.ROW: 1, Granularity.BLOCK: 2}
GROUP_SCALES = (torch.bfloat16, torch.float32)
_MAX_DIM = 256  # of a head: csrc/attention.h
TILE = 64  # rows and codes of a block of a tiled weight: csrc/types.h
MAX_SHARED = 1024  # of a latent with its rope part, or of an indexer's key: csrc/latent.h


class Native:
    """The C kernels' product."""

    def __init__(self) -> None:
        self.name = "C kernels" if missing() else f"C kernels, {used()}"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return unsupported(q, platform)

    def pack(self, q: QTensor, platform: Platform) -> PackedNative:
        return PackedNative(q)


def unsupported(q: QTensor, platform: Platform) -> str | None:
    """The reason why the kernels do not multiply by `q`, a weight or a stack, as stored; None if they do."""
    if (reason := missing()) is not None:
        return reason
    if platform.widened_dtype is not None:
        return "weights are to be widened in memory"
    if (reason := not_taken(q.scheme, ANY_KIND)) is not None:
        return reason
    codes = q.data
    if q.scheme.dtype is WeightDType.INT4:
        return _not_packed(q)
    if codes.dtype not in KINDS or (codes.dtype in FP8_MAX) != q.scheme.quantized or codes.stride(-1) != 1:
        return f"{codes.dtype} is not theirs"
    if not (q.scheme.quantized and codes.is_contiguous()):
        return None
    found = kernels().octavo_not_finite(codes.data_ptr(), codes.numel(), KINDS[codes.dtype])
    return "codes that are not numbers" if found else None


def _not_packed(q: QTensor) -> str | None:
    """The reason why the kernels do not multiply by `q`, whose scheme is INT4; None if they do."""
    (*_, k), group, scale = q.shape, q.scheme.group, q.scale
    if group % 8:
        return f"groups of {group} are no multiples of 8, of which a word has as many"
    if q.data.dtype is not torch.uint8 or q.data.stride(-1) != 1 or 2 * q.data.shape[-1] < k:
        return f"{q.data.dtype} {list(q.data.shape)} are not rows of {k} codes, two a byte"
    if scale is None or scale.dtype not in GROUP_SCALES or scale.shape != (*q.shape[:-1], -(-k // group)):
        return f"scales in BF16 or FP32, one for each {group} values of a row, are not there"
    return None


def held_scale(q: QTensor) -> Tensor | None:
    """The scales of `q` as the kernels read them: INT4's as stored; FP8's in FP32, times the power of two that widening leaves
    out.

    They must outlive a `struct_of` them.
    """
    if q.scale is not None and q.scheme.dtype is WeightDType.INT4:
        return q.scale.contiguous()
    return None if q.scale is None else (q.scale.float() * WIDEN_FACTOR.get(q.data.dtype, 1.0)).contiguous()


def struct_of(q: QTensor, scale: Tensor | None, tokens: int) -> Linear:
    """The C struct of a weight [N, K] that multiplies so many tokens, and its `held_scale`."""
    n, k = q.shape
    if scale is not None and q.scheme.dtype is WeightDType.INT4:
        return Linear(
            weight=q.data.data_ptr(), group_scale=scale.data_ptr(), n=n, k=k, stride=2 * q.data.stride(0),
            group=q.scheme.group, kind=PACKED_INT4, group_kind=KINDS[scale.dtype],
        )  # fmt: skip
    by_group = scale is not None and q.scheme.weight is Granularity.BLOCK
    by_row = scale is not None and scale.shape[0] == n and (n > 1 or scale.shape[1] == 1)
    return Linear(
        weight=q.data.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        n=n,
        k=k,
        stride=q.data.stride(0),
        scale_rows=1 if by_row else BLOCK,
        scale_columns=scale.shape[1] if by_group and scale is not None else 0,
        kind=KINDS[q.data.dtype],
        activation=_QUANTIZED[q.scheme.activation_of(tokens)],
    )


def is_tiled(q: QTensor) -> bool:
    """Whether the kernels hold a weight, or each of a stack, in the order in which matrix tiles read it: FP8 and BF16 are."""
    return used() == "amx" and (q.data.dtype is torch.bfloat16 or q.data.dtype in FP8_MAX)


def tiled(values: Tensor, into: Tensor | None = None) -> Tensor:
    """Values [N, K], FP8 codes or BF16, as bytes [N / 64, K / 64 times a value's bytes, 64, 64]: csrc/types.h. Zeros lie
    behind N and K.

    They are copied once, to `into` if it is given: a second copy would be the peak of a load.
    """
    (n, k), size = values.shape, values.itemsize
    (groups, rows), (lines, rest) = divmod(n, TILE), divmod(k * size, TILE)
    bytes_of = values.view(torch.uint8)
    shape = tiled_shape(n, k, size)
    if into is None:
        into = bytes_of.new_empty(shape)
    whole = bytes_of[:, : lines * TILE].unflatten(1, (lines, TILE))
    if into.shape[:2] != (groups, lines):
        into.zero_()
    into[:groups, :lines] = whole[: groups * TILE].unflatten(0, (groups, TILE)).transpose(1, 2)
    if rows:
        into[groups, :lines, :rows] = whole[groups * TILE :].transpose(0, 1)
    if rest:
        for group in range(len(into)):
            some = bytes_of[group * TILE : (group + 1) * TILE, lines * TILE :]
            into[group, lines, : len(some), :rest] = some
    return into


def tiled_shape(n: int, k: int, size: int) -> tuple[int, int, int, int]:
    """The shape of `tiled` [N, K] of `size` bytes a value."""
    return -(-n // TILE), -(-k // TILE) * size, TILE, TILE


def packed_bytes(q: QTensor) -> int:
    """Bytes of a packed weight [N, K], or a stack of such, and its scales: with padding to whole blocks if `tiled`."""
    if missing() is not None or not is_tiled(q):
        return q.nbytes
    *experts, n, k = q.shape
    return q.nbytes - q.data.nbytes + prod(experts) * prod(tiled_shape(n, k, q.data.itemsize))


class PackedNative(PackedWeight):
    """A weight [N, K] as stored or `tiled`, and its scales. few: its struct for up to FEW_TOKENS tokens.

    dtype and activation are those of the stored weight: `data` may be bytes, and weights/in_place.py compares no structs.
    """

    def __init__(self, q: QTensor):
        self.n, self.k = q.shape
        self.dtype, self.activation = q.data.dtype, q.scheme.activation
        self.scale = held_scale(q)
        self.struct = self.few = struct_of(q, self.scale, FEW_TOKENS + 1)
        if q.scheme.exact_few:
            self.few = struct_of(q, self.scale, FEW_TOKENS)
        self.data, self.held_bytes = q.data, packed_bytes(q)
        if is_tiled(q):
            self.data = tiled(q.data[:, : self.k])
            for struct in (self.struct, self.few):
                struct.weight, struct.tiled = self.data.data_ptr(), 1
        self.address, self.address_of_few = ctypes.addressof(self.struct), ctypes.addressof(self.few)
        self.multiply = kernels().octavo_linear

    def __call__(self, x: Operand) -> Tensor:
        x = values_of(x)
        if not x.is_contiguous() and x.stride(1) != 1:
            x = x.contiguous()
        m = x.shape[0]
        y, address = x.new_empty(m, self.n), self.address_of_few if m <= FEW_TOKENS else self.address
        launch(self.multiply, address, x.data_ptr(), m, x.stride(0), y.data_ptr(), KINDS[x.dtype], get_num_threads())
        return y

    def keep(self, q: QTensor) -> None:
        if not self.struct.tiled:  # else `rows` reads the codes in their order here, and nobody needs the others
            super().keep(q)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        if self.struct.kind == PACKED_INT4:
            return super().rows(ids, dtype)  # raises: INT4 has no row lookup
        ids, y = ids.long().contiguous(), self.data.new_empty(len(ids), self.k, dtype=dtype)
        launch(kernels().octavo_look_up, self.address, ids.data_ptr(), y.data_ptr(), len(ids), KINDS[dtype], get_num_threads())
        return y


def captures(head_dim: int, weights: Iterable[PackedWeight], latent: bool = False) -> bool:
    """Whether decode steps can be recorded.

    Torch's attention, the fallback for larger heads, reads context lengths on the host. A recording would also keep the FP32
    copy of each weight that the reference dequantizes.
    """
    fits = head_dim <= (MAX_SHARED if latent else _MAX_DIM)
    return fits and not any(isinstance(w, reference.Dequantized) and w.q.scheme.quantized for w in weights)


def is_readable(x: Tensor) -> bool:
    """Whether the kernels read x without a copy."""
    return (x.dtype is torch.bfloat16 or x.dtype is torch.float32) and (x.is_contiguous() or x.stride(-1) == 1)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    """As `ops.rms_norm`, with dense results; x is [M, width] or a view [T, H, width]."""
    dims = x.dim()
    if not (2 <= dims <= 3 and is_readable(x) and weight.dtype is x.dtype):
        return reference.rms_norm(x, weight, eps, residual)
    *rows, width = x.shape
    inner, inside = (1, 0) if dims == 2 else (rows[1], x.stride(1))
    y, carried, given, total = x.new_empty(*x.shape), x, None, None
    if residual is not None:
        residual, carried = residual.contiguous(), x.new_empty(*x.shape)
        given, total = residual.data_ptr(), carried.data_ptr()
    launch(kernels().octavo_rms_norm,
        x.data_ptr(), given, weight.data_ptr(), y.data_ptr(), total, rows[0] * inner, width, inner, x.stride(0), inside, eps,
        KINDS[x.dtype], get_num_threads(),
    )  # fmt: skip
    return Activation(y), carried


def silu_mul(x: Tensor, readers: Sequence[Reader] = ()) -> Activation:
    if x.dim() != 2 or not is_readable(x):
        return reference.silu_mul(x)
    rows, width = x.shape
    y = x.new_empty(rows, width // 2)
    launch(kernels().octavo_silu_mul,
        x.data_ptr(), y.data_ptr(), rows, width // 2, x.stride(0), KINDS[x.dtype], get_num_threads(),
    )  # fmt: skip
    return Activation(y)


def argmax(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or not is_readable(logits):
        return reference.argmax(logits)
    (rows, vocab), found = logits.shape, logits.new_empty(logits.shape[0], dtype=torch.int64)
    launch(kernels().octavo_argmax,
        logits.data_ptr(), found.data_ptr(), rows, vocab, logits.stride(0), KINDS[logits.dtype], get_num_threads(),
    )  # fmt: skip
    return found


def sample(logits: Tensor, temperature: Tensor, u: Tensor, filters: Filters | None) -> Tensor:
    logits = logits.contiguous()
    found = logits.new_empty(len(logits), dtype=torch.int64)
    kept = (None, None, None) if filters is None else [x.data_ptr() for x in (filters.top_k, filters.top_p, filters.min_p)]
    launch(kernels().octavo_sample,
        logits.data_ptr(), found.data_ptr(), temperature.data_ptr(), u.data_ptr(), *kept, *logits.shape, get_num_threads(),
    )  # fmt: skip
    return found


def rotate(x: Tensor, cos_sin: Tensor, rows: Tensor, interleaved: bool = False) -> Tensor:
    if interleaved or not is_readable(x):
        return reference.rotate(x, cos_sin, rows, interleaved)
    (tokens, heads, dim), cos_sin, rows = x.shape, cos_sin.contiguous(), rows.contiguous()
    y = x.new_empty(*x.shape)
    launch(kernels().octavo_rotate,
        x.data_ptr(), y.data_ptr(), cos_sin.data_ptr(), rows.data_ptr(), tokens, heads, dim, x.stride(0), x.stride(1),
        cos_sin.shape[1], KINDS[x.dtype], get_num_threads(),
    )  # fmt: skip
    return y


def round_columns(values: Tensor, offset: Tensor, influence: Tensor, scale: Tensor) -> Tensor:
    moved = torch.empty_like(values)
    launch(kernels().octavo_round_columns,
        values.data_ptr(), offset.data_ptr(), moved.data_ptr(), influence.data_ptr(), scale.data_ptr(), *values.shape,
        influence.stride(0), 0 if len(scale) == 1 else scale.stride(0), get_num_threads(),
    )  # fmt: skip
    return moved


def descend(values: Tensor, offset: Tensor, influence: Tensor, scale: Tensor, sweeps: int) -> None:
    strides = scale.stride(0), int(scale.shape[1] > 1)
    launch(kernels().octavo_descend,
        values.data_ptr(), offset.data_ptr(), influence.data_ptr(), scale.data_ptr(), *values.shape, *strides, sweeps,
        get_num_threads(),
    )  # fmt: skip


def scale_errors(values: Tensor, scale: Tensor, steps: Tensor, weight: Tensor) -> Tensor:
    (rows, width), groups = values.shape, scale.shape[1]
    errors = values.new_empty(len(steps), rows, groups)
    launch(kernels().octavo_scale_errors,
        values.data_ptr(), scale.data_ptr(), steps.data_ptr(), weight.data_ptr(), errors.data_ptr(), rows, width, groups,
        BLOCK if groups > 1 else width, len(steps), get_num_threads(),
    )  # fmt: skip
    return errors


def round_keys(k: Tensor, rounding: KeyRounding, scale: Tensor, dtype: torch.dtype) -> Tensor:
    (tokens, heads, dim), (influence, order) = k.shape, rounding
    if dim > _MAX_DIM or not is_readable(k):
        return reference.round_keys(k, rounding, scale, dtype)
    out = k.new_empty(*k.shape)
    launch(kernels().octavo_round_keys,
        k.data_ptr(), out.data_ptr(), influence.data_ptr(), order.data_ptr(), scale.data_ptr(), tokens, heads, dim,
        k.stride(0), k.stride(1), int(scale.numel() > 1), KINDS[k.dtype], KINDS[dtype], get_num_threads(),
    )  # fmt: skip
    return out


def add_gram(total: Tensor, x: Tensor) -> None:
    if not is_readable(x):
        return reference.add_gram(total, x)
    launch(kernels().octavo_add_gram,
        x.data_ptr(), total.data_ptr(), *x.shape, x.stride(0), KINDS[x.dtype], get_num_threads(),
    )  # fmt: skip


def write_kv(cache: LayerCache, slots: Tensor, k: Tensor, v: Tensor) -> None:
    if not (is_readable(k) and is_readable(v) and k.dtype is v.dtype):
        return reference.write_kv(cache, slots, k, v)
    slots = slots.contiguous()
    launch(kernels().octavo_rope_write_kv,
        None, k.data_ptr(), v.data_ptr(), None, None, None, None, None, slots.data_ptr(), byref(_struct(cache)), len(k), 0, 0,
        0, *k.stride()[:2], *v.stride()[:2], 0, 0.0, KINDS[k.dtype], get_num_threads(),
    )  # fmt: skip


def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, slots: Tensor) -> Tensor:
    (tokens, heads, dim), norms = q.shape, rope.norms
    if not (dim <= _MAX_DIM and is_readable(q) and is_readable(k) and is_readable(v) and q.dtype is k.dtype is v.dtype):
        return reference.rope_write_kv(q, k, v, rope, cache, slots)
    q_norm = k_norm = None
    eps = 0.0
    if norms is not None:
        if not (norms.q.dtype is norms.k.dtype is q.dtype):
            return reference.rope_write_kv(q, k, v, rope, cache, slots)
        q_norm, k_norm, eps = norms.q.data_ptr(), norms.k.data_ptr(), norms.eps
    out = q.new_empty(*q.shape)
    cos_sin, rows, slots = rope.cos_sin.contiguous(), rope.rows.contiguous(), slots.contiguous()
    launch(kernels().octavo_rope_write_kv,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), q_norm, k_norm, out.data_ptr(), cos_sin.data_ptr(), rows.data_ptr(),
        slots.data_ptr(), byref(_struct(cache)), tokens, heads, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        cos_sin.shape[1], eps, KINDS[q.dtype], get_num_threads(),
    )  # fmt: skip
    return out


def attention(q: Tensor, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
    if q.shape[2] > _MAX_DIM or not is_readable(q):
        return attention_by_torch(q, cache, batch, scale, window)
    factor = WIDEN_FACTOR.get(cache.views["k"].dtype, 1.0)
    out, tables = q.new_empty(*q.shape), batch.block_tables
    launch(kernels().octavo_attention,
        q.data_ptr(), out.data_ptr(), byref(_struct(cache)), tables.data_ptr(), batch.query_start_loc.data_ptr(),
        batch.seq_lens.data_ptr(), tables.stride(0), tables.shape[0], q.shape[1], q.stride(0), q.stride(1), window or 0,
        scale * factor, factor, KINDS[q.dtype], get_num_threads(),
    )  # fmt: skip
    return out


class _HeldCache(Cache):
    """A recording holds this struct, and the struct holds the tensors whose addresses it contains."""

    scales: tuple[Tensor, ...]


def _struct(cache: LayerCache) -> Cache:
    (k, v), scales = (cache.views[name] for name in "kv"), (cache.k_scale, cache.v_scale)
    scaled = tuple(
        (t.data_ptr(), *t.stride()[:2]) for name in ("k_scale", "v_scale") if (t := cache.views.get(name)) is not None
    )
    layer: tuple[tuple[int | None, int], ...] = ((None, 0),) * 2
    if k.dtype in FP8_MAX and not scaled:
        layer = tuple((s.data_ptr(), s.stride(0) if s.numel() > 1 else 0) for s in scales)
    made = _made_struct(k.data_ptr(), v.data_ptr(), k.stride(), k.shape[1:], k.dtype, scaled, layer)
    made.scales = scales
    return made


@lru_cache(maxsize=1024)
def _made_struct(
    k: int, v: int, stride: tuple[int, ...], shape: torch.Size, dtype: torch.dtype, scaled: tuple[tuple[int, int, int], ...],
    layer: tuple[tuple[int | None, int], ...],
) -> _HeldCache:  # fmt: skip
    """The C struct of a layer's KV cache. It depends only on the arguments, so a cached struct cannot be stale."""
    size = dtype.itemsize
    (k_scale, block, token), (v_scale, _, _) = scaled or ((None, 0, 0),) * 2
    (k_layer, k_layer_head), (v_layer, v_layer_head) = layer
    return _HeldCache(
        k=k, v=v, k_scale=k_scale, v_scale=v_scale, k_layer=k_layer, v_layer=v_layer, block=stride[0] * size,
        token=stride[1] * size, head=stride[2] * size, scale_block=block * 4, scale_token=token * 4, k_layer_head=k_layer_head,
        v_layer_head=v_layer_head, kind=KINDS[dtype], block_size=shape[0], kv_heads=shape[1], dim=shape[2],
    )  # fmt: skip
