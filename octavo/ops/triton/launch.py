"""Launching kernels, with programmatic dependent launch where the device has it; and the FP8 rounding that all kernels share.

Programmatic dependent launch (sm_90 and newer): a kernel may start while its predecessor still runs, up to the point where it
needs the predecessor's results. Every kernel here calls `wait` before it touches memory that another kernel writes or may still
read, and `release` as soon as its successor may start. Weights depend on no kernel, so they may be read before `wait`.
"""

from __future__ import annotations

import atexit
import ctypes.util
import importlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kvcache import LayerCache, Views
from octavo.ops import ahead
from octavo.platform import FP8_MAX, Platform, threads_on

__all__ = [
    "Elsewhere",
    "cache_strides",
    "codes",
    "compile_ahead",
    "compile_elsewhere",
    "configure",
    "describe_device",
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
    "with_launcher",
]

log = logging.getLogger(__name__)

# The device that kernels are compiled for. The default is for interpreted kernels: a device without dependent launch.
_platform = Platform(torch.device("cpu"), "sm_89", multiprocessors=132, shared_memory=227 << 10)
_elsewhere: Elsewhere | None = None  # what compiles for this process
_compiled: set[Any] = set()  # specializations compiled within compile_ahead


def configure(platform: Platform) -> None:
    """Set the device that this process's kernels are compiled for."""
    global _platform
    _platform = platform
    if not platform.is_cpu and not platform.is_described:
        threading.Thread(target=triton_key, name="octavo-triton-key", daemon=True).start()  # needed later, and kept


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
    if ahead.collects():
        with _Collecting(), ahead.mode():
            yield
        return
    if _elsewhere is not None:
        with _compiled_elsewhere(_elsewhere), ahead.mode():
            yield
        return
    pools = threads_on(_platform.device, len(os.sched_getaffinity(0)), "octavo-compile")
    with pools as pool, triton.AsyncCompileMode(_Compiler(pool)), ahead.mode():
        yield


class Elsewhere(Protocol):
    """What compiles in another process, with this process's caches."""

    def submit(self, module: str, name: str, specialization: str) -> Future[None]:
        """Has the kernel `name` of `module` compiled; `specialization` is as JITFunction.preload takes it."""

    def finish(self) -> None:
        """Called at the end of each compile_ahead, when all that was submitted is done."""


def compile_elsewhere(compiler: Elsewhere | None) -> None:
    """From now on compile_ahead leaves the work to `compiler`; to this process's threads, if it is None."""
    global _elsewhere
    _elsewhere = compiler


@contextmanager
def _compiled_elsewhere(compiler: Elsewhere) -> Iterator[None]:
    """Within this context kernels are sent away in place of being compiled. They are loaded when they are first launched."""
    sent: list[Future[None]] = []

    def send(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if not ahead.is_on():  # another thread launches
            return False
        sent.append(compiler.submit(fn.module, fn.name, compile["specialization_data"]))
        return True  # so that Triton compiles nothing

    runtime = triton.knobs.runtime
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, send
    try:
        yield
    finally:
        runtime.jit_cache_hook = before
    if errors := [error for job in sent if (error := job.exception()) is not None]:
        log.warning("%d kernels are compiled when they are first launched: %s", len(errors), errors[0])
    compiler.finish()


class _Compiler(Executor):
    """Compiles in a pool's threads, together with the function that launches the kernel: Triton would have the C compiler build
    that at the first launch, one kernel after another.
    """

    def __init__(self, pool: Executor):
        self.pool = pool

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.pool.submit(_ready, fn)


class _Collecting(triton.AsyncCompileMode):  # type: ignore[misc]
    """Compiles nothing: a job is collected for each kernel."""

    def __init__(self) -> None:
        super().__init__(None)

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> None:
        ahead.collect(key, partial(with_launcher, compile_fn))


def _ready(compiled: Callable[[], Any]) -> Any:
    """The kernel, loaded into the device's memory."""
    kernel = compiled()
    assert callable(kernel.run)  # a property that builds the launcher and loads
    return kernel


def with_launcher(compiled: Callable[[], Any]) -> None:
    """A kernel and its launcher in Triton's cache. Nothing is loaded."""
    kernel = compiled()
    _in_cache(lambda: driver.active.launcher_cls(kernel.src, kernel.metadata))


def _in_cache(build: Callable[[], object]) -> None:
    """Has Triton build a C module, which it keeps before it loads it; the latter fails where no driver is installed."""
    try:
        build()
    except ImportError as error:
        log.debug("built and not loaded: %s", error)
    except RuntimeError as error:  # HIP's library, whose path is in the source, is not here
        log.warning("not built: %s", error)


class _DescribedDriver:
    """What Triton asks of a device that is not here."""

    def __init__(self, target: GPUTarget, launcher: type):
        self.target, self.launcher_cls = target, launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def _empty_library(name: str) -> str:
    """The directory of a library without symbols, for the linker, where the one of the driver is not installed."""
    directory = tempfile.mkdtemp(prefix="octavo-link-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    words = [os.environ.get("CC", "cc"), "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", f"{directory}/{name}"]
    subprocess.run(words, check=True)
    return directory


def describe_device(platform: Platform) -> Callable[[], None]:
    """Has Triton compile for a device that is not here: what is kept in its cache is found where `platform` is.

    Returns what builds the C module that Triton itself launches by.
    """
    hip = platform.arch.startswith("gfx")
    target = GPUTarget("hip", platform.arch, 64) if hip else GPUTarget("cuda", int(platform.arch.removeprefix("sm_")), 32)
    if not hip and ctypes.util.find_library("cuda") is None:
        triton.knobs.nvidia.libcuda_path = _empty_library("libcuda.so.1")
    name = "amd" if hip else "nvidia"
    vendor = importlib.import_module(f"triton.backends.{name}.driver")
    driver.set_active(_DescribedDriver(target, vendor.HIPLauncher if hip else vendor.CudaLauncher))
    return partial(_in_cache, vendor.HIPUtils if hip else vendor.CudaUtils)


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
