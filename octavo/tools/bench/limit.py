"""The physical limit of a workload: what a machine's measured bandwidth and arithmetic allow a model, and nothing else.

A step takes the longer of two times: its bytes over the bandwidth, its operations over the rates. Batching is ideal: all
prompts in full steps, then all requests decode together. Weights are read once a step, as many bytes as are stored; keys and
values, or latents, are written once, and read once a decode step, of sparse attention those that are attended to and all of
the indexer's keys; activations stay on the chip. No launches, no sampling, no host. So no engine reaches it, and none passes
it. Sliding windows are counted as full attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from octavo.config import EngineConfig
from octavo.tools.bench.workloads import Workload
from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.model_source import Source, find_source
from octavo.tools.plan.roofline import STEP_TOKENS, Costs
from octavo.tools.plan.subject import Subject, Variant

__all__ = ["Ceilings", "Limit", "costs_of", "limit", "step_seconds"]


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


def step_seconds(
    costs: Costs, on: Ceilings, tokens: float, sampled: float, attention: tuple[float, float], read: float = 0.0
) -> float:
    """One step: `tokens` through the layers, `sampled` through the head, attention's operations of one token in FP8 and in the
    other dtype, and bytes that each token reads of the cache."""
    moved = costs.moved(tokens, sampled) + tokens * (costs.kv_bytes + costs.index_bytes + read)
    fp8, plain = (a + tokens * b for a, b in zip(costs.operations(tokens, sampled), attention, strict=True))
    # A machine without FP8 units computes FP8 products in the other dtype.
    return max(moved / on.bandwidth, fp8 / (on.fp8 or on.plain) + plain / on.plain)


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
    prefill = steps * step_seconds(costs, on, n * length / steps, n / steps, costs.prefilled(length))
    first = 0 if workload.part == "decode" else 1  # the prefill brought the first token already
    together = min(n, most or n)
    waves = [together] * (n // together) + ([n % together] if n % together else [])
    decode = sum(
        step_seconds(costs, on, batch, batch, costs.decoded(length + i + 1), costs.read(length + i))
        for batch in waves
        for i in range(output - first)
    )
    return Limit(prefill, decode)


def costs_of(config: EngineConfig, source: Source | None = None) -> Costs:
    """What the engine of `config` has to move and compute, by its config.json and, where there are any, its headers."""
    source = source or find_source(config.model, dummy=config.load_format == "dummy")
    subject = Subject(source, config, Accelerator("any", "any", 0))
    variant = Variant(config.quantization or "bf16", subject.quantized, config.kv_cache_dtype, subject.itemsize)
    return Costs.of(subject.walk(variant, 1).operands, subject.attention, subject.caches(variant, 1))
