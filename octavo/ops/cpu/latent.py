"""Ops of MLA and of the indexer on a CPU, by the C kernels. Operands that those do not support go to the reference.

Keys and values are expanded from latents by torch's matrix product, a part of a context at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref
from functools import lru_cache

import torch
from torch import Tensor, get_num_threads

from octavo.batch import ForwardBatch
from octavo.kvcache import IndexCache, LatentCache
from octavo.ops import reference_latent
from octavo.ops.contract import Norm, Rotation
from octavo.ops.cpu.library import KINDS, Shared, kernels
from octavo.ops.cpu.native import MAX_SHARED, is_readable
from octavo.ops.cpu.op_recorder import launch

__all__ = [
    "absorbed_queries",
    "expanded_attention",
    "head_linear",
    "latent_attention",
    "select_keys",
    "write_index_keys",
    "write_latent",
]

VALUES = 1 << 22  # keys, values or scores computed at a time; bounds memory for long contexts


def write_latent(kv: Tensor, norm: Norm, rotation: Rotation, cache: LatentCache, slots: Tensor) -> None:
    if not (is_readable(kv) and norm.weight.dtype is kv.dtype and kv.shape[1] <= MAX_SHARED):
        return reference_latent.write_latent(kv, norm, rotation, cache, slots)
    cos_sin, rows, slots = rotation.cos_sin.contiguous(), rotation.rows.contiguous(), slots.contiguous()
    launch(kernels().octavo_write_latent,
        kv.data_ptr(), norm.weight.data_ptr(), cos_sin.data_ptr(), rows.data_ptr(), slots.data_ptr(),
        byref(_shared(cache.latent, cache.scale, cache.rope)), len(kv), kv.stride(0), cos_sin.shape[1], norm.eps,
        rotation.interleaved, KINDS[kv.dtype], get_num_threads(),
    )  # fmt: skip


def write_index_keys(k: Tensor, norm: Norm, rotation: Rotation, cache: IndexCache, slots: Tensor) -> None:
    if not (is_readable(k) and norm.weight.dtype is k.dtype and k.shape[1] <= MAX_SHARED):
        return reference_latent.write_index_keys(k, norm, rotation, cache, slots)
    cos_sin, rows, slots = rotation.cos_sin.contiguous(), rotation.rows.contiguous(), slots.contiguous()
    launch(kernels().octavo_write_index_keys,
        k.data_ptr(), norm.weight.data_ptr(), None if norm.bias is None else norm.bias.data_ptr(), cos_sin.data_ptr(),
        rows.data_ptr(), slots.data_ptr(), byref(_shared(cache.k, cache.scale)), len(k), k.stride(0), cos_sin.shape[1],
        norm.eps, rotation.interleaved, KINDS[k.dtype], get_num_threads(),
    )  # fmt: skip


def head_linear(x: Tensor, w: Tensor) -> Tensor:
    if not _multiplied(x, w):
        return reference_latent.head_linear(x, w)
    y = x.new_empty(*x.shape[:2], w.shape[2])
    _multiply(x, w, y, None)
    return y


def absorbed_queries(q: Tensor, up_k: Tensor, rotation: Rotation) -> Tensor:
    if not _multiplied(q, up_k):
        return reference_latent.absorbed_queries(q, up_k, rotation)
    out = q.new_empty(*q.shape[:2], up_k.shape[2] + q.shape[2] - up_k.shape[1])
    _multiply(q, up_k, out, rotation)
    return out


def _multiplied(x: Tensor, w: Tensor) -> bool:
    """Whether the kernels multiply each head of x by its matrix of w without copies."""
    lies = 1 in w.stride()[1:] and w.dtype in (torch.float32, torch.bfloat16)
    return is_readable(x) and lies and max(*x.shape[2:], *w.shape[1:]) <= MAX_SHARED


def _multiply(x: Tensor, w: Tensor, y: Tensor, rotation: Rotation | None) -> None:
    """Per-head products into y; with a rotation, the rest of x's last dimension is rotated into the rest of y's."""
    (heads, k, n), rotated = w.shape, 0
    angles: tuple[int | None, int | None] = None, None
    if rotation is not None:
        cos_sin, rows = rotation.cos_sin.contiguous(), rotation.rows.contiguous()
        angles, rotated = (cos_sin.data_ptr(), rows.data_ptr()), cos_sin.shape[1]
    launch(kernels().octavo_head_linear,
        x.data_ptr(), w.data_ptr(), y.data_ptr(), *angles, *x.stride()[:2], *w.stride(), *y.stride()[:2], len(x), heads, k, n,
        rotated, rotation is not None and rotation.interleaved, KINDS[x.dtype], KINDS[w.dtype], get_num_threads(),
    )  # fmt: skip


def latent_attention(q: Tensor, cache: LatentCache, batch: ForwardBatch, scale: float, chosen: Tensor | None = None) -> Tensor:
    if not (is_readable(q) and q.shape[2] <= MAX_SHARED):
        return reference_latent.latent_attention(q, cache, batch, scale, chosen)
    out, tables = q.new_empty(*q.shape[:2], cache.latent.shape[-1]), batch.block_tables
    places, top_k = None, 0
    if chosen is not None:
        chosen = chosen.contiguous()
        places, top_k = chosen.data_ptr(), chosen.shape[1]
    launch(kernels().octavo_latent_attention,
        q.data_ptr(), out.data_ptr(), byref(_shared(cache.latent, cache.scale, cache.rope)), tables.data_ptr(),
        batch.query_start_loc.data_ptr(), batch.seq_lens.data_ptr(), places, tables.stride(0), tables.shape[0], q.shape[1],
        *q.stride()[:2], top_k, scale, KINDS[q.dtype], get_num_threads(),
    )  # fmt: skip
    return out


def select_keys(q: Tensor, weights: Tensor, rotation: Rotation, cache: IndexCache, batch: ForwardBatch, top_k: int) -> Tensor:
    if not (is_readable(q) and is_readable(weights) and weights.dtype is q.dtype and q.shape[2] <= MAX_SHARED):
        return reference_latent.select_keys(q, weights, rotation, cache, batch, top_k)
    cos_sin, rows, tables = rotation.cos_sin.contiguous(), rotation.rows.contiguous(), batch.block_tables
    out = q.new_empty(len(q), top_k, dtype=torch.int32)
    launch(kernels().octavo_select_keys,
        q.data_ptr(), weights.data_ptr(), cos_sin.data_ptr(), rows.data_ptr(), byref(_shared(cache.k, cache.scale)),
        tables.data_ptr(), batch.query_start_loc.data_ptr(), batch.seq_lens.data_ptr(), out.data_ptr(), *q.stride()[:2],
        weights.stride(0), tables.stride(0), len(q), tables.shape[0], q.shape[1], cos_sin.shape[1], top_k, rotation.interleaved,
        KINDS[q.dtype], get_num_threads(),
    )  # fmt: skip
    return out


def _shared(values: Tensor, scale: Tensor | None, rope: Tensor | None = None) -> Shared:
    fields = ((t.data_ptr(), t.stride(), t.shape[-1], t.dtype) if t is not None else None for t in (values, rope, scale))
    return _made_struct(*fields, values.shape[1])


_Field = tuple[int, tuple[int, ...], int, torch.dtype]


@lru_cache(maxsize=1024)
def _made_struct(values: _Field, rope: _Field | None, scale: _Field | None, block_size: int) -> Shared:
    """The C struct of a layer's cache. It depends only on the arguments, so a cached struct cannot be stale."""
    made = Shared(values=values[0], kind=KINDS[values[3]], width=values[2], block_size=block_size)
    made.block, made.token = _bytes(values)
    if rope is not None:
        made.rope, made.rope_kind, made.rope_width = rope[0], KINDS[rope[3]], rope[2]
        made.rope_block, made.rope_token = _bytes(rope)
    if scale is not None:
        made.scale = scale[0]
        made.scale_block, made.scale_token = _bytes(scale)
    return made


