"""The most that an accelerator's bandwidth and arithmetic allow: an upper bound of throughput, not a promise.

Every product takes the longer of two times: its bytes over the bandwidth, its operations over the rate. Weights and attention
follow one another; all-reduces follow both. Nothing else takes time: no launches, no sampling, no host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from octavo.kvcache import KVCacheSpec
from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.operands import Operand

__all__ = [
    "ASSUMPTIONS",
    "STEP_TOKENS",
    "Attention",
    "Costs",
    "Deployment",
    "decode_rate",
    "hop_seconds",
    "is_index",
    "prefill_rate",
]

BANDWIDTH = 0.88  # of the data sheet's, measured by copies on an H200: 4.24 of 4.8 TB/s
PRODUCTS = 0.66  # of the data sheet's peak, measured by FP8 products on an H200: 1.25-1.38 of 1.98 PFLOP/s
STEP_TOKENS = 8192  # of a prefill step
HOP_SECONDS = 20e-6  # that a message between two stages takes besides its bytes; an assumption
INDEXER = {"heads": "n_heads", "dim": "head_dim", "topk": "topk"}  # as Attention has them -> as config.json does

ASSUMPTIONS = (
    f"{BANDWIDTH:.0%} of the data sheet's bandwidth and {PRODUCTS:.0%} of its peak, as measured on an H200, assumed everywhere",
    "FP8 weights multiply FP8 activations on FP8 units, attention too where keys and values are FP8; the rest, W8A16, INT4 "
    "and MLA too, in BF16",
    "two all-reduces a layer at the link's full rate, not overlapped; no launches, no host, no waiting",
    "experts are chosen evenly: a decode step reads those that its requests reach",
    f"a step in flight for each pipeline stage; a message between stages takes {HOP_SECONDS * 1e6:.0f} µs and its bytes",
)


@dataclass(frozen=True, slots=True)
class Attention:
    """What attention computes, in all `layers` of a model.

    qk_dim, v_dim: of one head. latent, rope: MLA's cache instead of keys and values, 0 for none.
    index_layers: how many of them have DeepSeek's sparse-attention indexer, of index_heads queries of index_dim, which chooses
    index_topk tokens, 0 for none.
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
    index_layers: int = 0

    @classmethod
    def of(cls, config: Any, index_layers: int = 0) -> Self:
        """That of a served model's Config."""
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        if (s := getattr(config, "latent", None)) is None:
            return cls(layers, heads, config.num_key_value_heads, config.head_dim, config.head_dim)
        index: dict[str, int] = {f"index_{name}": getattr(config, f"index_{hub}", 0) for name, hub in INDEXER.items()}
        return cls(layers, heads, heads, s.nope + s.rope, s.v, s.rank, s.rope, index_layers=index_layers, **index)

    @property
    def expanded(self) -> int:
        """Multiplications of a head for a pair of a query and a key."""
        return self.qk_dim + self.v_dim

    @property
    def absorbed(self) -> int:
        """As `expanded`, where queries meet MLA's latents as they are, of which no keys and values are made."""
        return 2 * self.latent + self.rope if self.latent else self.expanded

    def attended(self, context: int) -> int:
        """Tokens of a context that one token attends to."""
        return min(context, self.index_topk or context)

    def scored(self, context: int) -> int:
        """Tokens of a context that the indexer scores for one token: none where all are attended to."""
        return context if context > self.attended(context) else 0

    def decoded(self, context: int) -> tuple[float, float]:
        """Operations of one token in all layers, over a cache of `context` tokens: attention's, and the indexer's."""
        return self._operations(self.absorbed * self.attended(context), self.scored(context))

    def prefilled(self, prompt: int) -> tuple[float, float]:
        """As `decoded`, of one token of a prompt on average, each way to compute MLA where it takes less.

        Dense attention makes keys and values of latents, which the products with weights count; sparse attention meets the
        chosen latents as they are, since each token has others, or masks dense attention.
        """
        products = min(self.expanded, self.absorbed)
        most = self.absorbed * self.index_topk if self.index_topk else products * prompt
        growing = min(prompt, most // products)  # tokens at the start that see so little that masks take less
        pairs = products * growing * (growing + 1) / 2 + most * (prompt - growing)
        scored = prompt * (prompt + 1) - self.index_topk * (self.index_topk + 1) if self.scored(prompt) else 0
        return self._operations(pairs / prompt, scored / 2 / prompt)

    def _operations(self, pairs: float, scored: float) -> tuple[float, float]:
        return 2.0 * self.layers * self.heads * pairs, 2.0 * self.index_layers * self.index_heads * self.index_dim * scored


@dataclass(frozen=True)
class Costs:
    """What a model's steps need on one of `ranks`. Bytes: of weights, of the head, of all experts; of one token in all layers,
    of keys and values or latents, and of the indexer's keys.

    Operations: one token's in FP8 and in the other dtype, and one sampled token's in the head.
    """

    attention: Attention
    weight_bytes: float
    head_bytes: float
    kv_bytes: float
    fp8_operations: float
    plain_operations: float
    head_operations: float
    head_fp8: bool = False
    kv_fp8: bool = False
    index_bytes: float = 0.0
    index_fp8: bool = False
    expert_bytes: float = 0.0
    expert_share: float = 0.0  # of the experts that one token is sent to
    ranks: int = 1

    @classmethod
    def of(cls, operands: Iterable[Operand], attention: Attention, caches: Sequence[KVCacheSpec], ranks: int = 1) -> Costs:
        """Those of the weights and caches of one rank."""
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
        kinds: dict[bool, list[KVCacheSpec]] = {False: [], True: []}
        for spec in caches:
            kinds[is_index(spec)].append(spec)
        kv, index = (sum(spec.bytes_per_token for spec in specs) for specs in kinds.values())
        kv_fp8, index_fp8 = (any(spec.fields[0].dtype.itemsize == 1 for spec in specs) for specs in kinds.values())
        return cls(
            attention, head_bytes=head[0], kv_bytes=kv, head_operations=head[1], head_fp8=head[2],
            kv_fp8=kv_fp8 and not attention.latent, index_bytes=index, index_fp8=index_fp8, expert_share=share, ranks=ranks,
            **sums,
        )  # fmt: skip

    def moved(self, tokens: float, sampled: float) -> float:
        """Bytes of the weights that a step reads; of the experts, chosen evenly, those that at least one token reaches."""
        reached: float = self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)
        return self.weight_bytes + (self.head_bytes if sampled else 0) + reached

    def operations(self, tokens: float, sampled: float) -> tuple[float, float]:
        """In FP8 and in the other dtype, of the products with weights: `tokens` in the layers, `sampled` in the head."""
        fp8, plain, head = tokens * self.fp8_operations, tokens * self.plain_operations, sampled * self.head_operations
        return (fp8 + head, plain) if self.head_fp8 else (fp8, plain + head)

    def read(self, context: int) -> float:
        """Bytes of the cache that a token reads which sees `context` tokens of it."""
        return self.attention.attended(context) * self.kv_bytes + self.attention.scored(context) * self.index_bytes

    def decoded(self, context: int) -> tuple[float, float]:
        """`Attention.decoded` of this rank's heads, in FP8 and in the other dtype. Every rank has all of the indexer."""
        return self._by_dtype(*self.attention.decoded(context))

    def prefilled(self, prompt: int) -> tuple[float, float]:
        """As `decoded`, of `Attention.prefilled`."""
        return self._by_dtype(*self.attention.prefilled(prompt))

    def _by_dtype(self, attended: float, scored: float) -> tuple[float, float]:
        parts = (attended / self.ranks, self.kv_fp8), (scored, self.index_fp8)
        return sum(n for n, fp8 in parts if fp8), sum(n for n, fp8 in parts if not fp8)


