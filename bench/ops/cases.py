"""One function an op: makes a set of inputs and says what calling the op on it costs, and what the library's call would be.

Shapes are Llama-3.1-8B's, and of experts Qwen3-30B-A3B's. Ops come through octavo.ops, so what is timed is what the platform
at hand was bound to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.inputs import Call, Set, block_size, by_blocks, random, scaled_mm
from bench.ops.mixtures import ROUTINGS, experts, library_of_experts, routed_experts
from octavo import batch, ops
from octavo.kvcache import LayerCache, Layout, spec_for
from octavo.platform import Platform
from octavo.quant import SCHEMES, quantize

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 4096, 14336, 32, 8, 128, 128_256
LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # N, K
TOKENS = (1, 16, 64, 256, 2048)
LONG = (8192,)  # tokens of a step of prompts
DECODES = ((1, 1024), (1, 32768), (16, 1024), (16, 32768), (64, 1024), (256, 1024))  # requests, context of each
PREFILLS = ((8, 1024), (2, 4096), (1, 8192))


@dataclass(frozen=True)
class Case:
    """An op at one shape. `make` gives a fresh set, so that a timing can go round more memory than a cache holds."""

    op: str
    shape: str
    library: str
    make: Callable[[], Set]


def cases(p: Platform, scale: float = 1.0, scheme: str = "ptpc_fp8") -> Iterator[Case]:
    """All cases, of weights in `scheme`; `scale` below 1 leaves the large ones out, which a CPU would take minutes for."""
    most_tokens, most_context = int(2048 * scale), int(256 * 1024 * scale)
    tokens = [m for m in TOKENS if m <= most_tokens]
    for name, (n, k) in LAYERS.items():
        for m in tokens:
            yield Case(
                "linear",
                f"{name} M={m}",
                library_name(p, scheme) if not p.is_cpu else "F.linear",
                lambda n=n, k=k, m=m: linear(p, scheme, m, n, k),
            )
    for m in tokens:
        yield Case("rms_norm", f"M={m}", "F.rms_norm", lambda m=m: rms_norm(p, scheme, m))
        yield Case("silu_mul", f"M={m}", "F.silu * up", lambda m=m: silu_mul(p, scheme, m))
        yield Case("gated_linear", f"M={m}", f"{library_name(p, scheme)}, F.silu * up", lambda m=m: gated_linear(p, scheme, m))
        yield Case("rope_write_kv", f"M={m}", "", lambda m=m: rope_write_kv(p, m))
    for m in tokens:
        yield Case("experts", f"M={m}", "", lambda m=m: experts(p, scheme, m))
    for m in (*tokens, *LONG) if not p.is_cpu else tokens:
        for routing in ROUTINGS:
            library = library_of_experts(p, scheme, m, routing)
            yield Case("routed_experts", f"M={m} {routing}", library, lambda m=m, r=routing: routed_experts(p, scheme, m, r))
    for n in (1, 16, 256):
        if n <= tokens[-1]:
            for name, top_k, top_p in (("temperature", VOCAB, 1.0), ("top_p", VOCAB, 0.9), ("top_k, top_p", 40, 0.9)):
                yield Case("sample", f"{n} x {VOCAB}, {name}", "softmax, multinomial", partial(sample, p, n, top_k, top_p))
    for n, context in DECODES:
        if n * context <= most_context:
            yield Case("attention", f"decode {n} x {context}", "SDPA, dense", lambda n=n, c=context: attention(p, n, c, 1))
    for n, length in PREFILLS:
        if n * length <= 4 * most_tokens:
            yield Case("attention", f"prefill {n} x {length}", "SDPA, dense", lambda n=n, c=length: attention(p, n, c, c))


def library_dtype(p: Platform) -> torch.dtype:
    """The fastest of the library's: few CPUs multiply BF16 at speed."""
    return (p.widened_dtype or torch.float32) if p.is_cpu else torch.bfloat16


def library_name(p: Platform, scheme: str) -> str:
    return "_scaled_mm, blocks" if by_blocks(p, scheme) else "_scaled_mm, one scale"


def packed(p: Platform, scheme: str, n: int, k: int) -> tuple[ops.PackedWeight, int]:
    q = quantize(random(p, n, k) * 0.02, SCHEMES[scheme], p.fp8_dtype)
    w = ops.pack(q, p)
    return w, w.held_bytes


def factors(p: Platform, scheme: str, m: int, n: int, k: int) -> tuple[ops.Operand, ops.PackedWeight, Call, int]:
    """What an FP8 product is made of, its quantization of x only where the op before would not have done it; the library's
    product of the same shape; bytes of both."""
    (w, held), x = packed(p, scheme, n, k), random(p, m, k)
    given: ops.Operand = x
    if w.reads is not None:  # as in a layer, where the norm before quantizes
        given = ops.rms_norm(x, torch.ones(k, device=p.device, dtype=x.dtype), 1e-5, None, [w])[0]
    if p.is_cpu:
        dense = random(p, n, k).to(library_dtype(p))
        return given, w, partial(F.linear, x.to(dense.dtype), dense), held + dense.nbytes
    codes, b = x.to(p.fp8_dtype), random(p, n, k).to(p.fp8_dtype)
    return given, w, scaled_mm(p, scheme, codes, b), held + b.nbytes


def linear(p: Platform, scheme: str, m: int, n: int, k: int) -> Set:
    given, w, library, nbytes = factors(p, scheme, m, n, k)
    return Set(lambda: ops.linear(given, w), library, n * k + m * k + 2 * m * n, 2.0 * m * n * k, True, nbytes)


