"""The roofline limit of a workload: the time that the machine's measured bandwidth and arithmetic permit.

A step takes the longer of two times: its bytes over the bandwidth, and its operations over the rates. Batching is ideal: all
prompts in full steps, then all requests decode together. Weights are read once per step, as many bytes as are stored. Keys and
values, or latents, are written once, and read once per decode step; sparse attention reads the selected ones and all indexer
keys. Activations stay on the chip. There are no launches, no sampling and no host time. No engine can be faster than this.
Sliding windows are counted as full attention. Pipeline stages are alike, each with a step of its part of the requests.
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
    """Measured rates of a machine: bytes read or written per second, operations per second in FP8 and in the other dtype."""

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
    """Seconds of a step: `tokens` through the layers, `sampled` through the head, attention's operations per token in FP8 and
    in the other dtype, and the cache bytes that each token reads."""
    moved = costs.moved(tokens, sampled) + tokens * (costs.kv_bytes + costs.index_bytes + read)
    fp8, plain = (a + tokens * b for a, b in zip(costs.operations(tokens, sampled), attention, strict=True))
    # A machine without FP8 units computes FP8 products in the other dtype.
    return max(moved / on.bandwidth, fp8 / (on.fp8 or on.plain) + plain / on.plain)


@dataclass(frozen=True)
class Limit:
    """Minimum seconds of a workload's prefill and decode."""

    prefill: float
    decode: float

    def of(self, workload: Workload) -> float:
        """Seconds of the part of the workload that is timed."""
        return self.decode if workload.part == "decode" else self.prefill + self.decode


def limit(costs: Costs, on: Ceilings, workload: Workload, most: int | None = None, stages: int = 1) -> Limit:
    """The limit of `workload` with at most `most` requests at a time (default: all), on ranks whose costs are of all layers, of
    which each of `stages` has its part."""
    n, length, output = workload.num_requests, workload.input_len, workload.output_len
    steps = -(-n * length // STEP_TOKENS)
    prefill = steps * step_seconds(costs, on, n * length / steps, n / steps, costs.prefilled(length)) / stages
    first = 0 if workload.part == "decode" else 1  # the prefill samples the first token
    together = min(n, most or n)
    waves = [together] * (n // together) + ([n % together] if n % together else [])
    decode = sum(
        step_seconds(costs, on, part, part, costs.decoded(length + i + 1), costs.read(length + i))
        for part in (max(1, batch / stages) for batch in waves)  # a token goes through all stages before the next
        for i in range(output - first)
    )
    return Limit(prefill, decode)


def costs_of(config: EngineConfig, source: Source | None = None) -> Costs:
    """The bytes and operations of one rank of the model of `config`, of all pipeline stages together, by its config.json and,
    if present, its checkpoint's headers."""
    source = source or find_source(config.model, dummy=config.load_format == "dummy")
    subject = Subject(source, config, Accelerator("any", "any", 0))
    variant = Variant(config.quantization or "bf16", subject.quantized, config.kv_cache_dtype, subject.itemsize)
    ranks = config.tensor_parallel_size
    return Costs.of(subject.walk(variant, ranks).operands, subject.attention, subject.caches(variant, ranks), ranks)
