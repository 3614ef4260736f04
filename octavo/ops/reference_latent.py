"""The ops of multi-head latent attention (MLA) and of DeepSeek's sparse attention in plain torch; see octavo.ops.reference.

Sources: DeepSeek-V2 (arXiv:2405.04434, section 2.1) for MLA and weight absorption; DeepSeek-V3.2 (arXiv:2512.02556) for the
indexer. The cache format `fp8_ds_mla` is FlashMLA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache as cached

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LATENT_GROUP, IndexCache, LatentCache
from octavo.ops.contract import Norm, Rotation
from octavo.ops.reference import normed
from octavo.platform import FP8_MAX

__all__ = [
    "absorbed_queries",
    "expanded_attention",
    "hadamard",
    "head_linear",
    "latent_attention",
    "power_of_two_codes",
    "read_index_keys",
    "read_latents",
    "rotated",
    "select_keys",
    "write_index_keys",
    "write_latent",
]

PEAK_FLOOR = 1e-4  # smallest amax of a group of values that share a scale


def head_linear(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), w.to(x.dtype)).transpose(0, 1)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding of x [T, ..., R], R the rotary width: computed in FP32, rounded to x's dtype."""
    cos, sin = (t.view(-1, *[1] * (x.dim() - 2), t.shape[1]) for t in rotation.cos_sin[rotation.rows].chunk(2, -1))
    if rotation.interleaved:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def power_of_two_codes(x: Tensor, fp8_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes, scale FP32 [..., ceil(K / 128)]) of x [..., K]. Each group of 128 values has a scale: the smallest power of two
    that brings the group's amax (at least 1e-4) into the range of the codes."""
    k, limit = x.shape[-1], FP8_MAX[fp8_dtype]
    groups = F.pad(x.float(), (0, -k % LATENT_GROUP)).unflatten(-1, (-1, LATENT_GROUP))
    peak = groups.abs().amax(-1).clamp(min=PEAK_FLOOR)
    mantissa, exponent = torch.frexp(peak / torch.full_like(peak, limit))  # 0.5 <= mantissa < 1
    scale = torch.ldexp(torch.ones_like(peak), exponent - (mantissa == 0.5).int())
    codes = (groups / scale.unsqueeze(-1)).clamp_(-limit, limit).to(fp8_dtype)
    return codes.flatten(-2)[..., :k], scale


def _store(view: Tensor, at: tuple[Tensor, Tensor], values: Tensor) -> None:
    if view.dtype in FP8_MAX:  # torch scatters bytes, not FP8
        view.view(torch.uint8)[at] = values.view(torch.uint8)
    else:
        view[at] = values.to(view.dtype)


def write_latent(kv: Tensor, norm: Norm, rotation: Rotation, cache: LatentCache, slots: Tensor) -> None:
    rank, size = cache.latent.shape[-1], cache.latent.shape[1]
    at = slots // size, slots % size
    latent, key = normed(kv[:, :rank], norm.weight, norm.eps), rotated(kv[:, rank:], rotation)
    latent, key = (x.nan_to_num(0.0, posinf=0.0, neginf=0.0) for x in (latent, key))
    _store(cache.rope, at, key)
    if cache.scale is None:
        return _store(cache.latent, at, latent)
    codes, scale = power_of_two_codes(latent, cache.latent.dtype)
    _store(cache.latent, at, codes)
    _store(cache.scale, at, scale)


def read_latents(cache: LatentCache, blocks: Tensor, length: int) -> Tensor:
    """The first `length` latents of the blocks, each followed by its rope key: FP32 [length, R + D]."""
    latent = _rows(cache.latent, blocks, length)
    if cache.scale is not None:
        scale = _rows(cache.scale, blocks, length).repeat_interleave(LATENT_GROUP, 1)
        latent = latent * scale[:, : latent.shape[1]]
    return torch.cat([latent, _rows(cache.rope, blocks, length)], 1)


def _rows(view: Tensor, blocks: Tensor, length: int) -> Tensor:
    if view.dtype in FP8_MAX:
        return view.view(torch.uint8)[blocks].flatten(0, 1)[:length].view(view.dtype).float()
    return view[blocks].flatten(0, 1)[:length].float()


def absorbed_queries(q: Tensor, up_k: Tensor, rotation: Rotation) -> Tensor:
    nope = up_k.shape[1]
    return torch.cat([head_linear(q[..., :nope], up_k), rotated(q[..., nope:], rotation)], -1)


