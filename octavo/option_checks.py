"""What values of options may be, beside their types and spellings."""

from __future__ import annotations

from typing import Any

from octavo.errors import OctavoError
from octavo.option_values import MAX_LOGPROBS

__all__ = ["check_options"]

POSITIVE = (
    "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "pipeline_parallel_size",
    "data_parallel_size", "threads", "cpu_kv_cache_gib", "kv_cache_memory_bytes", "num_gpu_blocks_override", "rope_theta",
    "nnodes", "distributed_timeout_seconds",
)  # fmt: skip


def check_options(config: Any) -> None:
    """Raises OctavoError for a value of an EngineConfig that is out of its range, or that another one rules out."""
    if not 0 <= config.max_logprobs <= MAX_LOGPROBS:
        raise OctavoError(f"--max-logprobs must be 0 to {MAX_LOGPROBS}, the most that are served, not {config.max_logprobs}.")
    if config.mm_processor_cache_gb is not None and not 0 <= config.mm_processor_cache_gb < float("inf"):
        raise OctavoError(f"--mm-processor-cache-gb must be 0 or more, not {config.mm_processor_cache_gb}.")
    if config.decode_activations == "bf16" and config.quantization in ("fp8_block", "fp8_w8a16"):
        why = "leaves no activations in FP8" if config.quantization == "fp8_w8a16" else "has no product for them"
        raise OctavoError(f"--decode-activations bf16 is for ptpc_fp8 and fp8, and {config.quantization} {why}; leave it out.")
    if config.save_quantized == "":
        raise OctavoError("--save-quantized needs the name of a directory that does not exist yet.")
    if config.save_quantized is not None and config.quantization in (None, "bf16"):
        raise OctavoError("--save-quantized needs a --quantization such as ptpc_fp8: it saves what that makes.")
    if config.calibrate is not None and config.save_quantized is None:
        raise OctavoError("--calibrate is for --save-quantized DIR, which keeps what it makes; give that too, or leave it out.")
    if config.save_quantized is not None and config.load_format == "dummy":
        raise OctavoError("--save-quantized saves a checkpoint's weights; --load-format dummy has none, leave one out.")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise OctavoError(f"--gpu-memory-utilization must be over 0 and at most 1, not {config.gpu_memory_utilization}.")
    for name in POSITIVE:
        if (value := getattr(config, name)) is not None and not 0 < value < float("inf"):
            raise OctavoError(f"--{name.replace('_', '-')} must be positive, not {value}.")
    _check_nodes(config)


def _check_nodes(config: Any) -> None:
    nodes, ray = config.nnodes, config.distributed_executor_backend == "ray"
    if ray and (nodes > 1 or config.node_rank):
        raise OctavoError("--nnodes is for hosts without Ray; leave it out, Ray knows its hosts.")
    if config.distributed_executor_backend == "uni" and config.num_ranks > 1:
        raise OctavoError(
            f"--distributed-executor-backend uni is for one rank, and the engine has {config.num_ranks} "
            "(--tensor-parallel-size times --pipeline-parallel-size); give mp, or leave it out."
        )
    if not 0 <= config.node_rank < nodes:
        raise OctavoError(f"--node-rank must be 0 to {nodes - 1}, below --nnodes {nodes}, not {config.node_rank}.")
    if not 0 < config.master_port < 65536:
        raise OctavoError(f"--master-port must be 1 to 65535, not {config.master_port}.")
    if nodes > 1 and config.num_ranks % nodes:
        raise OctavoError(
            f"--nnodes {nodes} does not divide the engine's {config.num_ranks} ranks (--tensor-parallel-size times "
            "--pipeline-parallel-size), of which each host has as many."
        )
    if nodes > 1 and config.data_parallel_size > 1:
        raise OctavoError(
            "--data-parallel-size is of one host; start a server for each group of --nnodes hosts, or octavo.ray_serve."
        )
    if (nodes > 1 or ray) and config.save_quantized is not None:
        raise OctavoError(
            "--save-quantized writes to one host's disk; write the checkpoint with octavo quantize, and copy it to all hosts."
        )