def is_index(spec: KVCacheSpec) -> bool:
    """Whether the cache is of an indexer's keys, which are read where attention is sparse."""
    return spec.fields[0].name.startswith("index")


@dataclass(frozen=True)
class Deployment:
    """A model on an accelerator's ranks: one rank's costs, of all layers. stages: that the layers are split over. link: bytes a
    second between two of them, 0 where it is not known."""

    costs: Costs
    hidden_size: int
    on: Accelerator
    stages: int = 1
    link: float = 0.0

    def seconds(self, fp8: float, plain: float) -> float:
        """Of so many operations in FP8 and in the other dtype."""
        return plain / (PRODUCTS * self.on.bf16) + (fp8 / (PRODUCTS * self.on.fp8) if fp8 else 0)

    @property
    def bandwidth(self) -> float:
        return BANDWIDTH * self.on.bandwidth


def prefill_rate(d: Deployment, prompt: int) -> float:
    """Prompt tokens a second of one server, for prompts of `prompt` tokens in steps of STEP_TOKENS."""
    seconds = _linear_seconds(d, STEP_TOKENS, STEP_TOKENS / prompt) + STEP_TOKENS * d.seconds(*d.costs.prefilled(prompt))
    hops = d.stages * hop_seconds(d, STEP_TOKENS)
    return d.stages * STEP_TOKENS / (seconds + _reduce_seconds(d, STEP_TOKENS) + hops)


def decode_rate(d: Deployment, requests: int, context: int) -> float:
    """Output tokens a second of one server with `requests` running, `context` tokens in the cache of each.

    Each stage has a step of its own, with its part of the requests, so that weights are read once for each part.
    """
    part = -(-requests // d.stages)
    seconds = part * max(d.costs.read(context) / d.bandwidth, d.seconds(*d.costs.decoded(context)))
    hops = d.stages * hop_seconds(d, part)  # there, and back with the tokens
    return requests / (seconds + _linear_seconds(d, part, part) + _reduce_seconds(d, part) + hops)


def hop_seconds(d: Deployment, tokens: int) -> float:
    """From one stage to the next: hidden states and residuals, in BF16."""
    return HOP_SECONDS + 2 * 2 * d.hidden_size * tokens / d.link if d.link and d.stages > 1 else 0.0


def _linear_seconds(d: Deployment, tokens: int, sampled: float) -> float:
    """The products with weights: `tokens` through the layers, `sampled` of them through the head."""
    busy = d.seconds(*d.costs.operations(tokens, sampled))
    return max(d.costs.moved(tokens, sampled) / d.bandwidth, busy)


def _reduce_seconds(d: Deployment, tokens: int) -> float:
    ranks = d.costs.ranks
    if ranks == 1 or not d.on.link:
        return 0.0
    sent = 2 * (ranks - 1) / ranks * 2 * d.hidden_size * tokens
    return 2 * d.costs.attention.layers * sent / d.on.link
