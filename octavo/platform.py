"""The platform: device, architecture, FP8 dtype and capabilities. Other modules ask it and not torch or the driver."""

from __future__ import annotations

import ctypes
import logging
import os
import platform as host
import runpy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

import torch

from octavo.errors import OctavoError
from octavo.host import memory as host_memory
from octavo.host import release

__all__ = ["FP8_MAX", "Described", "Platform", "capture", "check_fp8_units", "cpu_kernels", "detect", "threads_on"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# The magnitude that codes are clamped to. e4m3fnuz reaches 240, but 224 keeps accuracy on gfx942.
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 224.0, torch.float8_e5m2: 57344.0}


NO_FP8 = ("gfx8", "gfx90", "gfx10", "gfx11")  # as architectures begin: up to CDNA 2, and RDNA 1 to 3
KFD = Path("/dev/kfd")  # through which HIP reaches AMD's GPUs


@dataclass(frozen=True)
class Platform:
    """One rank's device and its capabilities. A plain value, which tests construct themselves."""

    device: torch.device
    arch: str  # "sm_90", "gfx942", or the CPU's instruction set as torch sees it
    fp8_dtype: torch.dtype = torch.float8_e4m3fn
    fp8_alignment: int = 16  # FP8 tensor cores need dimensions that are multiples of this
    widened_dtype: torch.dtype | None = None  # without FP8 arithmetic, codes are held as exact values of this dtype
    multiprocessors: int = 0  # 0 on a CPU
    shared_memory: int = 0  # bytes per CTA

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_described(self) -> bool:
        """Whether its tensors have no memory, so that nothing can run."""
        return self.device.type == "meta"

    @cached_property
    def _capability(self) -> int:
        """The major compute capability; 0 on other architectures."""
        return int(self.arch.removeprefix("sm_")[:-1]) if self.arch.startswith("sm_") else 0

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may start while the one before it still runs (programmatic dependent launch)."""
        return self._capability >= 9

    @property
    def has_warpgroup_mma(self) -> bool:
        """Whether the device has WGMMA, the MMA of a warp group, which only sm_90 has."""
        return self.arch == "sm_90"

    @property
    def pipeline_depth(self) -> int:
        """Software pipeline stages of a loop: many where copies are asynchronous, two where they go through registers."""
        return 8 if self._capability >= 8 else 2

    @property
    def bounds_registers(self) -> bool:
        """Whether the compiler accepts a limit on registers per thread."""
        return self._capability > 0

    @cached_property
    def name(self) -> str:
        if self.is_cpu:
            threads = torch.get_num_threads()
            return f"CPU ({self.arch}, {threads} thread{'s' if threads > 1 else ''})"
        return f"{torch.cuda.get_device_name(self.device)} ({self.arch})"

    def memory(self) -> tuple[int, int]:
        """Free and total memory of the device in bytes."""
        if not self.is_cpu:
            free, total = torch.cuda.mem_get_info(self.device)
            return int(free), int(total)
        return host_memory()

    def described(self) -> Described:
        """This device, for a process that has none."""
        free, total = self.memory()
        own = {one.name: getattr(self, one.name) for one in fields(Platform) if one.name != "device"}
        return Described(torch.device("meta"), **own, free=free, total=total)

    def release(self) -> None:
        """Returns freed memory, which torch or the C library caches, to the device and the host."""
        if not self.is_cpu:
            torch.cuda.empty_cache()
        release()


@dataclass(frozen=True)
class Described(Platform):
    """A device as `detect` would find it, with tensors on the meta device. free, total: bytes of its memory."""

    free: int = 0
    total: int = 0

    def memory(self) -> tuple[int, int]:
        return self.free, self.total

    def release(self) -> None: ...


def threads_on(device: torch.device, count: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads whose current device is `device`. A new thread's is the first one, where other ranks' memory is."""
    if device.type in ("cpu", "meta"):
        return ThreadPoolExecutor(count, name)
    return ThreadPoolExecutor(count, name, torch.accelerator.set_device_index, (device.index or 0,))


