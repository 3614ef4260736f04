"""The physical limit of a workload: what a machine's measured bandwidth and arithmetic allow a model, and nothing else.

A step takes the longer of two times: its bytes over the bandwidth, its operations over the rates. Batching is ideal: all
prompts in full steps, then all requests decode together. Weights are read once a step, as many bytes as are stored; keys and
values are written once, and read once a decode step; activations stay on the chip. No launches, no sampling, no host. So no
engine reaches it, and none passes it. Sliding windows are counted as full attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.config import EngineConfig
from octavo.tools.bench.workloads import Workload
from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.model_source import Source, find_source, source_of_config
from octavo.tools.plan.subject import Subject, Variant

__all__ = ["Ceilings", "Costs", "Limit", "costs_of", "costs_of_shape", "limit"]

STEP_TOKENS = 8192  # of a prefill step


@dataclass(frozen=True)
class Ceilings:
    """What a machine was measured to do: bytes read or written a second, operations a second in FP8 and in the other dtype."""

    bandwidth: float
    fp8: float
    plain: float
    plain_dtype: str = "bfloat16"

    @property
    def as_json(self) -> dict[str, Any]:
        found = {"bandwidth_bytes_s": self.bandwidth, "fp8_flops": self.fp8, f"{self.plain_dtype}_flops": self.plain}
        return {name: value for name, value in found.items() if value}


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

    def step_seconds(self, on: Ceilings, tokens: float, sampled: float, pairs: float, read: float) -> float:
        """One step: `tokens` through the layers, `sampled` through the head, attention over `pairs`, `read` cached tokens."""
        moved = self.weight_bytes + (self.head_bytes if sampled else 0) + self.kv_bytes * (tokens + read)
        moved += self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)  # chosen evenly: those that a token reaches
        fp8, plain = tokens * self.fp8_operations, tokens * self.plain_operations
        fp8, plain = _add(fp8, plain, sampled * self.head_operations, self.head_fp8)
        fp8, plain = _add(fp8, plain, pairs * self.pair_operations, self.kv_fp8)
        # A machine without FP8 units computes FP8 products in the other dtype.
        seconds: float = max(moved / on.bandwidth, fp8 / (on.fp8 or on.plain) + plain / on.plain)
        return seconds


def _add(fp8: float, plain: float, more: float, is_fp8: bool) -> tuple[float, float]:
    return (fp8 + more, plain) if is_fp8 else (fp8, plain + more)


@dataclass(frozen=True)
class Limit:
    """Seconds at least, of the two parts of a workload."""

    prefill: float
    decode: float

    def of(self, workload: Workload) -> float:
        """Seconds of the part that the workload times."""
        return self.decode if workload.part == "decode" else self.prefill + self.decode


def limit(costs: Costs, on: Ceilings, workload: Workload, most: int | None = None) -> Limit:
    """The limit of `workload`, of which at most `most` requests run at a time (all of them)."""
    n, length, output = workload.num_requests, workload.input_len, workload.output_len
    steps = -(-n * length // STEP_TOKENS)
    pairs = n * length * (length + 1) / 2  # each token attends to itself and to those before it
    prefill = steps * costs.step_seconds(on, n * length / steps, n / steps, pairs / steps, 0)
    first = 0 if workload.part == "decode" else 1  # the prefill brought the first token already
    together = min(n, most or n)
    waves = [together] * (n // together) + ([n % together] if n % together else [])
    decode = sum(
        costs.step_seconds(on, batch, batch, batch * (length + i + 1), batch * (length + i))
        for batch in waves
        for i in range(output - first)
    )
    return Limit(prefill, decode)


def costs_of(config: EngineConfig) -> Costs:
    """What the engine of `config` has to move and compute, by its config.json and, where there are any, its headers."""
    return _costs(config, find_source(config.model, dummy=config.load_format == "dummy"))


def costs_of_shape(config: EngineConfig, shape: Mapping[str, Any]) -> Costs:
    """The same of a config.json that is not on disk."""
    return _costs(config, source_of_config("shape", "its config.json", shape))


def _costs(config: EngineConfig, source: Source) -> Costs:
    subject = Subject.on(source, config, Accelerator("any", "any", 0))
    itemsize = 4 if config.dtype == "float32" else 2
    variant = Variant(config.quantization or "bf16", subject.quantized, config.kv_cache_dtype, itemsize)
    sums = dict.fromkeys(("weights", "experts", "head", "fp8", "plain", "head operations"), 0.0)
    head_fp8, share = False, 0.0
    for o in subject.walk(variant, 1).operands:
        if o.is_vector or o.component == "vision" or not o.active:
            continue
        moved, operations = o.experts * o.read, 2.0 * o.active * o.shape[0] * o.shape[1]
        if o.component == "lm_head":
            sums["head"], sums["head operations"], head_fp8 = moved, operations, o.is_fp8
        else:
            sums["experts" if o.experts > 1 else "weights"] += moved
            sums["fp8" if o.is_fp8 else "plain"] += operations
        share = o.active / o.experts if o.experts > 1 else share
    attention = subject.attention
    return Costs(
        sums["weights"],
        sums["head"],
        sum(subject.token_bytes(variant, 1)),
        sums["fp8"],
        sums["plain"],
        sums["head operations"],
        attention.layers * 2.0 * attention.heads * (attention.qk_dim + attention.v_dim),
        head_fp8,
        "fp8" in subject.cache_format(variant.kv),
        sums["experts"],
        share,
    )