def _bytes(field: _Field) -> tuple[int, int]:
    """Strides in bytes between blocks and between tokens."""
    _, (block, token, *_), _, dtype = field
    return block * dtype.itemsize, token * dtype.itemsize


def expanded_attention(
    q: Tensor, up_k: Tensor, up_v: Tensor, rotation: Rotation, cache: LatentCache, batch: ForwardBatch, scale: float
) -> Tensor:
    """Online softmax in FP32: keys and values of a part of a context are expanded once, for all its queries."""
    (tokens, heads, _), nope, width = q.shape, up_k.shape[1], up_v.shape[2]
    rank, rope = cache.latent.shape[-1], cache.rope.shape[-1]
    out = q.new_zeros(tokens, heads, width)
    up_k, up_v, start = up_k.float().mT, up_v.float(), 0
    for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        part = slice(start, start + count)
        start += count
        if not context:
            continue
        q_rope = reference_latent.rotated(q[part, :, nope:], rotation._replace(rows=rotation.rows[part]))
        queries = torch.cat([q[part, :, :nope], q_rope], -1).float().transpose(0, 1).mul_(scale)  # [heads, count, nope + rope]
        sums, most, total = _start(queries, width)
        for blocks, first, last in _parts(batch, request, context, heads * max(nope + rope, width)):
            latent, key = reference_latent.read_latents(cache, blocks, last - first).split([rank, rope], 1)
            k = torch.cat([latent @ up_k, key.expand(heads, -1, -1)], -1)
            v = latent @ up_v
            rows = max(1, VALUES // (heads * (last - first)))
            for row in range(max(0, first - (context - count)) // rows * rows, count, rows):
                some = slice(row, row + rows)
                scores = queries[:, some] @ k.mT
                at = torch.arange(context - count + row, context - count + row + scores.shape[1])[:, None]
                if last - 1 > context - count + row:
                    scores.masked_fill_(torch.arange(first, last) > at, float("-inf"))
                larger = torch.maximum(most[:, some], scores.amax(-1, keepdim=True))
                shrink = (most[:, some] - larger).exp_()
                weights = scores.sub_(larger).exp_()
                total[:, some] = total[:, some] * shrink + weights.sum(-1, keepdim=True)
                sums[:, some] = torch.baddbmm(sums[:, some] * shrink, weights, v)
                most[:, some] = larger
        out[part] = (sums / total).transpose(0, 1).to(q.dtype)
    return out


def _start(queries: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Initial online-softmax state: accumulators [heads, count, width], maxima and totals [heads, count, 1]."""
    shape, least = queries.shape[:2], torch.finfo(torch.float32).min
    return queries.new_zeros(*shape, width), queries.new_full((*shape, 1), least), queries.new_zeros(*shape, 1)


def _parts(batch: ForwardBatch, request: int, context: int, values: int) -> Iterator[tuple[Tensor, int, int]]:
    """Parts of a request's context, for `values` values per position: (blocks, first position, end)."""
    step = max(1, VALUES // values // batch.block_size) * batch.block_size
    for first in range(0, context, step):
        last = min(first + step, context)
        blocks = batch.block_tables[request, first // batch.block_size : -(-last // batch.block_size)]
        yield blocks.long(), first, last
