"""Mixtures of experts, in the shape of Qwen3-30B-A3B's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.ops.inputs import Call, Set, block_size, by_blocks, random, scaled_mm
from octavo import batch, ops
from octavo.platform import Platform
from octavo.quant import SCHEMES, quantize
from octavo.quant.qtensor import Stacker

MIXTURE = (2048, 768, 128, 8)  # hidden, intermediate, experts, chosen
ROUTINGS = ("balanced", "skewed", "one-hot")  # every expert as likely, an eighth of them most likely, the same for all tokens


def mixture(p: Platform, scheme: str) -> tuple[ops.PackedStack, ops.PackedStack, int]:
    """Stacks of gate and up, and of down; how many experts they have."""
    hidden, inner, count, _ = MIXTURE
    count = count // 8 if p.is_cpu else count  # whose caches hold none of that, either
    stacks = []
    for n, k in ((2 * inner, hidden), (hidden, inner)):
        made = Stacker(count)
        for e in range(count):
            made.put(e, quantize(random(p, n, k) * k**-0.5, SCHEMES[scheme], p.fp8_dtype))
        stacks.append(ops.pack_experts(made.finished(), p))
    return stacks[0], stacks[1], count


def experts(p: Platform, scheme: str, m: int) -> Set:
    """A router, its experts' products and their sum, with codes beside dense values where the norm before would make them."""
    (hidden, inner, _, chosen), (up, down, count) = MIXTURE, mixture(p, scheme)
    x, ones, gate = random(p, m, hidden), random(p, hidden), random(p, count, hidden) * hidden**-0.5
    given, _ = ops.rms_norm(x, ones, 1e-5, None, [None, up])
    spans = [batch.Span([0], 4, [0, 1]) for _ in range(m)]
    made_of, router = batch.build(spans, block_size(p), p.device), ops.Router(chosen)
    routed = ops.route(given.values(), gate, None, router, made_of)
    used = int(routed.experts.unique().numel())

    def call() -> Tensor:
        return ops.experts(given, ops.route(given.values(), gate, None, router, made_of), up, down)

    per_expert = 3 * hidden * inner
    return Set(call, None, used * per_expert + 4 * m * hidden, 2.0 * m * chosen * per_expert, True, used * per_expert)


def routed_experts(p: Platform, scheme: str, m: int, routing: str) -> Set:
    """Experts of tokens that are routed already. The library's products are of rows that lie in order, without SiLU and
    quantization in between, and without the sum.
    """
    (hidden, inner, _, chosen), (up, down, count) = MIXTURE, mixture(p, scheme)
    likely = torch.rand(m, count, device=p.device)
    if routing == "skewed":
        likely[:, : count // 8] += 0.5
    to = likely.argsort(-1, descending=True)[:, :chosen].int()
    if routing == "one-hot":
        to = torch.arange(chosen, device=p.device).expand(m, chosen).int().contiguous()
    given, _ = ops.rms_norm(random(p, m, hidden), random(p, hidden), 1e-5, None, [up])
    routed, used = ops.Routed(to, torch.rand(m, chosen, device=p.device)), int(to.unique().numel())
    library = None
    if library_of_experts(p, scheme, m, routing):
        starts = ops.dispatch(to, count).starts
        library = (
            each_mm(p, scheme, (up, down), m, chosen) if routing == "one-hot" else grouped_mm(p, (up, down), starts, m * chosen)
        )
    per_expert, call = 3 * hidden * inner, partial(ops.experts, given, routed, up, down)
    return Set(call, library, used * per_expert + 4 * m * hidden, 2.0 * m * chosen * per_expert, True, used * per_expert)


def library_of_experts(p: Platform, scheme: str, m: int, routing: str) -> str:
    """The library's name for such products, which on a GPU it has: grouped ones, though none of blocks, and a plain one an
    expert, where the host knows how many rows each has; "" for none. cuBLAS refuses a single row of blocks.
    """
    if p.is_cpu or (m == 1 and by_blocks(p, scheme)):
        return ""
    return "_scaled_mm, an expert each" if routing == "one-hot" else "" if by_blocks(p, scheme) else "_scaled_grouped_mm, twice"


def each_mm(p: Platform, scheme: str, stacks: Sequence[Any], m: int, chosen: int) -> Call:
    """The library's products of m random rows by each of the first experts of both stacks."""
    rows = [random(p, m, w.k).to(p.fp8_dtype) for w in stacks]
    calls = [scaled_mm(p, scheme, x, w.weight[e]) for x, w in zip(rows, stacks, strict=True) for e in range(chosen)]

    def call() -> None:
        for product in calls:
            product()

    return call


def grouped_mm(p: Platform, stacks: Sequence[Any], starts: Tensor, pairs: int) -> Call:
    """The library's products of random rows by stacks, whose rows from starts[1:] on are the next expert's."""
    rows = [random(p, pairs, w.k).to(p.fp8_dtype) for w in stacks]
    ones = torch.ones(pairs, device=p.device)

    def call() -> None:
        for x, w in zip(rows, stacks, strict=True):
            torch._scaled_grouped_mm(
                x, w.weight.mT, ones, w.scale.flatten(1), offs=starts[1:], out_dtype=torch.bfloat16, use_fast_accum=True
            )

    return call
