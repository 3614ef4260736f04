"""Ops: function contracts, each with a torch reference and the implementations that platforms prefer.

`bind(platform)` chooses the implementation of each op once, at start: the first in the platform's list that supports the
platform. `linear` and grouped GEMMs are chosen per weight, since the best implementation depends on the scheme. `table()`
reports each choice and the reasons against the implementations listed before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.kvcache import LayerCache
from octavo.ops import ahead, reference, reference_latent
from octavo.ops.bound import bound as _bound
from octavo.ops.bound import bound_for
from octavo.ops.cache_writes import CARRIED, composed_rope_write_rounded_kv, rope_write_kv, round_keys, write_kv
from octavo.ops.contract import (
    FEW_TOKENS,
    LATENT_SCRATCH,
    Activation,
    CodeFormat,
    DecoderParts,
    DenseParts,
    Dispatch,
    ExpertLayerParts,
    Filters,
    FusedDecoder,
    HeadNorms,
    LayerParts,
    LinearImplementation,
    MixtureParts,
    Norm,
    Operand,
    PackedStack,
    PackedWeight,
    Product,
    Quantized,
    Reader,
    Rope,
    Rotation,
    Routed,
    Router,
    Segments,
    StackImplementation,
    TakesStack,
    Uncombined,
    Unscaled,
    Unsummed,
    tokens_of,
    values_of,
)
from octavo.ops.latent import (
    absorbed_queries,
    expanded_attention,
    head_linear,
    latent_attention,
    select_keys,
    write_index_keys,
    write_latent,
)
from octavo.ops.rounding import add_gram, composed_descent, descend, round_columns, scale_errors
from octavo.platform import Platform
from octavo.quant import QTensor

__all__ = [
    "LATENT_SCRATCH", "Activation", "CodeFormat", "DecoderParts", "DenseParts", "Dispatch", "ExpertLayerParts",
    "Filters", "FusedDecoder", "HeadNorms", "LayerParts", "MixtureParts", "Norm", "Operand", "PackedStack", "PackedWeight",
    "Product", "Quantized", "Reader", "Rope", "Rotation", "Routed", "Router", "Segments", "Uncombined", "Unscaled", "Unsummed",
    "absorbed_queries", "add_gram", "all_gather", "all_reduce", "all_reduce_norm_quantize", "argmax", "argmax_over_ranks",
    "attend", "attention", "bind", "capture", "captures", "captures_segments", "combine", "compile_ahead",
    "compile_elsewhere", "decode_variant", "descend", "dispatch", "expanded_attention", "experts", "experts_uncombined",
    "finished", "fuse", "gated_linear", "gelu", "head_linear", "latent_attention", "layer_norm", "linear", "linear_unscaled",
    "pack", "pack_experts", "project", "rms_norm", "rope_write_kv", "rotate", "round_columns", "round_keys", "route",
    "sample", "scale_errors", "segment_attention", "select_keys", "silu_mul", "table", "write_index_keys", "write_kv",
    "write_latent",
]  # fmt: skip

T = TypeVar("T")

_OPS = (
    "absorbed_queries", "add_gram", "all_reduce", "argmax", "attention", "captures_segments", "combine", "decode_variant",
    "dispatch", "expanded_attention", "gelu", "head_linear", "latent_attention", "layer_norm", "rms_norm", "rope_write_kv",
    "rotate", "round_columns", "round_keys", "route", "sample", "scale_errors", "segment_attention", "select_keys",
    "silu_mul", "write_index_keys", "write_kv", "write_latent",
)  # fmt: skip


def _to_none(compiler: Any) -> None: ...


_compile_ahead: Callable[[], AbstractContextManager[None]] = ahead.mode
_compile_elsewhere: Callable[[Any], None] = _to_none
_capture: Callable[..., Any] | None = None
_captures: Callable[[int, Iterable[PackedWeight | PackedStack], bool], bool]
_fuse: Callable[[DenseParts | MixtureParts, Platform], FusedDecoder | str] | None = None
_linear: list[LinearImplementation] = []
_stacks: list[StackImplementation] = []
_table: dict[str, str] = {}
_lock = threading.Lock()
ALONE = TensorParallel()


def bind(platform: Platform, tp: TensorParallel = ALONE) -> None:
    """Choose the implementations of this process. Binding again replaces the earlier choice.

    tp: the ranks that exchange. All of them bind at the same place, since they make buffers for it.
    """
    if platform.is_cpu:
        from octavo.ops import cpu as preferred
    elif platform.arch.startswith("gfx"):
        from octavo.ops import rocm as preferred  # type: ignore[no-redef]
    else:
        from octavo.ops import cuda as preferred  # type: ignore[no-redef]
    global _compile_ahead, _compile_elsewhere, _capture, _captures, _fuse
    with _lock:
        bound_for(platform.device)
        _table.clear()
        _compile_ahead = getattr(preferred, "compile_ahead", ahead.mode)
        _compile_elsewhere = getattr(preferred, "compile_elsewhere", _to_none)
        _capture = getattr(preferred, "capture", None)
        _fuse = getattr(preferred, "fuse", None)
        _captures = getattr(preferred, "captures", lambda head_dim, weights, latent: True)
        _linear[:] = [*preferred.LINEAR, reference.ReferenceLinear()]
        _stacks[:] = [*preferred.STACKS, reference.ReferenceStack()]
        if configure := getattr(preferred, "configure", None):
            configure(platform)
        for name in _OPS:
            chosen = getattr(preferred, name, None) or getattr(reference, name, None) or getattr(reference_latent, name)
            _bound[name] = chosen
            _table[name] = chosen.__module__.removeprefix("octavo.ops.")
        for name, (composed, how) in _COMPOSED.items():
            chosen = getattr(preferred, name, None)
            _bound[name] = chosen or composed
            _table[name] = how if chosen is None else chosen.__module__.removeprefix("octavo.ops.")
        connect = getattr(preferred, "connect", None)
        if tp.size > 1 and connect is not None and (reason := connect(platform, tp)) is not None:
            for name in ("all_reduce", "all_reduce_norm_quantize", "argmax_over_ranks"):
                _table[name] = f"the library's collectives: {reason}"


def compile_ahead() -> AbstractContextManager[None]:
    """Context in which kernels are compiled, in parallel, but not launched; collectives are skipped. Results are undefined.

    The mode applies to the calling thread. On a platform that compiles nothing, it only skips collectives.
    """
    return _compile_ahead()


def compile_elsewhere(compiler: Any) -> None:
    """From now on compile_ahead leaves the work to `compiler`, an `octavo.ops.triton.launch.Elsewhere`; to this process's own
    threads, if it is None. A platform that compiles nothing does not ask for it."""
    _compile_elsewhere(compiler)


def captures(head_dim: int, weights: Sequence[PackedWeight | PackedStack], *, latent: bool = False) -> bool:
    """Whether this platform has `capture` and can capture decode steps with this head size and these weights.

    latent: the model uses MLA, and head_dim is the latent's width plus its rope part. The references of the latent ops read
    context lengths on the host, where a captured batch has upper bounds only, so they cannot be captured.
    """
    weights = [w.at(tokens) for w in weights for tokens in (1, FEW_TOKENS + 1)]
    if _capture is None or any(isinstance(w, PackedStack) and w.looks_at_host for w in weights):
        return False
    if latent and any(_bound[name].__module__ == reference_latent.__name__ for name in ("latent_attention", "select_keys")):
        return False
    return _captures(head_dim, weights, latent)


def capture(fn: Callable[[], T], pool: object = None) -> tuple[Callable[[], None], T, object]:
    """Capture a graph of the launches of `fn`: (replay, fn's result, the memory pool to pass to the next capture).

    A GPU executes nothing until the replay; a CPU runs `fn` once while recording it. Graphs that share a pool must be replayed
    one at a time: a replay overwrites the results of the others.
    """
    assert _capture is not None
    replay, out, pool = _capture(fn, pool)
    return replay, out, pool


def fuse(parts: DenseParts | MixtureParts | str, platform: Platform) -> FusedDecoder | None:
    """The megakernel decoder for decode steps of few requests, if this platform has one that takes these layers.

    parts: or the reason why there can be none.
    """
    if _fuse is None:
        return None
    made = parts if isinstance(parts, str) else _fuse(parts.at(FEW_TOKENS), platform)
    _table["decode steps of few requests"] = f"op by op: {made}" if isinstance(made, str) else made.name
    return None if isinstance(made, str) else made


def table() -> dict[str, str]:
    """Op -> the name of its implementation, with the reasons why preferred ones were not chosen."""
    return dict(_table)


def pack(q: QTensor, platform: Platform, *, row_lookup: bool = False) -> PackedWeight:
    """Pack a stored weight for the first implementation that supports it. row_lookup: keep rows for embedding lookups too.

    Raises OctavoError with every implementation's reason if none supports it.
    """
    if not all(q.shape):
        return reference.EmptyWeight(q)
    packed = _first_to_support("linear", _linear, q, platform).pack(q, platform)
    if row_lookup:
        packed.keep(q)
    return packed


def pack_experts(q: QTensor, platform: Platform, *, owned: bool = False) -> PackedStack:
    """Pack a stack of experts' weights [E, N, K] for a grouped GEMM, as `pack` does for one weight.

    owned: the caller reads `q` no more, so that its memory may be used for the packed stack.
    """
    if not all(q.shape):
        return reference.EmptyStack(q)
    chosen = _first_to_support("experts", _stacks, q, platform)
    return chosen.take(q, platform) if owned and isinstance(chosen, TakesStack) else chosen.pack(q, platform)


Impl = TypeVar("Impl", LinearImplementation, StackImplementation)


def _first_to_support(op: str, implementations: Sequence[Impl], q: QTensor, platform: Platform) -> Impl:
    refused: list[str] = []
    for implementation in implementations:
        if (reason := implementation.supports(q, platform)) is None:
            _table[f"{op}[{q.scheme.name}]"] = "; ".join([implementation.name, *refused])
            return implementation
        refused.append(f"not {implementation.name}: {reason}")
    raise OctavoError(f"no product here takes a weight of {q.scheme.name}: {'; '.join(refused)}.")


def linear(x: Operand, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times the transposed weight [N, K], plus bias [N]: [M, N] in x's dtype.

    For an FP8 weight, x is quantized as the weight's scheme says of M tokens, unless it already holds codes in this format.
    Products of codes are accumulated in FP32, and so are those of codes and values that stay as they are.
    """
    w = w.at(tokens_of(x))
    return w(x) if bias is None else w.biased(x, bias)


def linear_unscaled(x: Operand, w: PackedWeight) -> Product:
    """`linear` for a reader that takes a Product (rms_norm, silu_mul): scaling may be left to that reader."""
    return w.at(tokens_of(x)).unscaled(x)


def all_reduce(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of x over ranks, possibly in place. Within compile_ahead x itself, since ranks compile independently.

    Every rank gets the same bits, so that ranks which decide by them decide alike.
    """
    return x if ahead.is_on() else _bound["all_reduce"](x, tp)


def all_reduce_norm_quantize(
    x: Tensor, tp: TensorParallel, weight: Tensor, eps: float, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    """`rms_norm` of the sum of x [M, N] over ranks, with its results. x may be overwritten.

    A kernel that adds, norms and makes codes of the rows that it has summed reads and writes the rows once.
    """
    found: tuple[Activation, Tensor] | None = _bound["all_reduce_norm_quantize"](x, tp, weight, eps, residual, readers)
    return rms_norm(all_reduce(x, tp), weight, eps, residual, readers) if found is None else found


def finished(x: Product) -> Tensor:
    """The dense values of a product, summed over ranks or experts and with its scales, for a reader that is no norm."""
    if isinstance(x, Uncombined):
        return combine(*x)
    return all_reduce(x.values, x.tp) if isinstance(x, Unsummed) else reference.scaled(x)


def all_gather(x: Tensor, tp: TensorParallel, dim: int = -1) -> Tensor:
    """Every rank's x, concatenated along `dim` in rank order. Within compile_ahead zeros of that shape."""
    if not ahead.is_on():
        return tp.all_gather(x, dim)
    return x.new_zeros([size * (tp.size if dim % x.dim() == at else 1) for at, size in enumerate(x.shape)])


def rms_norm(
    x: Product, weight: Tensor, eps: float, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    """(norm(x + residual) * weight, x + residual), over the last dimension, computed in FP32, stored in x's dtype.

    readers: all consumers of the first result, weights or None for a consumer of dense values. No readers means dense values.
    If all readers take the same code format and this platform's op can quantize to it, only codes are made; if some do, codes
    and dense values. If readers take different formats, only dense values are made, and each reader quantizes for itself.
    """
    if isinstance(x, Unsummed):
        return all_reduce_norm_quantize(x.values, x.tp, weight, eps, residual, readers)
    if isinstance(x, Uncombined):
        return _bound["combine_norm_quantize"](x, weight, eps, residual, readers)  # type: ignore[no-any-return]
    return _bound["rms_norm"](x, weight, eps, residual, readers)  # type: ignore[no-any-return]


def layer_norm(
    x: Product, norm: Norm, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    """`rms_norm` with the mean subtracted first and a bias added: (the norm of x + residual, x + residual)."""
    x = finished(x) if isinstance(x, Unsummed | Uncombined) else x
    return _bound["layer_norm"](x, norm, residual, readers)  # type: ignore[no-any-return]


def gelu(x: Tensor, approximate: str, readers: Sequence[Reader] = ()) -> Activation:
    """GELU of x [M, I], computed in FP32: `approximate` is torch's, "none" or "tanh". readers: as in `rms_norm`."""
    return _bound["gelu"](x, approximate, readers)  # type: ignore[no-any-return]


def silu_mul(x: Product, readers: Sequence[Reader] = ()) -> Activation:
    """silu(gate) * up of x [M, 2I] = [gate, up]: [M, I]. readers: as in `rms_norm`."""
    return _bound["silu_mul"](x, readers)  # type: ignore[no-any-return]


def gated_linear(x: Operand, w: PackedWeight, readers: Sequence[Reader] = ()) -> Activation:
    """`linear_unscaled` of x [M, K] by a weight [2I, K] = [gate, up], fused with `silu_mul`: [M, I]."""
    return _bound["gated_linear"](x, w.at(tokens_of(x)), readers)  # type: ignore[no-any-return]


def route(x: Tensor, weight: Tensor, bias: Tensor | None, router: Router, batch: ForwardBatch) -> Routed:
    """Each token's experts for x [T, H], the router's weight [E, H] and bias FP32 [E], as `router` says. Scores are FP32.

    Rows that pad a graph have no experts (-1). A row with NaN scores gets valid expert ids with NaN weights.
    """
    return _bound["route"](x, weight, bias, router, batch)  # type: ignore[no-any-return]


def dispatch(experts: Tensor, count: int) -> Dispatch:
    """Sort the (token, expert) pairs of `experts`, INT32 [T, top_k] in [0, count) or -1 for none, by expert."""
    return _bound["dispatch"](experts, count)  # type: ignore[no-any-return]


def combine(y: Tensor, routed: Routed, at: Dispatch) -> Tensor:
    """Each token's weighted sum of its pairs' rows of y [P, N] (sorted order), in FP32: [T, N]; zeros without experts."""
    return _bound["combine"](y, routed, at)  # type: ignore[no-any-return]


def experts(x: Operand, routed: Routed, gate_up: PackedStack, down: PackedStack) -> Tensor:
    """MoE layer: each token's weighted sum over its experts of down(silu(gate(x)) * up(x)). x [T, H]: [T, H] in x's dtype.

    gate_up: [E, 2I, H] = [gate, up]; down: [E, H, I]. Does not synchronize with the host.
    """
    return finished(experts_uncombined(x, routed, gate_up, down))


def experts_uncombined(x: Operand, routed: Routed, gate_up: PackedStack, down: PackedStack) -> Tensor | Uncombined:
    """`experts` for a reader that takes a Product (rms_norm): the weighted sum may be left to that reader."""
    if not down.k:  # a rank without a part of these experts
        values = values_of(x)
        return values.new_zeros(len(values), down.n)
    tokens = len(routed.experts)
    return _bound["fused_experts"](x, routed, gate_up.at(tokens), down.at(tokens))  # type: ignore[no-any-return]


def rotate(x: Tensor, cos_sin: Tensor, rows: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the first R dimensions of x [T, H, D] by rows [T] of cos_sin, FP32 [rows, R], cosines first.

    interleaved: as in Rotation.
    """
    return _bound["rotate"](x, cos_sin, rows, interleaved)  # type: ignore[no-any-return]


def captures_segments(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `segment_attention` of such heads can be in a graph: it then reads lengths on the device alone."""
    return _bound["captures_segments"](dtype, head_dim)  # type: ignore[no-any-return]


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attention without a cache: each of T tokens attends to all of its segment. q, k, v [T, H, D]: [T, H, D].

    Scores are scaled by D^-1/2. A query or key that is not finite may spoil the neighbouring head of its token.
    """
    return _bound["segment_attention"](q, k, v, segments)  # type: ignore[no-any-return]


def project(
    x: Operand, w: PackedWeight, heads: int, rope: Rope, cache: LayerCache, batch: ForwardBatch, window: int | None
) -> Tensor | None:
    """QKV projection of x [T, K] fused with `rope_write_kv` in one launch: the rotated queries [T, H, D].

    Returns None, and writes nothing, if no kernel fuses the two here, which none does where keys are not rounded to nearest;
    the caller then uses `linear` and `attend`.
    """
    if cache.key_rounding is not None:
        _table["project"] = f"{_COMPOSED['project'][1]}: {CARRIED}"
        return None
    return _bound["project"](x, w.at(tokens_of(x)), heads, rope, cache, batch, window)  # type: ignore[no-any-return]


def attention(q: Tensor, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
    """Causal attention of q [T, H, D] over the cache, which already holds this step's tokens: [T, H, D].

    Each request's query tokens are the last of its context. `window` limits a token to the last `window` positions, itself
    included. Scores and sums are FP32. A one-token request with an empty context pads a graph: nothing is read, zeros returned.
    """
    return _bound["attention"](q, cache, batch, scale, window)  # type: ignore[no-any-return]


def attend(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None
) -> Tensor:
    """`rope_write_kv` of a batch's q [T, H, D], k and v [T, H', D], then `attention`: [T, H, D]."""
    if cache.key_rounding is not None:
        _table["attend"] = f"{_COMPOSED['attend'][1]}: {CARRIED}"
        return _rope_then_attention(q, k, v, rope, cache, batch, scale, window)
    return _bound["attend"](q, k, v, rope, cache, batch, scale, window)  # type: ignore[no-any-return]


def argmax(logits: Tensor) -> Tensor:
    """The token with the largest of logits [rows, vocab]: int64 [rows]. Ties go to the smaller id; NaN ranks as infinity.

    Within compile_ahead zeros: results are undefined there, but callers index by these.
    """
    found: Tensor = _bound["argmax"](logits)
    return found.zero_() if ahead.is_on() else found


def argmax_over_ranks(logits: Tensor, tp: TensorParallel) -> Tensor:
    """`argmax` over the parts [rows, part] of all ranks, in their order: int64 [rows], the same on every rank."""
    if tp.size == 1:
        return argmax(logits)
    found: Tensor | None = _bound["argmax_over_ranks"](logits, tp)
    if found is not None:
        return found.zero_() if ahead.is_on() else found
    local = argmax(logits).unsqueeze(1)
    tokens = all_gather(local + tp.rank * logits.shape[1], tp)
    values = all_gather(logits.gather(1, local), tp)
    return tokens.gather(1, argmax(values).unsqueeze(1)).squeeze(1)


def sample(logits: Tensor, temperature: Tensor, u: Tensor, filters: Filters | None) -> Tensor:
    """Sample a token of each row of FP32 logits [rows, vocab], which may be overwritten: int64 [rows].

    Inverse transform sampling: the first token at which the cumulative probability of the tokens that `filters` keeps exceeds
    u times their sum. Probabilities are softmax(logits / temperature). temperature: FP32 [rows]; u: FP64 [rows] in [0, 1).
    """
    return _bound["sample"](logits, temperature, u, filters)  # type: ignore[no-any-return]


def decode_variant(requests: int, kv_heads: int, width: int, longest: int) -> int:
    """A key of `attention`'s launches for one-token requests with contexts up to `longest`: equal keys, equal launches. width:
    bytes of a token's key in one head of the cache."""
    return _bound["decode_variant"](requests, kv_heads, width, longest)  # type: ignore[no-any-return]


def implementations() -> Sequence[LinearImplementation]:
    """The linear implementations of this platform in order of preference; tests compare each with the reference."""
    return tuple(_linear)


def stack_implementations() -> Sequence[StackImplementation]:
    """As `implementations`, for stacks of experts."""
    return tuple(_stacks)


def _rope_then_attention(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None
) -> Tensor:
    return attention(rope_write_kv(q, k, v, rope, cache, batch.slot_mapping), cache, batch, scale, window)


def _sorted_experts(x: Operand, routed: Routed, gate_up: PackedStack, down: PackedStack) -> Tensor:
    at = routed.at if routed.at is not None else dispatch(routed.experts, gate_up.experts)
    return combine(down(silu_mul(gate_up(x, at, of_tokens=True), (down,)), at, of_tokens=False), routed, at)


# Ops composed of others where no fused implementation is bound, or it gives None; and how, as `table` reports it.
_COMPOSED: dict[str, tuple[Callable[..., Any], str]] = {
    "all_reduce_norm_quantize": (lambda *_: None, "all_reduce, then rms_norm"),
    "argmax_over_ranks": (lambda *_: None, "argmax, then all_gather"),
    "attend": (_rope_then_attention, "rope_write_kv, then attention"),
    "combine_norm_quantize": (lambda x, *given: rms_norm(combine(*x), *given), "combine, then rms_norm"),
    "descend": (composed_descent, "round_columns, and products"),
    "fused_experts": (_sorted_experts, "dispatch, a grouped GEMM, silu_mul, another, combine"),
    "gated_linear": (lambda x, w, readers: silu_mul(linear_unscaled(x, w), readers), "linear_unscaled, then silu_mul"),
    "project": (lambda *_: None, "linear, then attend"),
    "rope_write_rounded_kv": (composed_rope_write_rounded_kv, "rms_norm, rotate, round_keys, write_kv"),
}
