"""The number of KV cache blocks that fit into memory, and the errors when too few do."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.platform import Platform

__all__ = ["CacheBudget", "cache_room", "check_weights", "gib", "length_held", "plan_blocks"]

GIB = 1 << 30
CPU_DEFAULT_GIB = 4.0


def gib(count: float) -> str:
    """Bytes in a readable unit: 1.50 GiB, 12.3 MiB, 4.0 KiB."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if count >= size / 10:
            return f"{count / size:.{2 if size == GIB else 1}f} {unit}"
    return f"{count / 1024:.1f} KiB"


@dataclass(frozen=True)
class CacheBudget:
    """The number of KV cache blocks, and the longest request that they hold."""

    num_blocks: int
    max_model_len: int
    notes: tuple[str, ...] = ()


def check_weights(platform: Platform, matrix_values: int, packed_bytes: int = 0, *, fp8: bool) -> None:
    """Raises OctavoError, before any weight is read, if the matrices cannot fit even without a cache.

    packed_bytes: of packed INT4, whose values are not among `matrix_values`.
    """
    free, _ = platform.memory()
    itemsize = platform.widened_dtype.itemsize if platform.widened_dtype else 1 if fp8 else 2
    if (needed := matrix_values * itemsize + packed_bytes) <= free:
        return
    smaller = "" if fp8 or platform.is_cpu else "use --quantization ptpc_fp8 (half of the bytes), "
    more = "a machine with more memory" if platform.is_cpu else "--tensor-parallel-size to split it over more accelerators"
    raise OctavoError(
        f"the weights alone would take {gib(needed)} of memory ({itemsize} byte(s) a value here), and {gib(free)} is free: "
        f"{smaller}use a smaller model, free some memory, or use {more}."
    )


def cache_room(config: EngineConfig, platform: Platform, working_bytes: int) -> float:
    """Bytes left for the cache on `platform`, whose memory already holds the model; negative if the model took too much."""
    if config.kv_cache_memory_bytes is not None:
        return float(config.kv_cache_memory_bytes)
    free, total = platform.memory()
    if platform.is_cpu:  # whose ranks share its memory
        room = config.cpu_kv_cache_gib * GIB if config.cpu_kv_cache_gib else min(CPU_DEFAULT_GIB * GIB, free / 2)
        return room / config.devices_here
    return total * config.gpu_memory_utilization - (total - free) - working_bytes


