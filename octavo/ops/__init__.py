"""Ops: function contracts, each with a torch reference and the implementations that platforms prefer.

An implementation is bound once, at start, by `bind(platform)`: of those that the platform lists, the first that supports it.
`linear` is chosen for each weight, since schemes differ in what computes them best. `table()` says what was chosen, and why
not the ones before it.
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
from octavo.kvcache import IndexCache, LatentCache, LayerCache
from octavo.ops import ahead, reference, reference_latent
from octavo.ops.contract import (
    LATENT_SCRATCH,
    Activation,
    CodeFormat,
    DecoderParts,
    Dispatch,
    Filters,
    FusedDecoder,
    HeadNorms,
    LayerParts,
    LinearImplementation,
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
    StackImplementation,
    Unscaled,
)
from octavo.platform import Platform
from octavo.quant import QTensor

__all__ = [
    "LATENT_SCRATCH", "Activation", "CodeFormat", "DecoderParts", "Dispatch", "Filters", "FusedDecoder", "HeadNorms",
    "LayerParts", "Norm", "Operand", "PackedStack", "PackedWeight", "Product", "Quantized", "Reader", "Rope", "Rotation",
    "Routed", "Router", "Unscaled", "absorbed_queries", "all_gather", "all_reduce", "argmax", "attend", "attention", "bind",
    "capture", "captures", "combine", "compile_ahead", "decode_variant", "dispatch", "expanded_attention", "experts", "fuse",
    "gated_linear", "head_linear", "latent_attention", "linear", "linear_unscaled", "pack", "pack_experts", "project",
    "rms_norm", "rope_write_kv", "rotate", "route", "sample", "select_keys", "silu_mul", "table", "write_index_keys",
    "write_kv", "write_latent",
]  # fmt: skip

T = TypeVar("T")

_OPS = (
    "absorbed_queries", "argmax", "attention", "combine", "decode_variant", "dispatch", "expanded_attention", "head_linear",
    "latent_attention", "rms_norm", "rope_write_kv", "rotate", "route", "sample", "select_keys", "silu_mul",
    "write_index_keys", "write_kv", "write_latent",
)  # fmt: skip


_bound: dict[str, Callable[..., Any]] = {}
_compile_ahead: Callable[[], AbstractContextManager[None]] = ahead.mode
_capture: Callable[..., Any] | None = None
_captures: Callable[[int, Iterable[PackedWeight | PackedStack], bool], bool]
_fuse: Callable[[DecoderParts, Platform], dict[str, FusedDecoder | str]] | None = None
_linear: list[LinearImplementation] = []
_stacks: list[StackImplementation] = []
_table: dict[str, str] = {}
_lock = threading.Lock()


def bind(platform: Platform) -> None:
    """Choose the implementations of this process. Binding again replaces the earlier choice."""
    if platform.is_cpu:
        from octavo.ops import cpu as preferred
    elif platform.arch.startswith("gfx"):
        from octavo.ops import rocm as preferred  # type: ignore[no-redef]
    else:
        from octavo.ops import cuda as preferred  # type: ignore[no-redef]
    global _compile_ahead, _capture, _captures, _fuse
    with _lock:
        _table.clear()
        _compile_ahead = getattr(preferred, "compile_ahead", ahead.mode)
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


def compile_ahead() -> AbstractContextManager[None]:
    """Within it kernels are compiled, side by side, and none is launched, nor a collective: what ops give is worthless.

    It is this thread's. Where there is nothing to compile, only collectives are left out.
    """
    return _compile_ahead()


def captures(head_dim: int, weights: Sequence[PackedWeight | PackedStack], *, latent: bool = False) -> bool:
    """Whether there is a `capture` here, and decode steps with heads of this size and these weights may be in it.

    `latent`: they attend to latents, and the size is a latent's with its rope part. The references of that take the contexts'
    lengths from the host, where a graph's batch has bounds.
    """
    if _capture is None or any(isinstance(w, PackedStack) and w.looks_at_host for w in weights):
        return False
    if latent and any(_bound[name].__module__ == reference_latent.__name__ for name in ("latent_attention", "select_keys")):
        return False
    return _captures(head_dim, weights, latent)


def capture(fn: Callable[[], T], pool: object = None) -> tuple[Callable[[], None], T, object]:
    """A graph of what `fn` launches: its replay, what `fn` returned, and the memory pool, to be given to the next graph.

    A GPU runs nothing of it before the replay; a CPU runs `fn`. Graphs that share a pool are replayed one at a time: what one
    returned is lost when the next one runs.
    """
    assert _capture is not None
    replay, out, pool = _capture(fn, pool)
    return replay, out, pool


def fuse(parts: DecoderParts, platform: Platform) -> list[FusedDecoder]:
    """What computes decode steps of few requests in fewer launches, where this platform has such and they take these layers.

    Of those that take a step the first is the fastest.
    """
    made = {} if _fuse is None else _fuse(parts, platform)
    for steps, decoder in made.items():
        _table[steps] = f"op by op: {decoder}" if isinstance(decoder, str) else decoder.name
    return [decoder for decoder in made.values() if not isinstance(decoder, str)]


def table() -> dict[str, str]:
    """Op -> the implementation bound to it, with the reasons against those preferred to it."""
    return dict(_table)


def pack(q: QTensor, platform: Platform, *, row_lookup: bool = False) -> PackedWeight:
    """Lay out a stored weight for the first implementation that supports it. `row_lookup`: its rows are read, too.

    Raises OctavoError, with every implementation's reason, where none does.
    """
    packed = _first_to_support("linear", _linear, q, platform).pack(q, platform)
    if row_lookup:
        packed.keep(q)
    return packed


def pack_experts(q: QTensor, platform: Platform) -> PackedStack:
    """Lay out a stack of experts' weights [E, N, K], as `pack` does one weight."""
    return _first_to_support("experts", _stacks, q, platform).pack(q, platform)


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

    With an FP8 weight, x is quantized as the weight's scheme says, where it does not have such codes, and the sum is taken in
    FP32 over the products of codes.
    """
    y = w(x)
    return y if bias is None else y.add_(bias)


def linear_unscaled(x: Operand, w: PackedWeight) -> Product:
    """`linear` for an op that reads a Product (rms_norm, silu_mul): scales may be left to it."""
    return w.unscaled(x)


def all_reduce(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of x over ranks, which may be written into x. Within compile_ahead x, since ranks compile alone."""
    return x if ahead.is_on() else tp.all_reduce(x)


