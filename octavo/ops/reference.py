"""Every op in plain torch, as the definition of its contract. Runs on any device and is not optimized."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.kvcache import KeyRounding, LayerCache
from octavo.ops.contract import (
    ANY_KIND,
    Activation,
    Dispatch,
    Filters,
    Norm,
    Operand,
    PackedStack,
    PackedWeight,
    Product,
    Reader,
    Rope,
    Routed,
    Router,
    Segments,
    Uncombined,
    Unscaled,
    Unsummed,
    not_taken,
    values_of,
)
from octavo.platform import FP8_MAX, Platform
from octavo.quant.qtensor import QTensor, dequantize
from octavo.quant.scheme import BLOCK, Granularity, WeightDType

__all__ = [
    "Dequantized",
    "EmptyStack",
    "EmptyWeight",
    "ReferenceLinear",
    "ReferenceStack",
    "add_gram",
    "argmax",
    "attention",
    "captures_segments",
    "combine",
    "dispatch",
    "gelu",
    "layer_norm",
    "normed_and_rotated",
    "quantize_activation",
    "rms_norm",
    "rope_write_kv",
    "rotate",
    "round_columns",
    "round_keys",
    "route",
    "sample",
    "segment_attention",
    "silu_mul",
    "write_kv",
]

SUM_BLOCK = 256  # weights per block of a two-level sum
SCALE_FLOOR = 1 / (448 * 512)  # smallest scale of an activation: an all-zero token must not divide by zero


def quantize_activation(x: Tensor, granularity: Granularity | None, fp8_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes [M, K] in FP8, scale FP32 [M, 1] for a token or [M, ceil(K/128)] for groups of 128)."""
    limit = FP8_MAX[fp8_dtype]
    k = x.shape[1]
    groups = x.float().unsqueeze(1)
    if granularity is Granularity.BLOCK:
        groups = F.pad(x.float(), (0, -k % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = token_scale(groups.abs().amax(-1), limit)
    codes = (groups / scale.unsqueeze(-1)).clamp_(-limit, limit).to(fp8_dtype)
    return codes.flatten(1)[:, :k], scale


def token_scale(peak: Tensor, limit: float) -> Tensor:
    """The scale of activations up to `peak`. A true division: a GPU would multiply by the reciprocal of a Python number."""
    return (peak / torch.full_like(peak, limit)).clamp_(min=SCALE_FLOOR)


class Dequantized(PackedWeight):
    """The stored weight itself, dequantized at each call."""

    def __init__(self, q: QTensor):
        self.q = q
        self.held_bytes = q.nbytes

    def __call__(self, x: Operand) -> Tensor:
        x, q = values_of(x), self.q
        return self.multiplied(x, q.scheme.activation_of(len(x)))

    def multiplied(self, x: Tensor, activation: Granularity | None) -> Tensor:
        """The product of activations with such scales."""
        q = self.q
        if activation is None and q.scheme.dtype is WeightDType.FP8:
            return (x.float() @ dequantize(q).mT).to(x.dtype)
        if activation is None:
            return x @ dequantize(q).to(x.dtype).mT
        codes, scale = quantize_activation(x, activation, q.data.dtype)
        if activation is Granularity.BLOCK:
            scale = scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
        return ((codes.float() * scale) @ dequantize(q).mT).to(x.dtype)

    def shared_bytes(self, q: QTensor) -> int:
        return q.nbytes if q is self.q else 0


class EmptyWeight(PackedWeight):
    """A weight [N, K] without values, a rank's part where there are fewer tiles than ranks. Its product is zeros."""

    held_bytes = 0

    def __init__(self, q: QTensor):
        self.n = q.shape[0]

    def __call__(self, x: Operand) -> Tensor:
        x = values_of(x)
        return x.new_zeros(len(x), self.n)

    def shared_bytes(self, q: QTensor) -> int:
        return 0


class EmptyStack(PackedStack):
    """As EmptyWeight, of experts."""

    held_bytes = 0

    def __init__(self, q: QTensor):
        self.experts, self.n, self.k = q.shape

    def __call__(self, x: Operand, dispatch: Dispatch, *, of_tokens: bool) -> Tensor:
        return values_of(x).new_zeros(len(dispatch.order), self.n)


class StackOfDequantized(PackedStack):
    """The stored stack itself, dequantized at each call."""

    looks_at_host = True

    def __init__(self, q: QTensor):
        self.experts, self.n, self.k = q.shape
        self.q, self.held_bytes = q, q.nbytes

    def __call__(self, x: Operand, dispatch: Dispatch, *, of_tokens: bool) -> Tensor:
        x, starts = values_of(x), dispatch.starts.tolist()
        rows = x[dispatch.order // dispatch.top_k] if of_tokens else x
        y = rows.new_zeros(len(rows), self.n)
        activation = self.q.scheme.activation_of(dispatch.tokens)
        for expert, (start, stop) in enumerate(pairwise(starts)):
            if start < stop:
                y[start:stop] = Dequantized(self.q.expert(expert)).multiplied(rows[start:stop], activation)
        return y


class ReferenceStack:
    """One product of ReferenceLinear per expert."""

    name = "reference"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return ReferenceLinear().supports(q, platform)

    def pack(self, q: QTensor, platform: Platform) -> StackOfDequantized:
        return StackOfDequantized(q)


class ReferenceLinear:
    """Dequantizes weight and activations and multiplies in FP32."""

    name = "reference"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        if (reason := not_taken(q.scheme, ANY_KIND)) is not None:
            return reason
        fp8 = q.scheme.dtype is WeightDType.FP8
        return f"its codes are {q.data.dtype}" if fp8 and q.data.dtype not in FP8_MAX else None

    def pack(self, q: QTensor, platform: Platform) -> Dequantized:
        return Dequantized(q)


def route(x: Tensor, weight: Tensor, bias: Tensor | None, router: Router, batch: ForwardBatch) -> Routed:
    logits = x.float() @ weight.float().mT
    scores = logits.sigmoid() if router.sigmoid else logits.softmax(-1)
    order = scores if bias is None else scores + bias
    order = order.masked_fill(order.isnan(), float("-inf"))
    if router.groups > 1:
        by_group = order.unflatten(1, (router.groups, -1))
        best = by_group.topk(min(2, by_group.shape[2]), -1).values.sum(-1)
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, _largest(best, router.top_groups), False)
        order = by_group.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
    experts = _largest(order, router.top_k)
    weights = scores.gather(1, experts)
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    is_padding = padding(batch)
    if is_padding is not None:
        experts, weights = experts.masked_fill(is_padding, -1), weights.masked_fill(is_padding, 0)
    return Routed(experts.int(), weights * router.scale)


def _largest(x: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values of each row; ties go to the smaller index."""
    return x.argsort(stable=True, dim=-1, descending=True)[:, :count]


def padding(batch: ForwardBatch) -> Tensor | None:
    """Mask [T, 1] of tokens that pad a graph, or None if the batch is not padded."""
    if batch.live is not None:
        return (torch.arange(batch.num_tokens, device=batch.live.device) >= batch.live).unsqueeze(1)
    return (batch.seq_lens == 0).unsqueeze(1) if len(batch.seq_lens) == batch.num_tokens else None


def dispatch(experts: Tensor, count: int) -> Dispatch:
    pairs = experts.flatten()
    last = torch.where(pairs < 0, count, pairs)
    ordered, order = last.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, dtype=last.dtype, device=last.device))
    return Dispatch(order.int(), order.argsort().int(), starts.int(), experts.shape[1])


def combine(y: Tensor, routed: Routed, at: Dispatch) -> Tensor:
    place = at.place.view(-1, at.top_k)
    rows = y[place.long()].float() * routed.weights.unsqueeze(-1)
    return rows.masked_fill((routed.experts < 0).unsqueeze(-1), 0).sum(1).to(y.dtype)


def all_reduce(x: Tensor, tp: TensorParallel) -> Tensor:
    return tp.all_reduce(x)


def scaled(x: Product) -> Tensor:
    """A product with its scales applied, in its dtype; `octavo.ops` has taken the sum over ranks."""
    assert not isinstance(x, Unsummed | Uncombined)
    return (x.values.float() * x.row * x.column).to(x.values.dtype) if isinstance(x, Unscaled) else x


def argmax(logits: Tensor) -> Tensor:
    return logits.float().argmax(-1)


def rms_norm(
    x: Product, weight: Tensor, eps: float, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    x = scaled(x)
    if residual is not None:
        x = x + residual
    return Activation(normed(x, weight, eps)), x


def layer_norm(
    x: Product, norm: Norm, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    x = scaled(x)
    if residual is not None:
        x = x + residual
    return Activation(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)), x


def gelu(x: Tensor, approximate: str, readers: Sequence[Reader] = ()) -> Activation:
    return Activation(F.gelu(x, approximate=approximate))


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    values = x.float()
    mean_square = torch.linalg.vecdot(values, values).div_(x.shape[-1]).unsqueeze(-1)
    y: Tensor = (values * mean_square.add_(eps).rsqrt_()).to(x.dtype) * weight
    return y


def silu_mul(x: Product, readers: Sequence[Reader] = ()) -> Activation:
    gate, up = scaled(x).chunk(2, -1)
    return Activation(F.silu(gate) * up)


def rotate(x: Tensor, cos_sin: Tensor, rows: Tensor, interleaved: bool = False) -> Tensor:
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[rows].unsqueeze(1).chunk(2, -1)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    a, b = x[..., first].float(), x[..., second].float()
    out = torch.empty_like(x)
    out[..., first] = (a * cos).addcmul_(b, sin, value=-1)
    out[..., second] = (b * cos).addcmul_(a, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def captures_segments(dtype: torch.dtype, head_dim: int) -> bool:
    return False


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    assert segments.lengths is not None, "captures_segments says so"
    parts = [x.transpose(0, 1)[None].split(list(segments.lengths), 2) for x in (q, k, v)]
    return torch.cat([F.scaled_dot_product_attention(*one)[0] for one in zip(*parts, strict=True)], 1).transpose(0, 1)


def write_kv(cache: LayerCache, slots: Tensor, k: Tensor, v: Tensor) -> None:
    views = cache.views
    block_size = views["k"].shape[1]
    block, offset = slots // block_size, slots % block_size
    for name, values, layer_scale in (("k", k, cache.k_scale), ("v", v, cache.v_scale)):
        # NaN or infinity must not stay in a block after its request: attention computes scores of masked positions too, so
        # the cache must be finite when another request gets the block.
        view, values = views[name], values.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        if view.dtype not in FP8_MAX:
            view[block, offset] = values.to(view.dtype)
            continue
        limit = FP8_MAX[view.dtype]
        scale = layer_scale.view(-1, 1)
        if (scales := views.get(f"{name}_scale")) is not None:
            scale = token_scale(values.float().abs().amax(-1, keepdim=True), limit)
            scales[block, offset] = scale.squeeze(-1)
        codes = (values.float() / scale).clamp_(-limit, limit).to(view.dtype)
        view.view(torch.uint8)[block, offset] = codes.view(torch.uint8)


def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, slots: Tensor) -> Tensor:
    q, k = normed_and_rotated(q, k, rope)
    write_kv(cache, slots, k, v)
    return q


def normed_and_rotated(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    if (norms := rope.norms) is not None:
        q, k = normed(q, norms.q, norms.eps), normed(k, norms.k, norms.eps)
    return rotate(q, rope.cos_sin, rope.rows), rotate(k, rope.cos_sin, rope.rows)


def read_kv(cache: LayerCache, name: str, block_ids: Tensor, length: int) -> Tensor:
    """The first `length` keys or values of the blocks, FP32 [length, H, D]."""
    view = cache.views[name]
    if view.dtype not in FP8_MAX:
        return view[block_ids].flatten(0, 1)[:length].float()
    codes = view.view(torch.uint8)[block_ids].flatten(0, 1)[:length]
    scale = (cache.k_scale if name == "k" else cache.v_scale).view(-1, 1)
    if (scales := cache.views.get(f"{name}_scale")) is not None:
        scale = scales[block_ids].flatten(0, 1)[:length].unsqueeze(-1)
    return codes.view(view.dtype).float() * scale


def decode_variant(requests: int, kv_heads: int, width: int, longest: int) -> int:
    return longest


def attention(q: Tensor, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
    out = torch.empty_like(q)
    heads = q.shape[1]
    start = 0
    for row, (query_len, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        part = slice(start, start + query_len)
        start += query_len
        if context == 0:  # the row pads a graph
            out[part] = 0
            continue
        blocks = batch.block_tables[row, : -(-context // batch.block_size)].long()
        k, v = (read_kv(cache, name, blocks, context) for name in ("k", "v"))
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[part].float(), k) * scale
        at = torch.arange(context - query_len, context, device=q.device)[:, None]
        key = torch.arange(context, device=q.device)
        hidden = key > at
        if window is not None:
            hidden |= key <= at - window
        scores = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[part] = torch.einsum("hqk,khd->qhd", scores, v).to(q.dtype)
    return out


def sample(logits: Tensor, temperature: Tensor, u: Tensor, filters: Filters | None) -> Tensor:
    weights = (logits / temperature.unsqueeze(1)).softmax(-1)
    if filters is not None:
        weights *= _kept(weights, filters)
    return _first_over_share(weights, u.unsqueeze(1))


def _kept(weights: Tensor, filters: Filters) -> Tensor:
    """Mask of the tokens that the filters keep. Sorts values only (no indices), and at most max_top_k of them."""
    if filters.max_top_k == weights.shape[1]:
        values = weights.sort(dim=-1, descending=True).values
    else:
        values = weights.topk(filters.max_top_k, -1).values
    top_k, top_p, min_p = (x.unsqueeze(1) for x in filters[:3])
    left = values * ((torch.arange(filters.max_top_k, device=weights.device) < top_k) & (values >= values[:, :1] * min_p))
    sums = left.cumsum(-1, dtype=torch.float64)
    count = ((sums - left < top_p * sums[:, -1:]) & (left > 0)).sum(-1, keepdim=True).clamp_(min=1)
    least = values.gather(1, count - 1)
    equal = count - (values > least).sum(-1, keepdim=True)
    same = weights == least
    return (weights > least) | (same & (same.cumsum(-1, dtype=torch.int32) <= equal))


def _first_over_share(weights: Tensor, share: Tensor) -> Tensor:
    """The first index of each row at which the cumulative sum exceeds a share of the total: FP64 sums, over blocks first."""
    if short := -weights.shape[1] % SUM_BLOCK:
        weights = F.pad(weights, (0, short))
    blocks = weights.unflatten(1, (weights.shape[1] // SUM_BLOCK, SUM_BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    target = share * ends[:, -1:]
    block = _first_over(ends, target, sums)
    rest = (target - (ends - sums).gather(1, block)).clamp_(min=0)  # if negative, a first weight of zero would exceed it
    within = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, SUM_BLOCK)).squeeze(1).double()
    return (block * SUM_BLOCK + _first_over(within.cumsum(-1), rest, within)).squeeze(1)


def _first_over(ends: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The first index at which `ends` exceeds `target`, [rows, 1]; rounding must not pass the last nonzero weight."""
    places = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(weights > 0, places, 0).amax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(ends, target, right=True), last)


def round_columns(values: Tensor, offset: Tensor, influence: Tensor, scale: Tensor) -> Tensor:
    limit, moved = FP8_MAX[torch.float8_e4m3fn], torch.empty_like(values)
    for k, (value, own) in enumerate(zip(values, offset, strict=True)):
        factor = scale[0 if len(scale) == 1 else k]
        rounded = ((value - own) / factor).clamp_(-limit, limit).to(torch.float8_e4m3fn).float().mul_(factor)
        torch.sub(rounded, value, out=moved[k])
        offset.addr_(influence[k], moved[k])
        value.copy_(rounded)
    return moved


def scale_errors(values: Tensor, scale: Tensor, steps: Tensor, weight: Tensor) -> Tensor:
    n, groups = scale.shape
    size = BLOCK if groups > 1 else values.shape[1]
    padding = (0, groups * size - values.shape[1])
    original, by_column = F.pad(values, padding).view(n, groups, size), F.pad(weight, padding).view(groups, size)
    offset, errors = torch.empty_like(original), []
    for step in steps:
        by = (scale * step).unsqueeze(2)
        rounded = original / by
        # A value plus 1.5 * 2^(20 + e), e being its exponent, keeps the 3 bits after its leading one, rounded to nearest even
        # as the cast rounds; subnormal codes are as far apart as the smallest normal ones. Far faster than two casts.
        torch.abs(rounded, out=offset).clamp_min_(2.0**-6).view(torch.int32).bitwise_and_(0x7F800000)
        offset.mul_(1.5 * 2**20)
        rounded.add_(offset).sub_(offset).mul_(by).sub_(original)
        errors.append(rounded.square_().mul_(by_column).sum(2))
    return torch.stack(errors)


def round_keys(k: Tensor, rounding: KeyRounding, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit, by = FP8_MAX[dtype], scale.view(-1, 1).expand(k.shape[1], 1)
    exact = k.nan_to_num(0.0, posinf=0.0, neginf=0.0).float()
    values, offset = torch.empty_like(exact), torch.zeros_like(exact)
    for step in range(k.shape[2]):
        at = rounding.order[:, step].long().view(1, -1, 1).expand(len(k), -1, -1)
        own = exact.gather(2, at)
        rounded = ((own - offset.gather(2, at)) / by).clamp_(-limit, limit).to(dtype).float() * by
        values.scatter_(2, at, rounded)
        offset += (rounded - own) * rounding.influence[:, step]
    return values.to(k.dtype)


def add_gram(total: Tensor, x: Tensor) -> None:
    values, width = x.float(), x.shape[1]
    strip = max(256, width // 8)
    for start in range(0, width, strip):
        stop = start + strip
        total[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])
