"""What a start tells its user of the loaded model, line by line."""

from __future__ import annotations

from octavo.config import EngineConfig
from octavo.distributed import TensorParallel
from octavo.engine.memory import gib
from octavo.platform import Platform
from octavo.quant.scheme import SCHEMES, WeightDType
from octavo.stages import Stages
from octavo.weights.load_report import LoadReport

__all__ = ["cache_line", "describe", "describe_weights", "without_effect"]


def describe(model_type: str, report: LoadReport, platform: Platform, ranks: int, cache: str, stages: Stages) -> list[str]:
    """One line per role and scheme, then memory, then notes. cache: the line of the KV cache."""
    which = f" in stage {stages.number} of {stages.count}" if stages.count > 1 else ""
    return [
        f"model: {model_type}, {report.total('parameters') / 1e6:,.1f} M parameters{which}, on {platform.name}",
        *describe_weights(report, platform, ranks, stages.count),
        cache,
        *(f"note: {note}" for note in report.notes),
    ]


def without_effect(config: EngineConfig, platform: Platform, tp: TensorParallel, sees: bool) -> list[str]:
    """What was asked for and changes nothing here, a sentence each. sees: whether there is a vision tower."""
    found = []
    quantizes = SCHEMES[config.quantization or "bf16"].quantized or config.quantize_lm_head
    if config.quantization_ignore and not quantizes:
        found.append("--quantization-ignore is without effect: without a --quantization every layer stays as it is stored")
    if config.cpu_kv_cache_gib is not None and not platform.is_cpu:
        found.append("--cpu-kv-cache-gib is without effect: the model runs on an accelerator; see --kv-cache-memory-bytes")
    if config.gpu_memory_utilization != EngineConfig.gpu_memory_utilization and platform.is_cpu:
        found.append("--gpu-memory-utilization is without effect: the model runs on a CPU; see --cpu-kv-cache-gib")
    if config.enable_expert_parallel and tp.size == 1:
        found.append("--enable-expert-parallel is without effect: an engine of one rank has all experts")
    if tp.whole_towers and (tp.size == 1 or not sees):
        found.append("--mm-encoder-tp-mode data is without effect: it takes several ranks and a vision tower")
    return found


def cache_line(format: str, token: int, dense_token: int, tokens: int, size: int, ranks: int) -> str:
    """The line of the KV cache. token, dense_token: bytes a token, as stored and in BF16; size: bytes in all, of a rank."""
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    part = f"{100 * token / dense_token:.1f}% of BF16's"
    return f"KV cache: {format}, {token} bytes a token ({part}), {tokens:,} tokens in {gib(size)}{each}"


def describe_weights(report: LoadReport, platform: Platform, ranks: int = 1, stages: int = 1) -> list[str]:
    """One line per role and scheme, then the total size. Rank 0 reports its own, of the ranks of a stage the largest."""
    where = "" if ranks == 1 else f" on rank 0 of {ranks}"
    width, wide = max(10, *(len(role) for role, _ in report.groups)), max(9, *(len(scheme) for _, scheme in report.groups))
    lines = [
        f"  {role:<{width}} {scheme:<{wide}} {g.dense / 2e6:>10,.2f} M  {gib(g.stored):>11}"
        for (role, scheme), g in sorted(report.groups.items())
        if g.stored  # a tied head is stored elsewhere
    ]
    if where:
        lines.insert(0, f"weights{where}{', whose parts are the largest' if stages == 1 else ''}:")
    stored, dense = report.total("stored"), 2 * report.total("values")
    lines.append(f"weights: {gib(stored)} stored{where}, {100 * stored / dense:.1f}% of BF16's {gib(dense)}")
    if fp8 := report.total("dense", WeightDType.FP8):
        part = report.total("stored", WeightDType.FP8)
        lines.append(f"FP8 linears: {gib(part)}, {100 * part / fp8:.1f}% of BF16's {gib(fp8)}")
    if platform.widened_dtype is not None and report.total("held") > stored:
        kind = str(platform.widened_dtype).removeprefix("torch.")
        why = f"FP8 codes are kept as exact {kind} values here" if fp8 else f"this CPU multiplies in {kind}"
        lines.append(f"held in memory: {gib(report.total('held'))}, because {why}")
    return lines