def latent_attention(q: Tensor, cache: LatentCache, batch: ForwardBatch, scale: float, chosen: Tensor | None = None) -> Tensor:
    rank = cache.latent.shape[-1]
    out = q.new_zeros(*q.shape[:2], rank)
    for part, blocks, context, at in _requests(batch):
        keys = read_latents(cache, blocks, context)
        hidden = torch.arange(context, device=q.device) > at
        if chosen is not None:
            picked = chosen[part].long()
            seen = torch.zeros(len(at), context + 1, dtype=torch.bool, device=q.device)
            seen.scatter_(1, torch.where(picked < 0, context, picked), True)
            hidden = hidden | ~seen[:, :context]
        scores = torch.einsum("qhd,kd->hqk", q[part].float(), keys) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[part] = torch.einsum("hqk,kd->qhd", weights, keys[:, :rank]).to(q.dtype)
    return out


def expanded_attention(
    q: Tensor, up_k: Tensor, up_v: Tensor, rotation: Rotation, cache: LatentCache, batch: ForwardBatch, scale: float
) -> Tensor:
    rank, nope = cache.latent.shape[-1], up_k.shape[1]
    out = q.new_zeros(*q.shape[:2], up_v.shape[2])
    q = torch.cat([q[..., :nope], rotated(q[..., nope:], rotation)], -1)
    for part, blocks, context, at in _requests(batch):
        latent, key = read_latents(cache, blocks, context).split([rank, cache.rope.shape[-1]], 1)
        k = torch.einsum("kr,hnr->hkn", latent, up_k.float())
        v = torch.einsum("kr,hrv->hkv", latent, up_v.float())
        k = torch.cat([k, key.expand(len(k), -1, -1)], -1)
        scores = torch.einsum("qhd,hkd->hqk", q[part].float(), k) * scale
        hidden = torch.arange(context, device=q.device) > at
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[part] = torch.einsum("hqk,hkv->qhv", weights, v).to(q.dtype)
    return out


def _requests(batch: ForwardBatch) -> Iterator[tuple[slice, Tensor, int, Tensor]]:
    """For each request that does not pad a graph: its query rows, blocks, context length and positions [n, 1]."""
    start = 0
    for row, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        part = slice(start, start + count)
        start += count
        if context:
            blocks = batch.block_tables[row, : -(-context // batch.block_size)].long()
            yield part, blocks, context, torch.arange(context - count, context, device=blocks.device)[:, None]


@cached
def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix [size, size] (Sylvester's construction), size a power of two: FP32, entries ±size^-1/2."""
    signs = torch.ones(1, 1)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    found: Tensor = signs * size**-0.5
    return found


def _as_scored(x: Tensor, rotation: Rotation) -> Tensor:
    """x [T, ..., D] with its first dimensions rotated, as the indexer scores it: FP32, rounded to x's dtype once."""
    width = rotation.cos_sin.shape[1]
    return torch.cat([rotated(x[..., :width], rotation), x[..., width:]], -1).float()


def write_index_keys(k: Tensor, norm: Norm, rotation: Rotation, cache: IndexCache, slots: Tensor) -> None:
    size, dim = cache.k.shape[1], cache.k.shape[-1]
    at = slots // size, slots % size
    bias = None if norm.bias is None else norm.bias.float()
    keys = F.layer_norm(k.float(), (dim,), norm.weight.float(), bias, norm.eps).to(k.dtype)
    keys = _as_scored(keys, rotation).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    if cache.scale is None:
        return _store(cache.k, at, keys)
    codes, scale = power_of_two_codes(keys @ hadamard(dim).to(k.device), cache.k.dtype)
    _store(cache.k, at, codes)
    _store(cache.scale, at, scale)


def read_index_keys(cache: IndexCache, blocks: Tensor, length: int) -> Tensor:
    """The first `length` keys of the blocks, FP32 [length, D], dequantized; stored codes stay Hadamard-transformed."""
    keys = _rows(cache.k, blocks, length)
    return keys if cache.scale is None else keys * _rows(cache.scale, blocks, length)


def select_keys(q: Tensor, weights: Tensor, rotation: Rotation, cache: IndexCache, batch: ForwardBatch, top_k: int) -> Tensor:
    out = torch.full((len(q), top_k), -1, dtype=torch.int32, device=q.device)
    queries = _as_scored(q, rotation)
    if cache.scale is not None:
        codes, scale = power_of_two_codes(queries @ hadamard(q.shape[-1]).to(q.device), cache.k.dtype)
        queries = codes.float() * scale
    for part, blocks, context, at in _requests(batch):
        keys = read_index_keys(cache, blocks, context)
        scores = torch.einsum("qhd,kd->qhk", queries[part], keys).relu_()
        scores = torch.einsum("qhk,qh->qk", scores, weights[part].float())
        places = torch.arange(context, device=q.device)
        scores = scores.nan_to_num(float("-inf")).masked_fill(places > at, float("-inf"))
        best = scores.argsort(stable=True, dim=-1, descending=True)[:, :top_k]
        best = torch.where(best > at, context, best).sort(-1).values  # masked (future) positions sort last
        out[part, : best.shape[1]] = torch.where(best == context, -1, best).int()
    return out