def gated_linear(p: Platform, scheme: str, m: int) -> Set:
    """An MLP's first product, SiLU and product, its result as the second product reads it."""
    n, (feeds, _) = 2 * INNER, small_weight(p, scheme, INNER)
    given, w, product, nbytes = factors(p, scheme, m, n, HIDDEN)

    moved = n * HIDDEN + m * HIDDEN + m * INNER * (1 if feeds.reads is not None else 2)
    return Set(lambda: ops.gated_linear(given, w, [feeds]), lambda: gated(product()), moved, 2.0 * m * n * HIDDEN, True, nbytes)


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rms_norm(p: Platform, scheme: str, m: int) -> Set:
    """With the residual's addition, and the quantization where the next layer reads codes."""
    x, residual, weight = random(p, m, HIDDEN), random(p, m, HIDDEN), random(p, HIDDEN)
    feeds, _ = small_weight(p, scheme, HIDDEN)

    def library() -> Tensor:
        return F.rms_norm(x + residual, (HIDDEN,), weight, 1e-5)

    moved = m * HIDDEN * (3 * 2 + (1 if feeds.reads is not None else 2))
    return Set(lambda: ops.rms_norm(x, weight, 1e-5, residual, [feeds]), library, moved, nbytes=4 * x.nbytes)


def silu_mul(p: Platform, scheme: str, m: int) -> Set:
    x, (feeds, _) = random(p, m, 2 * INNER), small_weight(p, scheme, INNER)

    moved = m * INNER * (2 * 2 + (1 if feeds.reads is not None else 2))
    return Set(lambda: ops.silu_mul(x, [feeds]), partial(gated, x), moved, nbytes=2 * x.nbytes)


def sample(p: Platform, n: int, top_k: int, top_p: float) -> Set:
    """A token of each row; logits as a model has them: a few far above the rest. They are overwritten, so they are copied."""
    logits, one = 2 * torch.randn(n, VOCAB, device=p.device), torch.ones(n, device=p.device)
    logits[:, :20] += 12
    u = torch.rand(n, device=p.device).double()
    filters = ops.Filters((top_k * one).int(), top_p * one, 0 * one, top_k) if top_k < VOCAB or top_p < 1 else None

    def library() -> Tensor:
        return torch.multinomial(logits.softmax(-1), 1)

    return Set(lambda: ops.sample(logits.clone(), one, u, filters), library, 4 * n * VOCAB, nbytes=2 * logits.nbytes)


def small_weight(p: Platform, scheme: str, k: int) -> tuple[ops.PackedWeight, int]:
    """Some weight that an op's output feeds; what it holds does not matter."""
    return packed(p, scheme, 16, k)


def cache(p: Platform, tokens: int) -> LayerCache:
    """An FP8 cache of one layer as the engine lays it out there, with room for so many tokens."""
    spec, block = spec_for("fp8_e4m3", KV_HEADS, DIM, torch.bfloat16, p.fp8_dtype, Layout.on(p.is_cpu)), block_size(p)
    shape = -(-tokens // block), block * spec.bytes_per_token
    views = spec.views(torch.randint(0, 120, shape, dtype=torch.uint8, device=p.device), block)  # finite codes
    return LayerCache(views, torch.ones(1, device=p.device), torch.ones(1, device=p.device))


def rope_write_kv(p: Platform, m: int) -> Set:
    kv = cache(p, m)
    q, k, v = random(p, m, HEADS, DIM), random(p, m, KV_HEADS, DIM), random(p, m, KV_HEADS, DIM)
    at, table = torch.arange(m, device=p.device), torch.rand(max(TOKENS), DIM, device=p.device)
    moved = 2 * 2 * q.numel() + 3 * k.numel() * 2
    held = 2 * q.nbytes + 2 * k.nbytes + 2 * k.numel()
    rope = ops.Rope(None, table, at)
    return Set(lambda: ops.rope_write_kv(q, k, v, rope, kv, at), None, moved, nbytes=held)


def attention(p: Platform, requests: int, context: int, queries: int) -> Set:
    """The last `queries` tokens of each request over an FP8 cache; the library's reads dense BF16, so twice the bytes."""
    block = block_size(p)
    width = -(-context // block)
    kv, order = cache(p, requests * width * block), torch.randperm(requests * width).tolist()  # blocks lie anywhere
    spans = [batch.Span([0] * queries, context - queries, order[i * width : (i + 1) * width]) for i in range(requests)]
    made, q = batch.build(spans, block, p.device), random(p, requests * queries, HEADS, DIM)
    dtype = library_dtype(p)
    k, v = (random(p, requests, KV_HEADS, context, DIM).to(dtype) for _ in range(2))
    dense = q.to(dtype).view(requests, queries, HEADS, DIM).transpose(1, 2)

    def library() -> Tensor:
        return F.scaled_dot_product_attention(dense, k, v, is_causal=queries > 1, enable_gqa=True)

    pairs = requests * (queries * context - queries * (queries - 1) / 2)
    moved = 2.0 * requests * context * KV_HEADS * DIM + 2 * 2 * q.numel()
    held = int(2 * requests * context * KV_HEADS * DIM) + 2 * k.nbytes
    call = partial(ops.attention, q, kv, made, DIM**-0.5, None)
    return Set(call, library, moved, 4.0 * pairs * HEADS * DIM, True, held)
