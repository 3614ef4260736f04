"""CUDA C++ compiled at run time by the NVRTC that comes with torch, and launched through the driver API.

Compiled code is kept in the user's cache directory, under a name derived from source, options and compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from octavo.ops import ahead
from octavo.platform import Platform, threads_on

__all__ = ["Kernel", "Kernels", "NoKernel", "compile_cubin", "driver", "missing", "no_warpgroups", "tensor_map"]

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
KEPT = Path.home() / ".cache" / "octavo"
SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
SWIZZLED = {64: 2, 128: 3}  # CUtensorMapSwizzle by bytes of a row
PROMOTED = 3  # L2 promotion of 256 bytes


class _Attribute(ctypes.Structure):
    _fields_ = [("id", c_int), ("padding", c_int), ("value", c_int), ("rest", c_int * 15)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", c_uint32 * 3), ("block", c_uint32 * 3), ("shared", c_uint32), ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", c_uint32),
    ]  # fmt: skip


class NoKernel(RuntimeError):
    """The compiler or the driver refused a kernel."""


@cache
def _compiler() -> ctypes.CDLL | str:
    """NVRTC, or the reason why it is not available."""
    root = Path(torch.__file__).parents[1] / "nvidia"
    major = (torch.version.cuda or "13").split(".")[0]
    found = [*root.glob(f"*/lib/libnvrtc.so.{major}"), Path(f"libnvrtc.so.{major}"), *root.glob("*/lib/libnvrtc.so.*")]
    for path in found:
        try:
            for part in path.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC loads it by name alone
                ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return f"there is no libnvrtc.so.{major}"


def missing() -> str | None:
    """None, or the reason why nothing can be compiled."""
    found = _compiler()
    return found if isinstance(found, str) else None


def no_warpgroups(platform: Platform) -> str | None:
    """None, or the reason why kernels with WGMMA cannot be compiled or run on this platform."""
    if platform.has_warpgroup_mma:
        return missing()
    return f"{platform.arch} has no matrix instructions of a group of warps as sm_90 has them"


def compile_cubin(name: str, arch: str, options: dict[str, int | float]) -> bytes:
    """Compile csrc/`name` for `arch` ("sm_90") to a cubin, with each option defined as a macro; empty where jobs are collected.

    Raises NoKernel with the compiler's message.
    """
    if not ahead.collects():
        return _compiled(name, arch, options)
    ahead.collect((name, arch, *options.items()), partial(_compiled, name, arch, options))
    return b""


def _compiled(name: str, arch: str, options: dict[str, int | float]) -> bytes:
    nvrtc = _compiler()
    assert isinstance(nvrtc, ctypes.CDLL), nvrtc
    flags = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{key}={value}" for key, value in options.items())]
    texts = {path.name: path.read_bytes() for path in sorted(SOURCES.iterdir())}
    version = c_int(), c_int()
    nvrtc.nvrtcVersion(byref(version[0]), byref(version[1]))
    key = hashlib.sha256(repr((name, flags, texts, version[0].value, version[1].value)).encode()).hexdigest()[:24]
    kept = KEPT / f"{Path(name).stem}-{key}.cubin"
    if kept.exists():
        return kept.read_bytes()
    headers = {other: text for other, text in texts.items() if other != name}
    program = c_void_p()
    made = nvrtc.nvrtcCreateProgram(
        byref(program), texts[name], name.encode(), len(headers), (c_char_p * len(headers))(*headers.values()),
        (c_char_p * len(headers))(*(other.encode() for other in headers)),
    )  # fmt: skip
    assert made == 0, f"nvrtcCreateProgram: {made}"
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), (c_char_p * len(flags))(*(flag.encode() for flag in flags)))
        if failed:
            raise NoKernel(f"{name}: {_text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()}")
        cubin = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))
    _keep(kept, cubin)
    return cubin


def _text(size_of: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: c_void_p) -> bytes:
    size = c_size_t()
    size_of(program, byref(size))
    text = ctypes.create_string_buffer(size.value)
    get(program, text)
    return text.raw


def _keep(path: Path, cubin: bytes) -> None:
    """Keep a cubin for the next start; if the cache cannot be written, the next start compiles again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        os.replace(temporary, path)
    except OSError:
        return


def _enter_context() -> None:
    """Give this thread the context of torch's current device. torch does so no earlier than it must: a thread that has only
    set its device has none.
    """
    device, context = c_int(), c_void_p()
    driver("cuCtxGetCurrent", byref(context))
    if context.value is None and not ahead.collects():
        driver("cuDeviceGet", byref(device), c_int(torch.cuda.current_device()))
        driver("cuDevicePrimaryCtxRetain", byref(context), device)  # torch's own; it lives as long as the process
        driver("cuCtxSetCurrent", context)


