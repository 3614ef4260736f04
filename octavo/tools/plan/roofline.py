"""The most that an accelerator's bandwidth and arithmetic allow: an upper bound of throughput, not a promise.

Every product takes the longer of two times: its bytes over the bandwidth, its operations over the rate. Weights and attention
follow one another; all-reduces follow both. Nothing else takes time: no launches, no sampling, no host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.walk import Operand

__all__ = ["ASSUMPTIONS", "STEP_TOKENS", "Attention", "Costs", "Deployment", "decode_rate", "prefill_rate"]

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
class Costs:
    """What a model's steps need. Bytes: of weights, of the head, of all experts, of one token's keys and values in all layers.

    Operations: one token's in FP8 and in the other dtype, one sampled token's in the head, and attention's for one pair of a
    query and a key in all layers.
    """

    weight_bytes: float
    head_bytes: float
    kv_bytes: float
    fp8_operations: float
    plain_operations: float
    head_operations: float
    pair_operations: float
    head_fp8: bool = False
    kv_fp8: bool = False
    expert_bytes: float = 0.0
    expert_share: float = 0.0  # of the experts that one token is sent to

    @classmethod
    def of(cls, operands: Iterable[Operand], attention: Attention, kv_bytes: int, cache: str) -> Costs:
        """Those of the weights of one rank, and of a cache of the format `cache`."""
        sums = dict.fromkeys(("weight_bytes", "expert_bytes", "fp8_operations", "plain_operations"), 0.0)
        head, share = (0.0, 0.0, False), 0.0
        for o in operands:
            if o.is_vector or o.component == "vision" or not o.active:
                continue
            moved, operations = o.experts * o.read, 2.0 * o.active * o.shape[0] * o.shape[1]
            if o.component == "lm_head":
                head = moved, operations, o.is_fp8
                continue
            sums["expert_bytes" if o.experts > 1 else "weight_bytes"] += moved
            sums["fp8_operations" if o.is_fp8 else "plain_operations"] += operations
            share = o.active / o.experts if o.experts > 1 else share
        pair = attention.layers * 2.0 * attention.heads * (attention.qk_dim + attention.v_dim)
        return cls(
            head_bytes=head[0], kv_bytes=kv_bytes, head_operations=head[1], pair_operations=pair, head_fp8=head[2],
            kv_fp8="fp8" in cache, expert_share=share, **sums,
        )  # fmt: skip

    def moved(self, tokens: float, sampled: float) -> float:
        """Bytes of the weights that a step reads; of the experts, chosen evenly, those that at least one token reaches."""
        reached: float = self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)
        return self.weight_bytes + (self.head_bytes if sampled else 0) + reached

    def operations(self, tokens: float, sampled: float) -> tuple[float, float]:
        """In FP8 and in the other dtype, of the products with weights: `tokens` in the layers, `sampled` in the head."""
        fp8, plain, head = tokens * self.fp8_operations, tokens * self.plain_operations, sampled * self.head_operations
        return (fp8 + head, plain) if self.head_fp8 else (fp8, plain + head)


@dataclass(frozen=True)
class Deployment:
    """A model on `tp` ranks of an accelerator: one rank's costs. index_bytes: a token's, of the indexer's keys, all layers."""

    costs: Costs
    attention: Attention
    hidden_size: int
    index_bytes: int
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
    seconds += STEP_TOKENS * _attention_operations(d, seen, prompt / 2, absorbed=False) / d.rate(d.costs.kv_fp8)
    return STEP_TOKENS / (seconds + _reduce_seconds(d, STEP_TOKENS))


def decode_rate(d: Deployment, requests: int, context: int) -> float:
    """Output tokens a second of one server with `requests` running, `context` tokens in the cache of each."""
    seen = min(context, d.attention.index_topk or context)
    read = requests * (seen * d.costs.kv_bytes + context * d.index_bytes)
    operations = requests * _attention_operations(d, seen, context, absorbed=True)
    seconds = max(read / d.bandwidth, operations / d.rate(d.costs.kv_fp8))
    return requests / (seconds + _linear_seconds(d, requests, requests) + _reduce_seconds(d, requests))


def _linear_seconds(d: Deployment, tokens: int, sampled: float) -> float:
    """The products with weights: `tokens` through the layers, `sampled` of them through the head."""
    fp8, plain = d.costs.operations(tokens, sampled)
    busy = plain / d.rate(False) + (fp8 / d.rate(True) if fp8 else 0)
    return max(d.costs.moved(tokens, sampled) / d.bandwidth, busy)


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
