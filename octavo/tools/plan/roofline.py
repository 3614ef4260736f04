"""The most that an accelerator's bandwidth and arithmetic allow: an upper bound of throughput, not a promise.

Every product takes the longer of two times: its bytes over the bandwidth, its operations over the rate. Weights and attention
follow one another; all-reduces follow both. Nothing else takes time: no launches, no sampling, no host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.shapes import Model
from octavo.tools.plan.sizes import Attention, Format, Weight

__all__ = ["ASSUMPTIONS", "Deployment", "decode_rate", "prefill_rate"]

BANDWIDTH = 0.88  # of the data sheet's, measured by copies on an H200: 4.24 of 4.8 TB/s
PRODUCTS = 0.66  # of the data sheet's peak, measured by FP8 products on an H200: 1.25-1.38 of 1.98 PFLOP/s
STEP_TOKENS = 8192  # of a prefill step

ASSUMPTIONS = (
    f"{BANDWIDTH:.0%} of the data sheet's bandwidth and {PRODUCTS:.0%} of its peak, as measured on an H200, assumed everywhere",
    "FP8 and INT4 weights multiply on FP8 units, attention too where the cache is FP8; BF16 the rest",
    "two all-reduces a layer at the link's full rate, not overlapped; no launches, no host, no waiting",
    "experts are chosen evenly: a decode step reads those that its requests reach",
)


@dataclass(frozen=True)
class Deployment:
    """A model on `tp` ranks of an accelerator: (weight, format, how many) of its weights, and its cache's format."""

    model: Model
    weights: Sequence[tuple[Weight, Format, int]]
    cache: str
    tp: int
    on: Accelerator

    def rate(self, fp8: bool) -> float:
        return PRODUCTS * (self.on.fp8 if fp8 else self.on.bf16)

    @property
    def bandwidth(self) -> float:
        return BANDWIDTH * self.on.bandwidth


def prefill_rate(d: Deployment, prompt: int) -> float:
    """Prompt tokens a second of one server, for prompts of `prompt` tokens in steps of STEP_TOKENS."""
    seen = _mean_seen(d.model.attention, prompt)
    seconds = _linear_seconds(d, STEP_TOKENS, STEP_TOKENS / prompt)
    seconds += STEP_TOKENS * _attention_operations(d, seen, prompt / 2, absorbed=False) / d.rate("fp8" in d.cache)
    return STEP_TOKENS / (seconds + _reduce_seconds(d, STEP_TOKENS))


def decode_rate(d: Deployment, requests: int, context: int) -> float:
    """Output tokens a second of one server with `requests` running, `context` tokens in the cache of each."""
    a, itemsize = d.model.attention, 2
    seen = min(context, a.index_topk or context)
    read = requests * a.layers * (seen * a.token_bytes(d.cache, d.tp, itemsize) + context * a.index_bytes())
    operations = requests * _attention_operations(d, seen, context, absorbed=True)
    seconds = max(read / d.bandwidth, operations / d.rate("fp8" in d.cache))
    return requests / (seconds + _linear_seconds(d, requests, requests) + _reduce_seconds(d, requests))


def _linear_seconds(d: Deployment, tokens: int, sampled: float) -> float:
    """The products with weights: `tokens` through the layers, `sampled` of them through the head."""
    read, seconds_busy = 0.0, 0.0
    for weight, form, count in d.weights:
        if weight.is_vector or weight.component == "vision" or not weight.active:
            continue
        rows = sampled if weight.component == "lm_head" else tokens
        operations = count * 2 * rows * weight.active * sum(n * k for n, k in weight.rank_shapes(d.tp))
        reached = weight.experts * (1 - (1 - weight.active / weight.experts) ** tokens)  # of the experts, by at least one token
        read += count * reached * weight.operand_bytes(form, d.tp)
        seconds_busy += operations / d.rate(form.is_fp8)
    return max(read / d.bandwidth, seconds_busy)


def _mean_seen(a: Attention, prompt: int) -> float:
    """Tokens that a prompt's token attends to, on average: those before it, at most the indexer's choice."""
    top = min(a.index_topk or prompt, prompt)
    return (top * top / 2 + (prompt - top) * top) / prompt


def _attention_operations(d: Deployment, seen: float, indexed: float, *, absorbed: bool) -> float:
    """Of one token in all layers on one rank. MLA is computed on the latent (`absorbed`) in decode and where it is sparse."""
    a = d.model.attention
    width = 2 * a.latent + a.rope if a.is_mla and (absorbed or a.index_topk) else a.qk_dim + a.v_dim
    return a.layers * 2 * (a.heads / d.tp * width * seen + a.index_heads * a.index_dim * indexed)


def _reduce_seconds(d: Deployment, tokens: int) -> float:
    if d.tp == 1 or not d.on.link:
        return 0.0
    sent = 2 * (d.tp - 1) / d.tp * 2 * d.model.hidden_size * tokens
    return 2 * d.model.attention.layers * sent / d.on.link