def capture(fn: Callable[[], T], pool: object = None) -> tuple[Callable[[], None], T, object]:
    """A CUDA or HIP graph of the launches of `fn`; see `octavo.ops.capture`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
        out = fn()
    return graph.replay, out, graph.pool()


def detect(device: str = "auto", rank: int = 0, ranks: int = 1) -> Platform:
    """The Platform of one of `ranks` ranks on this machine.

    Raises OctavoError where `device` is asked for and is not there, and for more ranks than there are accelerators.
    """
    if device != "cpu" and not torch.cuda.is_available():
        _check_kfd()
    if device == "cuda" and not torch.cuda.is_available():
        raise OctavoError(
            "--device cuda: torch sees no accelerator here; use --device cpu, or install torch for this accelerator."
        )
    if device == "cpu" or not torch.cuda.is_available():
        return _cpu()
    if ranks > (count := torch.cuda.device_count()):
        raise OctavoError(
            f"{ranks} ranks are to run here (--tensor-parallel-size, --pipeline-parallel-size, --data-parallel-size), and "
            f"{count} accelerator(s) are seen (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES); use fewer."
        )
    props = torch.cuda.get_device_properties(rank)
    shared = getattr(props, "shared_memory_per_block_optin", props.shared_memory_per_block)  # some vendors need an opt-in
    found = Platform(
        torch.device("cuda", rank),
        f"sm_{props.major}{props.minor}",
        multiprocessors=props.multi_processor_count,
        shared_memory=shared,
    )
    if torch.version.hip is None:
        check_fp8_units(props.name, found.arch)
        return found
    arch = props.gcnArchName.split(":")[0]
    check_fp8_units(props.name, arch)
    return replace(found, arch=arch, fp8_dtype=torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn)


def _check_kfd() -> None:
    """Raises OctavoError where an AMD GPU is there and this user may not open it, as a container's often may not.

    HIP says of it only that there is no device, and a server would then run on the CPU.
    """
    if torch.version.hip is not None and KFD.exists() and not os.access(KFD, os.R_OK | os.W_OK):
        group = KFD.stat().st_gid
        raise OctavoError(
            f"{KFD} may not be opened by this user; put it into the group {group} (docker run --group-add {group}), "
            "or use --device cpu."
        )


def check_fp8_units(name: str, arch: str) -> None:
    """Raises OctavoError for an accelerator whose architecture has no FP8 units."""
    kind, _, version = arch.partition("_")
    if int(version) < 89 if kind == "sm" else arch.startswith(NO_FP8):
        raise OctavoError(f"{name} ({arch}) has no FP8 units; Octavo needs gfx942, sm_89 or newer, or --device cpu.")


def _cpu() -> Platform:
    kernels = cpu_kernels()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if isinstance(kernels, ctypes.CDLL):
        return Platform(torch.device("cpu"), capability)
    log.warning("no CPU kernels: %s; FP8 codes are kept widened and multiplied by torch", kernels)
    # Without BF16 instructions a BF16 product runs at a tenth of FP32's speed. Both dtypes hold an FP8 code exactly.
    native_bf16 = host.machine() == "x86_64" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Platform(torch.device("cpu"), capability, widened_dtype=torch.bfloat16 if native_bf16 else torch.float32)


@cache
def cpu_kernels() -> ctypes.CDLL | str:
    """The C kernels of ops/cpu, or why there are none.

    They are compiled when Octavo is installed. If the sources have changed since, or none were compiled, they are compiled
    here, beside the sources or else in the user's cache.
    """
    directory = Path(__file__).parent / "ops" / "cpu"
    builder = runpy.run_path(str(directory / "build.py"))  # a script: an installer runs it before Octavo can be imported
    places = [place / builder["library_name"]() for place in (directory, Path.home() / ".cache" / "octavo")]
    found = next((path for path in places if path.exists()), None)
    reason = ""
    for path in places if found is None else ():
        if (reason := builder["build"](path.parent)) is None:
            found = path
            break
    if found is None:
        return reason
    try:
        return ctypes.CDLL(str(found))
    except OSError as error:
        return f"{found} cannot be loaded ({error})"
