"""The most that an accelerator's bandwidth and arithmetic allow: an upper bound of throughput, not a promise.

Every product takes the longer of two times: its bytes over the bandwidth, its operations over the rate. Weights and attention
follow one another; all-reduces follow both. Nothing else takes time: no launches, no sampling, no host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.walk import Operand

__all__ = ["ASSUMPTIONS", "Attention", "Deployment", "decode_rate", "prefill_rate"]

BANDWIDTH = 0.88  # of the data sheet's, measured by copies on an H200: 4.24 of 4.8 TB/s
PRODUCTS = 0.66  # of the data sheet's peak, measured by FP8 products on an H200: 1.25-1.38 of 1.98 PFLOP/s
STEP_TOKENS = 8192  # of a prefill step

ASSUMPTIONS = (
    f"{BANDWIDTH:.0%} of the data sheet's bandwidth and {PRODUCTS:.0%} of its peak, as measured on an H200, assumed everywhere",
    "FP8 weights multiply on FP8 units, attention too where the cache is FP8; the rest, INT4 too, in BF16",
    "two all-reduces a layer at the link's full rate, not overlapped; no launches, no host, no waiting",
    "experts are chosen evenly: a decode step reads those that its requests reach",
)


@dataclass(frozen=True, slots=True)
class Attention:
    """What attention computes, in all `layers` of a model.

    qk_dim, v_dim: of one head in the prefill. latent, rope: MLA's cache instead of keys and values, 0 for none.
    index_heads, index_dim, index_topk: DeepSeek's sparse-attention indexer, 0 for none.
    """

    layers: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    latent: int = 0
    rope: int = 0
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0


@dataclass(frozen=True)
class Deployment:
    """A model on `tp` ranks of an accelerator: one rank's weights and its cache.

    token_bytes: of a token in all layers, of what attention reads and of the indexer's keys.
    """

    attention: Attention
    hidden_size: int
    weights: Sequence[Operand]
    cache: str
    token_bytes: tuple[int, int]
    tp: int
    on: Accelerator

    def rate(self, fp8: bool) -> float:
        return PRODUCTS * (self.on.fp8 if fp8 else self.on.bf16)

    @property
    def bandwidth(self) -> float:
        return BANDWIDTH * self.on.bandwidth


def prefill_rate(d: Deployment, prompt: int) -> float:
    """Prompt tokens a second of one server, for prompts of `prompt` tokens in steps of STEP_TOKENS."""
    seen = _mean_seen(d.attention, prompt)
    seconds = _linear_seconds(d, STEP_TOKENS, STEP_TOKENS / prompt)
    seconds += STEP_TOKENS * _attention_operations(d, seen, prompt / 2, absorbed=False) / d.rate("fp8" in d.cache)
    return STEP_TOKENS / (seconds + _reduce_seconds(d, STEP_TOKENS))


def decode_rate(d: Deployment, requests: int, context: int) -> float:
    """Output tokens a second of one server with `requests` running, `context` tokens in the cache of each."""
    a, (token, index) = d.attention, d.token_bytes
    seen = min(context, a.index_topk or context)
    read = requests * (seen * token + context * index)
    operations = requests * _attention_operations(d, seen, context, absorbed=True)
    seconds = max(read / d.bandwidth, operations / d.rate("fp8" in d.cache))
    return requests / (seconds + _linear_seconds(d, requests, requests) + _reduce_seconds(d, requests))


def _linear_seconds(d: Deployment, tokens: int, sampled: float) -> float:
    """The products with weights: `tokens` through the layers, `sampled` of them through the head."""
    read, seconds_busy = 0.0, 0.0
    for o in d.weights:
        if o.is_vector or o.component == "vision" or not o.active:
            continue
        rows = sampled if o.component == "lm_head" else tokens
        reached = o.experts * (1 - (1 - o.active / o.experts) ** tokens)  # of the experts, by at least one token
        read += reached * o.read
        seconds_busy += 2 * rows * o.active * o.shape[0] * o.shape[1] / d.rate(o.is_fp8)
    return max(read / d.bandwidth, seconds_busy)


def _mean_seen(a: Attention, prompt: int) -> float:
    """Tokens that a prompt's token attends to, on average: those before it, at most the indexer's choice."""
    top = min(a.index_topk or prompt, prompt)
    return (top * top / 2 + (prompt - top) * top) / prompt


def _attention_operations(d: Deployment, seen: float, indexed: float, *, absorbed: bool) -> float:
    """Of one token in all layers on one rank. MLA is computed on the latent (`absorbed`) in decode and where it is sparse."""
    a = d.attention
    width = 2 * a.latent + a.rope if a.latent and (absorbed or a.index_topk) else a.qk_dim + a.v_dim
    return a.layers * 2 * (a.heads / d.tp * width * seen + a.index_heads * a.index_dim * indexed)


def _reduce_seconds(d: Deployment, tokens: int) -> float:
    if d.tp == 1 or not d.on.link:
        return 0.0
    sent = 2 * (d.tp - 1) / d.tp * 2 * d.hidden_size * tokens
    return 2 * d.attention.layers * sent / d.on.link