def length_held(
    config: EngineConfig, platform: Platform, bytes_per_token: int, wanted: int, fp8_bytes_per_token: int | None = None
) -> int:
    """The part of `wanted` tokens that a cache could hold if the model took no memory, so that the model is not made for more.

    Raises OctavoError if the user asked for a longer length, or on a CPU for a larger cache than memory is free.
    """
    block_size = config.block_size_on(platform.is_cpu)
    most = int(cache_room(config, platform, 0) // (bytes_per_token * block_size)) * block_size
    if most > 0:
        tokens = min(most, -(-wanted // block_size) * block_size * config.max_num_seqs)
        _check_cpu_cache(config, platform, tokens * bytes_per_token)
    if 0 < most < wanted and config.max_model_len is not None:
        plan_blocks(config, platform, bytes_per_token, wanted, 0, 0, None, fp8_bytes_per_token)
    return min(wanted, max(most, 1))


def plan_blocks(
    config: EngineConfig,
    platform: Platform,
    bytes_per_token: int,
    model_len: int,
    model_bytes: int,
    working_bytes: int,
    most: int | None = None,
    fp8_bytes_per_token: int | None = None,
    image_bytes: int = 0,
) -> CacheBudget:
    """Computes the number of blocks for `config` on `platform`, whose memory already holds the model.

    bytes_per_token: summed over layers. model_len: the wanted length. working_bytes: workspace of a step beside weights and
    cache. most: the length that the model was made for, where `length_held` lowered it. fp8_bytes_per_token: bytes_per_token
    with --kv-cache-dtype fp8; None: half of bytes_per_token. image_bytes: of the working_bytes, what images take.
    Raises OctavoError, with numbers and three remedies, where not even one request of `model_len` fits. If the length came from
    the model and not from the user, it is lowered instead and a note says so.
    """
    have, total = cache_room(config, platform, working_bytes), platform.memory()[1]
    block_size = config.block_size_on(platform.is_cpu)
    block_bytes = bytes_per_token * block_size
    blocks = _asked_blocks(config, int(have // block_bytes), block_bytes)
    _check_asked_bytes(config, platform, have, working_bytes)
    if config.num_gpu_blocks_override is not None:
        have = float(blocks * block_bytes)
    needed = -(-model_len // block_size)
    useful = needed * config.max_num_seqs  # more blocks could never be in use at once
    most = model_len if most is None else most
    _check_cpu_cache(config, platform, min(blocks, useful) * block_bytes)
    if config.num_gpu_blocks_override is not None:
        useful = blocks
    if blocks >= needed and model_len <= most:
        return CacheBudget(min(blocks, useful), model_len)
    fits = min(max(blocks, 0) * block_size, most)
    if config.max_model_len is None and fits >= min(2048, model_len):
        note = f"max_model_len lowered from {model_len} to {fits}: that is what {gib(have)} of KV cache holds"
        return CacheBudget(blocks, fits, (note,))
    smaller = _smaller(config, bytes_per_token, bytes_per_token // 2 if fp8_bytes_per_token is None else fp8_bytes_per_token)
    fewer = (
        f"lower --max-model-len to {fits}" if fits else f"use a smaller model or quantization (weights take {gib(model_bytes)})"
    )
    images = ""
    if have + image_bytes >= needed * block_bytes > have and not platform.is_cpu:
        now = config.encoder_cache_bytes(platform.is_cpu) / GIB
        images = f"lower --mm-processor-cache-gb (now {now:g}; images take {gib(image_bytes)}), use --language-model-only, "
    raise OctavoError(
        f"one request of {model_len} tokens needs {gib(needed * block_bytes)} of KV cache, but {gib(max(have, 0))} "
        f"of {gib(total)} is left for it: {images}{fewer}, {smaller}, or {_larger(config, platform, have)}."
    )


def _larger(config: EngineConfig, platform: Platform, have: float) -> str:
    """The remedy that makes the cache larger; `have`: its bytes now."""
    if config.num_gpu_blocks_override is not None:
        return f"raise --num-gpu-blocks-override (now {config.num_gpu_blocks_override})"
    if config.kv_cache_memory_bytes is not None:
        return f"raise --kv-cache-memory-bytes (now {config.kv_cache_memory_bytes})"
    if platform.is_cpu:
        return f"raise --cpu-kv-cache-gib (now {have * config.devices_here / GIB:.2f})"  # of all ranks
    return f"raise --gpu-memory-utilization (now {config.gpu_memory_utilization:g}) or --tensor-parallel-size"


def _asked_blocks(config: EngineConfig, fit: int, block_bytes: int) -> int:
    """The blocks of --num-gpu-blocks-override, or those that fit. Raises OctavoError where it asks for more than fit."""
    asked = config.num_gpu_blocks_override
    if asked is not None and asked > fit:
        raise OctavoError(
            f"--num-gpu-blocks-override {asked} asks for {gib(asked * block_bytes)} of KV cache, and {max(fit, 0)} blocks fit "
            "into the memory that is left: lower it, or leave it out."
        )
    return fit if asked is None else asked


def _check_asked_bytes(config: EngineConfig, platform: Platform, asked: float, working_bytes: int) -> None:
    """Raises OctavoError for --kv-cache-memory-bytes where so much is not free."""
    free = platform.memory()[0] / (config.devices_here if platform.is_cpu else 1) - working_bytes
    if config.kv_cache_memory_bytes is not None and asked > free:
        raise OctavoError(
            f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes} is {gib(asked)}, and {gib(max(free, 0))} is free beside "
            "weights and activations: lower it."
        )


def _check_cpu_cache(config: EngineConfig, platform: Platform, cache_bytes: int) -> None:
    """Raises OctavoError for --cpu-kv-cache-gib where the cache of so many bytes is more than the memory that is free."""
    free, _ = platform.memory()
    cache_bytes *= config.devices_here  # whose parts are all in this memory
    if platform.is_cpu and config.cpu_kv_cache_gib is not None and cache_bytes > free:
        raise OctavoError(
            f"--cpu-kv-cache-gib {config.cpu_kv_cache_gib:g} makes a KV cache of {gib(cache_bytes)}, and {gib(max(free, 0))} "
            f"is free: lower it, or lower --max-num-seqs (now {config.max_num_seqs}) or --max-model-len."
        )


def _smaller(config: EngineConfig, now: int, fp8: int) -> str:
    """The remedy that makes a token's cache smaller; a token takes `now` bytes, and `fp8` with --kv-cache-dtype fp8."""
    if config.kv_cache_dtype.startswith("fp8") or fp8 >= now:
        return "free some memory"
    return f"use --kv-cache-dtype fp8 ({'half' if 2 * fp8 == now else f'{100 * fp8 / now:.0f}%'} of it)"