class Kernel:
    """A function of a compiled module, in the current device's context. Raises NoKernel if the driver refuses it."""

    def __init__(self, cubin: bytes, name: str):
        self.module, self.function = c_void_p(), c_void_p()
        _enter_context()
        driver("cuModuleLoadData", byref(self.module), cubin)
        driver("cuModuleGetFunction", byref(self.function), self.module, name.encode())
        self.shared, self.threads = self.constant("shared_bytes"), self.constant("threads")
        driver("cuFuncSetAttribute", self.function, c_int(SHARED_SIZE), c_int(self.shared))

    @cached_property
    def device(self) -> int:
        """The device whose stream a launch asks for. torch, if not told, looks up the current one each time, which took a tenth
        of the host's time of a long prompt."""
        return torch.cuda.current_device()

    def constant(self, name: str) -> int:
        """The value of a global int of the module."""
        place, size, value = c_void_p(), c_size_t(), c_int()
        driver("cuModuleGetGlobal_v2", byref(place), byref(size), self.module, name.encode())
        driver("cuMemcpyDtoH_v2", byref(value), place, c_size_t(4))
        return value.value

    def launch(self, ctas: int, arguments: ctypes.Structure, *, early: bool = False, threads: int | None = None) -> None:
        """Launch on torch's current stream; within compile_ahead do nothing. `arguments` is the kernel's only parameter.

        early: programmatic dependent launch; the kernel itself waits for its predecessor and may start while that still runs.
        threads: of a CTA, if fewer than the module says.
        """
        if ahead.is_on():
            return
        pointers = (c_void_p * 1)(ctypes.addressof(arguments))
        attribute = _Attribute(id=EARLY, value=int(early))
        config = _Config(
            (ctas, 1, 1), (threads or self.threads, 1, 1), self.shared, torch.cuda.current_stream(self.device).cuda_stream,
            ctypes.pointer(attribute), 1,
        )  # fmt: skip
        driver("cuLaunchKernelEx", byref(config), self.function, pointers, None)


class Kernels:
    """A kernel for sm_90 in variants, tuples of values of `options`, and with values of `others` in all of them. `instead`
    describes the fallback in the log.
    """

    def __init__(
        self, source: str, function: str, instead: str, options: Sequence[str], variants: Sequence[tuple[int, ...]],
        **others: int,
    ):  # fmt: skip
        self.source, self.function, self.instead, self.options, self.variants = source, function, instead, options, variants
        self.others: dict[str, int | float] = dict(others)
        self.platform = Platform(torch.device("cpu"), "none")  # until one is configured
        self.kernel, self.refused, self.compiling = cache(self._kernel), cache(self._refused), cache(self._start)

    def configure(self, platform: Platform, *, now: bool = True) -> None:
        """Variants are compiled while the model is loaded, since they do not depend on it; not `now`: at their first use."""
        self.platform = platform
        if now and no_warpgroups(platform) is None:
            self.compiling()

    def _start(self) -> dict[tuple[int, ...], Future[bytes]]:
        pool = threads_on(self.platform.device, len(self.variants), "octavo-compile")
        started = {
            values: pool.submit(
                compile_cubin, self.source, "sm_90a", dict(zip(self.options, values, strict=True)) | self.others
            )
            for values in self.variants
        }
        pool.shutdown(wait=False)
        return started

    def _kernel(self, variant: tuple[int, ...], device: torch.device) -> Kernel | None:
        """The kernel on a device; None, with a warning, if it cannot be compiled or loaded."""
        try:
            return Kernel(self.compiling()[variant].result(), self.function)
        except NoKernel as error:
            log.warning("%s: %s", self.instead, error)
            return None

    def _refused(self, reason: str) -> None:
        """Log the failure once."""
        log.info("%s: %s", self.instead, reason)


def tensor_map(x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """A TMA tensor map of the bytes from x on: an array of `sizes`, innermost axis first, whose other axes have `strides` in
    bytes.

    Boxes with rows of 64 or 128 bytes are copied, with the swizzle that WGMMA reads.
    """
    return _tensor_map(x.data_ptr(), tuple(sizes), tuple(strides), tuple(box))


@lru_cache(1 << 14)  # weights and caches of all layers recur in every step, and most activations
def _tensor_map(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    made = (c_uint64 * 24)()  # its 16 words, 64-byte aligned
    place = (ctypes.addressof(made) + 63) // 64 * 64
    rank = len(sizes)
    driver(
        "cuTensorMapEncodeTiled", c_void_p(place), c_int(0), c_uint32(rank), c_void_p(address), (c_uint64 * rank)(*sizes),
        (c_uint64 * (rank - 1))(*strides), (c_uint32 * rank)(*box), (c_uint32 * rank)(*[1] * rank), c_int(0),
        c_int(SWIZZLED[box[0]]), c_int(PROMOTED), c_int(0),
    )  # fmt: skip
    return ctypes.string_at(place, 128)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def driver(call: str, *arguments: object) -> None:
    """Calls the driver; where jobs are collected there is none. Raises NoKernel if it fails."""
    if ahead.collects():
        return
    if status := getattr(_library(), call)(*arguments):
        raise NoKernel(f"{call} failed with CUDA error {status}")
