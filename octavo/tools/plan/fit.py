"""What fits beside the weights: the budget of octavo.engine.memory and octavo.engine.runner, before there is an engine."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.tools.plan.accelerators import GIB, Accelerator
from octavo.tools.plan.shapes import Model

__all__ = ["CONTEXT_BYTES", "Fit", "fit", "working_bytes"]

CONTEXT_BYTES = GIB // 2  # a driver's context and its libraries on each accelerator; an assumption
CPU_DEFAULT_GIB = 4.0  # octavo.engine.memory.CPU_DEFAULT_GIB
SHORTEST = 2048  # the engine lowers a length that nobody asked for, but not under this


@dataclass(frozen=True)
class Fit:
    """One rank's memory. weights, room, cache: bytes; room is what is left for the cache, cache what the engine takes of it.

    tokens: that the room holds; requests: of the length wanted, at a time. max_model_len: the longest request that the
    engine would take: the length wanted, a lowered one, or 0 where it would refuse.
    """

    weights: int
    room: int
    cache: int
    tokens: int
    requests: float
    max_model_len: int


def working_bytes(config: EngineConfig, model: Model, on: Accelerator) -> int:
    activations = config.step_tokens_on(on.is_cpu) * (4 * model.intermediate_size + 8 * model.hidden_size) * 4
    return activations + config.sampling_bytes(model.vocab_size)


def fit(config: EngineConfig, model: Model, on: Accelerator, weights: int, token_bytes: int) -> Fit:
    """What one rank holds: `weights` bytes, and a cache of `token_bytes` a token."""
    if on.is_cpu:
        free = on.free - weights
        room = int(
            min(config.cpu_kv_cache_gib * GIB, free) if config.cpu_kv_cache_gib else min(CPU_DEFAULT_GIB * GIB, free / 2)
        )
    else:
        room = int(on.memory * config.gpu_memory_utilization) - CONTEXT_BYTES - weights - working_bytes(config, model, on)
    length = config.max_model_len or model.max_model_len
    block = token_bytes * config.block_size_on(on.is_cpu)
    blocks, needed = max(room, 0) // block, -(-length // config.block_size_on(on.is_cpu))
    tokens = blocks * config.block_size_on(on.is_cpu)
    requests = tokens / length
    if blocks < needed:
        lowered = config.max_model_len is None and tokens >= min(SHORTEST, length)
        length = tokens if lowered else 0
    cache = min(blocks, needed * config.max_num_seqs) * block if length else 0
    return Fit(weights, max(room, 0), cache, tokens, requests, length)