def all_gather(x: Tensor, tp: TensorParallel, dim: int = -1) -> Tensor:
    """Every rank's x, side by side along `dim`, in the order of ranks. Within compile_ahead this rank's alone, repeated."""
    return torch.cat([x] * tp.size, dim) if ahead.is_on() else tp.all_gather(x, dim)


def rms_norm(
    x: Product, weight: Tensor, eps: float, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor]:
    """(norm(x + residual) * weight, x + residual), over the last dimension, computed in FP32, stored in x's dtype.

    `readers` are all that read the first, weights or None for a reader of dense values; without any there are dense values.
    Where all read the same codes, and this platform's op makes such, there are codes alone; where some do, there are both;
    where readers want different codes, there are dense values, of which each makes its own.
    """
    return _bound["rms_norm"](x, weight, eps, residual, readers)  # type: ignore[no-any-return]


def silu_mul(x: Product, readers: Sequence[Reader] = ()) -> Activation:
    """silu(gate) * up of x [M, 2I] = [gate, up]: [M, I], for `readers` as `rms_norm` has them."""
    return _bound["silu_mul"](x, readers)  # type: ignore[no-any-return]


def gated_linear(x: Operand, w: PackedWeight, readers: Sequence[Reader] = ()) -> Activation:
    """`linear_unscaled` of x [M, K] by a weight [2I, K] = [gate, up], then `silu_mul`: [M, I]."""
    return _bound["gated_linear"](x, w, readers)  # type: ignore[no-any-return]


def route(x: Tensor, weight: Tensor, bias: Tensor | None, router: Router, batch: ForwardBatch) -> Routed:
    """Each token's experts, of x [T, H] by a router's weight [E, H] and bias FP32 [E], as `router` says; scores are FP32.

    Rows that pad a graph wake none. A row whose scores are NaN wakes experts that exist, with weights that are NaN.
    """
    return _bound["route"](x, weight, bias, router, batch)  # type: ignore[no-any-return]


def dispatch(experts: Tensor, count: int) -> Dispatch:
    """Pairs of tokens and experts, INT32 [T, top_k], sorted by expert, of which there are `count`; -1 is none of them."""
    return _bound["dispatch"](experts, count)  # type: ignore[no-any-return]


