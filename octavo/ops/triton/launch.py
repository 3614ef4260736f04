"""How kernels are launched: overlapped with the kernel before them where the chip can, and FP8 rounding that all share.

Programmatic dependent launch (sm_90 and newer): a kernel may start while the one before it still runs, up to the point where
it needs that one's results. Every kernel here calls `wait` before it touches anything that another kernel writes or still
reads, and `release` once its successor may begin to start. Weights depend on no kernel and may be read before `wait`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from octavo.kvcache import Views
from octavo.platform import Platform

__all__ = [
    "cache_strides",
    "configure",
    "device_units",
    "overlap",
    "pipeline",
    "power_of_2",
    "release",
    "round_to",
    "shared_memory",
    "to_fp8",
    "wait",
]

_overlap: dict[str, Any] = {"PDL": False}
_units = 132
_stages = 8
_shared = 227 << 10


def configure(platform: Platform, *, dependent: bool, stages: int) -> None:
    """Settle, once, what this process's device can do: dependent launches, and how deep a pipeline may be."""
    global _overlap, _units, _stages, _shared
    _overlap = {"PDL": True, "launch_pdl": True} if dependent else {"PDL": False}
    _stages = stages
    if platform.device.type != "cpu":
        properties = driver.active.utils.get_device_properties(platform.device.index or 0)
        _units, _shared = properties["multiprocessor_count"], properties["max_shared_mem"]


def pipeline(stages: int) -> int:
    """Stages of a loop's pipeline: as many as are best where asynchronous copies are deep, fewer elsewhere."""
    return min(stages, _stages)


def overlap() -> dict[str, Any]:
    """Launch options of every kernel."""
    return _overlap


def device_units() -> int:
    """Multiprocessors of the device."""
    return _units


def shared_memory() -> int:
    """Bytes of a multiprocessor's memory that one program may have."""
    return _shared


def cache_strides(views: Views) -> tuple[int, ...]:
    """What kernels address a cache by: strides of a block; of a key's token; of a value's token, head and dimension; of the
    scales' block and token. A key's heads and dimensions are adjacent."""
    k, v, scales = views["k"], views["v"], views.get("k_scale")
    return (*k.stride()[:2], *v.stride()[1:], *(scales.stride()[:2] if scales is not None else (0, 0)))


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
def to_fp8(x, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """x clamped to the codes' range and rounded to nearest even; NaN stays NaN."""
    return tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """FP32 x with the precision of `dtype`: where the reference stores a value, it is rounded."""
    return x.to(dtype).to(tl.float32)
