"""The settings of a server, under vLLM's names and as flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from octavo.config import EngineConfig, flag_of
from octavo.messages import EngineInfo

__all__ = ["cache_config", "flags_of", "vllm_config"]


def flags_of(config: EngineConfig) -> str:
    """The flags that were given."""
    given = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    return " ".join(f"{flag_of(name)} {value}" for name, value in given)


def vllm_config(config: EngineConfig, info: EngineInfo, names: Sequence[str]) -> dict[str, Any]:
    """The settings under vLLM's names, and all of Octavo's."""
    return {
        "model_config": {
            "model": config.model,
            "served_model_name": list(names),
            "dtype": config.dtype,
            "quantization": config.quantization,
            "max_model_len": info.max_model_len,
            "seed": config.seed,
            "enforce_eager": config.enforce_eager,
        },
        "cache_config": cache_config(config, info),
        "parallel_config": {
            "tensor_parallel_size": config.tensor_parallel_size,
            "data_parallel_size": config.data_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "enable_expert_parallel": config.enable_expert_parallel,
        },
        "scheduler_config": {
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "enable_chunked_prefill": True,
        },
        "octavo_config": dataclasses.asdict(config),
    }


def cache_config(config: EngineConfig, info: EngineInfo) -> dict[str, Any]:
    """The KV cache under the names of vLLM's cache_config."""
    return {
        "block_size": info.block_size,
        "num_gpu_blocks": info.num_blocks,
        "cache_dtype": config.kv_cache_dtype,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": config.enable_prefix_caching,
        "kv_cache_rounding": config.kv_cache_rounding,
        "calculate_kv_scales": config.calculate_kv_scales,
    }