def combine(y: Tensor, routed: Routed, at: Dispatch) -> Tensor:
    """The FP32 sum of each token's pairs, y [P, N] in sorted order, times their weights: [T, N], zeros where none is woken."""
    return _bound["combine"](y, routed, at)  # type: ignore[no-any-return]


def experts(x: Operand, routed: Routed, gate_up: PackedStack, down: PackedStack) -> Tensor:
    """The weighted sum over each token's experts of down(silu(gate(x)) * up(x)), for x [T, H]: [T, H] in x's dtype.

    gate_up: [E, 2I, H] = [gate, up]; down: [E, H, I]. Never waits for the device.
    """
    at = dispatch(routed.experts, gate_up.experts)
    return combine(down(silu_mul(gate_up(x, at, of_tokens=True), (down,)), at, of_tokens=False), routed, at)


def rotate(x: Tensor, cos_sin: Tensor, rows: Tensor) -> Tensor:
    """Rotary embedding of the first R dimensions of x [T, H, D] by rows [T] of cos_sin, FP32 [rows, R], cosines first."""
    return _bound["rotate"](x, cos_sin, rows)  # type: ignore[no-any-return]


def write_kv(cache: LayerCache, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store keys and values [T, H, D] at `slots` [T] (block * block_size + offset) as the views' dtypes say.

    An FP8 cache stores round(k / scale), clamped; the scale is the layer's, the head's, or the token's and head's where the
    cache has a place for it. NaN and infinity are stored as 0: the cache holds finite values only, so that what is masked
    may be multiplied, by 0 too.
    """
    _bound["write_kv"](cache, slots, k, v)


def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, slots: Tensor) -> Tensor:
    """What lies between the QKV product and attention: norms of the query and key heads, `rotate`, `write_kv`.

    q [T, H, D], k and v [T, H', D]; returns the rotated queries.
    """
    return _bound["rope_write_kv"](q, k, v, rope, cache, slots)  # type: ignore[no-any-return]


def project(
    x: Operand, w: PackedWeight, heads: int, rope: Rope, cache: LayerCache, batch: ForwardBatch, window: int | None
) -> Tensor | None:
    """`linear` of x [T, K] by the weight of queries, keys and values, then `rope_write_kv`: the rotated queries [T, H, D].

    None, and nothing is written, where one launch does not compute both; `attend` takes what `linear` gives.
    """
    return _bound["project"](x, w, heads, rope, cache, batch, window)  # type: ignore[no-any-return]


def attention(q: Tensor, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
    """Causal attention of q [T, H, D] over the cache, which already holds this step's tokens: [T, H, D].

    Each request's query tokens are the last of its context. `window` limits a token to the last `window` positions, itself
    included. Scores and sums are FP32. A request of one token whose context is empty pads a graph: zeros, and nothing is read.
    """
    return _bound["attention"](q, cache, batch, scale, window)  # type: ignore[no-any-return]


def attend(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None
) -> Tensor:
    """`rope_write_kv` of a batch's q [T, H, D], k and v [T, H', D], then `attention`: [T, H, D]."""
    return _bound["attend"](q, k, v, rope, cache, batch, scale, window)  # type: ignore[no-any-return]


def head_linear(x: Tensor, w: Tensor) -> Tensor:
    """Each head's product x [T, H, K] by w [H, K, N], sums in FP32: [T, H, N] in x's dtype."""
    return _bound["head_linear"](x, w)  # type: ignore[no-any-return]


def write_latent(kv: Tensor, norm: Norm, rotation: Rotation, cache: LatentCache, slots: Tensor) -> None:
    """Store a token's latent, normed, and its key's rope part, rotated, at `slots` [T], of kv [T, R + D] as projected.

    In codes (`fp8_ds_mla`) each 128 values of a latent share a scale: amax, at least 1e-4, over the largest code, rounded up to
    a power of two. NaN and infinity are stored as 0, as `write_kv` has it.
    """
    _bound["write_latent"](kv, norm, rotation, cache, slots)


def absorbed_queries(q: Tensor, up_k: Tensor, rotation: Rotation) -> Tensor:
    """Queries that meet latents, [T, H, R + D]: q [T, H, N + D] as projected, its N by up_k [H, N, R], its last D rotated.

    A score q·(up_k c) is (q up_k)·c, so keys need not be made of latents c (arXiv:2405.04434, section 2.1.2).
    """
    return _bound["absorbed_queries"](q, up_k, rotation)  # type: ignore[no-any-return]


def latent_attention(q: Tensor, cache: LatentCache, batch: ForwardBatch, scale: float, chosen: Tensor | None = None) -> Tensor:
    """Causal attention of absorbed queries q [T, H, R + D] over latents, which are the values too: [T, H, R].

    The cache holds this step's tokens already. `chosen`: INT32 [T, top_k], the places in its request's context that a token
    attends to, in ascending order, -1 behind them; None: all up to its own. Scores and sums are FP32. A row that pads a graph
    gives zeros.
    """
    return _bound["latent_attention"](q, cache, batch, scale, chosen)  # type: ignore[no-any-return]


def expanded_attention(
    q: Tensor, up_k: Tensor, up_v: Tensor, rotation: Rotation, cache: LatentCache, batch: ForwardBatch, scale: float
) -> Tensor:
    """Causal attention of q [T, H, N + D] as projected, over keys and values made of the latents of each request's context.

    up_k [H, N, R], up_v [H, R, V]; a key is its head's up_k c, then the rope part that heads share, a value c up_v: [T, H, V].
    For long prompts: a pair of a query and a key costs N + D + V products and not 2R + D, but latents are multiplied anew.
    """
    return _bound["expanded_attention"](q, up_k, up_v, rotation, cache, batch, scale)  # type: ignore[no-any-return]


def write_index_keys(k: Tensor, norm: Norm, rotation: Rotation, cache: IndexCache, slots: Tensor) -> None:
    """Store the indexer's keys at `slots` [T]: k [T, D] as projected, normed (LayerNorm), its first dimensions rotated.

    In codes, after a Hadamard transform times D^-1/2, each with a scale as `write_latent` has it.
    """
    _bound["write_index_keys"](k, norm, rotation, cache, slots)


def select_keys(q: Tensor, weights: Tensor, rotation: Rotation, cache: IndexCache, batch: ForwardBatch, top_k: int) -> Tensor:
    """The `top_k` places of each token's context that the indexer scores highest: INT32 [T, top_k], ascending, -1 behind them.

    The score of place s is the sum over heads h of weights[t, h] * max(0, q[t, h]·k[s]), in FP32. q [T, Hi, D], as projected,
    is rotated as keys are and, where those are in codes, transformed and rounded as they are; weights [T, Hi]. Of equal ones
    the first; a token sees places up to its own; NaN is as good as -infinity. A row that pads a graph has none.
    """
    return _bound["select_keys"](q, weights, rotation, cache, batch, top_k)  # type: ignore[no-any-return]


def argmax(logits: Tensor) -> Tensor:
    """The token with the largest of logits [rows, vocab], the first of equal ones: int64 [rows]. NaN is as good as infinite."""
    return _bound["argmax"](logits)  # type: ignore[no-any-return]


def sample(logits: Tensor, temperature: Tensor, u: Tensor, filters: Filters | None) -> Tensor:
    """A token of each row of FP32 logits [rows, vocab], which may be overwritten: int64 [rows].

    Inverse transform sampling: the first token at which the cumulative probability of the tokens that `filters` keeps exceeds
    u times their sum. Probabilities are softmax(logits / temperature). temperature: FP32 [rows]; u: FP64 [rows] in [0, 1).
    """
    return _bound["sample"](logits, temperature, u, filters)  # type: ignore[no-any-return]


def decode_variant(requests: int, kv_heads: int, longest: int) -> int:
    """Of single tokens with contexts up to `longest`: where it is equal, `attention` launches the same."""
    return _bound["decode_variant"](requests, kv_heads, longest)  # type: ignore[no-any-return]


def implementations() -> Sequence[LinearImplementation]:
    """The linear implementations bound here, the preferred first; tests run each against the reference."""
    return tuple(_linear)


def stack_implementations() -> Sequence[StackImplementation]:
    """As `implementations`, of stacks of experts."""
    return tuple(_stacks)


def _rope_then_attention(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None
) -> Tensor:
    return attention(rope_write_kv(q, k, v, rope, cache, batch.slot_mapping), cache, batch, scale, window)


# What is made of other ops where a platform has nothing better, and how.
_COMPOSED: dict[str, tuple[Callable[..., Any], str]] = {
    "attend": (_rope_then_attention, "rope_write_kv, then attention"),
    "gated_linear": (lambda x, w, readers: silu_mul(linear_unscaled(x, w), readers), "linear_unscaled, then silu_mul"),
    "project": (lambda *_: None, "linear, then attend"),
}
