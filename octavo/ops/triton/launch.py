"""Launching kernels, with programmatic dependent launch where the device has it; and the FP8 rounding that all kernels share.

Programmatic dependent launch (sm_90 and newer): a kernel may start while its predecessor still runs, up to the point where it
needs the predecessor's results. Every kernel here calls `wait` before it touches memory that another kernel writes or may still
read, and `release` as soon as its successor may start. Weights depend on no kernel, so they may be read before `wait`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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
from octavo.platform import FP8_MAX, Platform, threads_on

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

# The device that kernels are compiled for. The default is for interpreted kernels: a device without dependent launch.
_platform = Platform(torch.device("cpu"), "sm_89", multiprocessors=132, shared_memory=227 << 10)
_compiled: set[Any] = set()  # specializations compiled within compile_ahead


def configure(platform: Platform) -> None:
    """Set the device that this process's kernels are compiled for."""
    global _platform
    _platform = platform


def pipeline(stages: int) -> int:
    """Pipeline stages of a loop: `stages` where asynchronous copies are deep, fewer on other devices."""
    return min(stages, _platform.pipeline_depth)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel; within compile_ahead, compile it instead."""
    options |= {"PDL": True, "launch_pdl": True} if _platform.has_dependent_launch else {"PDL": False}
    if not ahead.is_on():
        kernel[grid](*args, **options)
    elif (key := (kernel, *map(_specialized, args), *options.items())) not in _compiled:
        _compiled.add(key)
        kernel.warmup(*args, grid=grid, **options)


@contextmanager
def compile_ahead() -> Iterator[None]:
    """The mode of `octavo.ops.ahead`. On exit it waits for the compilations, which use all cores."""
    _compiled.clear()
    pools = threads_on(_platform.device, len(os.sched_getaffinity(0)), "octavo-compile")
    with pools as pool, triton.AsyncCompileMode(pool), ahead.mode():
        yield


def _specialized(x: Any) -> Any:
    """The part of an argument that Triton specializes a kernel on: a tensor's dtype and alignment; an int's divisibility by 16
    and whether it is 1.
    """
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, tuple(x.block_shape)
    return (x == 1, x % 16, x >> 31) if isinstance(x, int) else type(x)


def device_units() -> int:
    """Number of multiprocessors (SMs) of the device."""
    return _platform.multiprocessors


def shared_memory() -> int:
    """Bytes of shared memory available to one CTA."""
    return _platform.shared_memory


def has_packed_arithmetic() -> bool:
    """Whether kernels may use PTX instructions on two BF16 or four FP8 values packed in a register."""
    return _platform.bounds_registers and not _platform.is_cpu


def cache_strides(views: Views) -> tuple[int, ...]:
    """Strides by which kernels address a cache: of a block; of a key's token; of a value's token, head and dimension; of the
    scales' block, token and head. A key's heads and dimensions are contiguous.
    """
    k, v, scales = views["k"], views["v"], views.get("k_scale")
    return (*k.stride()[:2], *v.stride()[1:], *(scales.stride() if scales is not None else (0, 0, 0)))


def head_strides(cache: LayerCache) -> dict[str, int]:
    """Stride between heads of the layer's KV scales: 1 for per-head scales, 0 for one scale per layer."""
    return {"K_STRIDE": int(cache.k_scale.numel() > 1), "V_STRIDE": int(cache.v_scale.numel() > 1)}


def codes(cache: torch.dtype) -> dict[str, Any]:
    """The operand dtype of queries and probabilities for a cache of this dtype, and its limit. Over FP8 it is the E4M3 format,
    which has more mantissa bits.
    """
    if cache not in FP8_MAX:
        return {"CODE": getattr(tl, str(cache).removeprefix("torch.")), "LIMIT": 1.0}
    dtype = _platform.fp8_dtype
    return {"CODE": tl.float8e4b8 if dtype is torch.float8_e4m3fnuz else tl.float8e4nv, "LIMIT": FP8_MAX[dtype]}


def inline_ptx() -> bool:
    """Whether kernels may contain inline PTX."""
    return _platform.bounds_registers and not triton.knobs.runtime.interpret


def registers(most: int) -> dict[str, int]:
    """The launch option that limits registers per thread, so that more CTAs share an SM (NVIDIA only)."""
    return {"maxnreg": most} if _platform.bounds_registers and most < 255 else {}


def tiled(x: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> TensorDescriptor:
    """A tensor descriptor of contiguous x as a matrix that kernels load by tiles; TMA loads them on sm_90 and newer."""
    return TensorDescriptor(x, list(shape), [shape[1], 1], list(tile))


def power_of_2(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the previous kernel: after this, its results may be read and its inputs overwritten."""
    if PDL:
        gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Allow the next kernel to start on free SMs; it still waits for this kernel's results in its own `wait`."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def scale_of(most, LIMIT: tl.constexpr, FLOOR: tl.constexpr):
    """The scale that maps the amax `most` to the largest code."""
    return tl.maximum(tl.div_rn(most, LIMIT), FLOOR)


@triton.jit
def to_fp8(x, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """x clamped to the codes' range and rounded to nearest even; NaN stays NaN."""
    return tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """FP32 x rounded to the precision of `dtype`, as the reference rounds where it stores a value."""
    return x.to(dtype).to(tl.float32)
