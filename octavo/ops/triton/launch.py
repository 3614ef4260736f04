"""How kernels are launched: overlapped with the kernel before them where the chip can, and FP8 rounding that all share.

Programmatic dependent launch (sm_90 and newer): a kernel may start while the one before it still runs, up to the point where
it needs that one's results. Every kernel here calls `wait` before it touches anything that another kernel writes or still
reads, and `release` once its successor may begin to start. Weights depend on no kernel and may be read before `wait`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kvcache import LayerCache, Views
from octavo.ops import ahead
from octavo.platform import FP8_MAX, Platform

__all__ = [
    "cache_strides",
    "codes",
    "compile_ahead",
    "configure",
    "device_units",
    "has_packed_arithmetic",
    "head_strides",
    "inline_ptx",
    "launch",
    "pipeline",
    "power_of_2",
    "registers",
    "release",
    "round_to",
    "scale_of",
    "shared_memory",
    "tiled",
    "to_fp8",
    "wait",
]

# Which device kernels are made for; until one is configured they are interpreted, as for a chip without dependent launches.
_platform = Platform(torch.device("cpu"), "sm_89", multiprocessors=132, shared_memory=227 << 10)
_compiled: set[Any] = set()  # within compile_ahead: what was compiled there


def configure(platform: Platform) -> None:
    """Settle which device this process's kernels are made for."""
    global _platform
    _platform = platform


def pipeline(stages: int) -> int:
    """Stages of a loop's pipeline: as many as are best where asynchronous copies are deep, fewer elsewhere."""
    return min(stages, _platform.pipeline_depth)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Every launch of a kernel; within compile_ahead, its compilation instead."""
    options |= {"PDL": True, "launch_pdl": True} if _platform.has_dependent_launch else {"PDL": False}
    if not ahead.is_on():
        kernel[grid](*args, **options)
    elif (key := (kernel, *map(_specialized, args), *options.items())) not in _compiled:
        _compiled.add(key)
        kernel.warmup(*args, grid=grid, **options)


@contextmanager
def compile_ahead() -> Iterator[None]:
    """The mode of `octavo.ops.ahead`. Leaving it waits for the compiler, which works on all cores."""
    _compiled.clear()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, triton.AsyncCompileMode(pool), ahead.mode():
        yield


def _specialized(x: Any) -> Any:
    """What a kernel is compiled anew for, of an argument: a tensor's dtype, and what is a multiple of 16 or one."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, tuple(x.block_shape)
    return (x == 1, x % 16, x >> 31) if isinstance(x, int) else type(x)


def device_units() -> int:
    """Multiprocessors of the device."""
    return _platform.multiprocessors


def shared_memory() -> int:
    """Bytes of a multiprocessor's memory that one program may have."""
    return _platform.shared_memory


def has_packed_arithmetic() -> bool:
    """Whether kernels may hold instructions that compute two BF16 or four FP8 values of a register at once (PTX)."""
    return _platform.bounds_registers and not _platform.is_cpu


def cache_strides(views: Views) -> tuple[int, ...]:
    """What kernels address a cache by: strides of a block; of a key's token; of a value's token, head and dimension; of the
    scales' block and token. A key's heads and dimensions are adjacent."""
    k, v, scales = views["k"], views["v"], views.get("k_scale")
    return (*k.stride()[:2], *v.stride()[1:], *(scales.stride()[:2] if scales is not None else (0, 0)))


def head_strides(cache: LayerCache) -> dict[str, int]:
    """Whether a head's own scales of keys and of values lie beside the next one's (1), or all heads have the layer's (0)."""
    return {"K_STRIDE": int(cache.k_scale.numel() > 1), "V_STRIDE": int(cache.v_scale.numel() > 1)}


def codes(cache: torch.dtype) -> dict[str, Any]:
    """What queries and probabilities become beside a cache of that dtype, and its limit: over FP8 the codes of more bits."""
    if cache not in FP8_MAX:
        return {"CODE": getattr(tl, str(cache).removeprefix("torch.")), "LIMIT": 1.0}
    dtype = _platform.fp8_dtype
    return {"CODE": tl.float8e4b8 if dtype is torch.float8_e4m3fnuz else tl.float8e4nv, "LIMIT": FP8_MAX[dtype]}


def inline_ptx() -> bool:
    """Whether kernels may hold instructions of NVIDIA's assembly."""
    return _platform.bounds_registers and not triton.knobs.runtime.interpret


def registers(most: int) -> dict[str, int]:
    """The launch option that bounds a thread's registers, so that more programs share a multiprocessor (NVIDIA's compiler)."""
    return {"maxnreg": most} if _platform.bounds_registers and most < 255 else {}


def tiled(x: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> TensorDescriptor:
    """Contiguous x as a matrix that kernels load tile by tile: on sm_90 and newer its copy engine does."""
    return TensorDescriptor(x, list(shape), [shape[1], 1], list(tile))


def power_of_2(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on the results of earlier kernels may be read, and what they read may be overwritten."""
    if PDL:
        gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """The next kernel may start as multiprocessors fall free; it still waits for this one's results."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def scale_of(most, LIMIT: tl.constexpr, FLOOR: tl.constexpr):
    """The scale that gives a largest magnitude of `most` the largest code."""
    return tl.maximum(tl.div_rn(most, LIMIT), FLOOR)


@triton.jit
def to_fp8(x, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """x clamped to the codes' range and rounded to nearest even; NaN stays NaN."""
    return tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """FP32 x with the precision of `dtype`: where the reference stores a value, it is rounded."""
    return x.to(dtype).to(tl.float32)
