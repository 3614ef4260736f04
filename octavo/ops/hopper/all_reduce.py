"""Sums over ranks by csrc/all_reduce.cu, through buffers in the memory of all ranks; larger ones are the library's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from octavo.distributed import Collectives, TensorParallel
from octavo.ops import gpu
from octavo.ops.contract import Activation, CodeFormat, Quantized, Reader, wanted
from octavo.ops.hopper import peer_buffers
from octavo.ops.hopper.compile import Kernel, Kernels, NoKernel, no_warpgroups
from octavo.ops.hopper.peer_buffers import PeerBuffers
from octavo.ops.triton import launch
from octavo.platform import Platform
from octavo.quant.scheme import BLOCK, Granularity

__all__ = [
    "USUAL_RANKS",
    "AllReduce",
    "Exchange",
    "all_reduce",
    "all_reduce_norm_quantize",
    "argmax_over_ranks",
    "connect",
    "connected",
    "kernels",
]

EMPTY = 0x80008000  # as in exchange.cuh
HALF = 64 << 20  # bytes of half a buffer
USUAL_RANKS = 2, 4, 8  # for which images have kernels
MAX_RANKS, MAX_THREADS, VALUES, MAX_VECTORS = 8, 1024, 8, 2  # values: of a thread's vector
TWO_SHOTS = 256 << 10  # bytes of a sum over more than two ranks from which two shots are faster than one


class Exchange(ctypes.Structure):
    """Where a kernel's exchanges take place, as in exchange.cuh."""

    _fields_ = [
        ("buffers", c_void_p * MAX_RANKS), ("state", c_void_p), ("half", c_uint64), ("rank", c_int32), ("padding", c_int32),
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = [
        ("at", Exchange), *((name, c_void_p) for name in ("x", "residual", "weight", "sum", "dense", "codes", "scales")),
        *((name, c_int32) for name in ("rows", "width", "groups", "two_shots")), ("eps", c_float),
    ]  # fmt: skip


class _Choice(ctypes.Structure):
    _fields_ = [
        ("at", Exchange), *((name, c_void_p) for name in ("logits", "local", "out")), ("stride", c_int64),
        ("rows", c_int32), ("width", c_int32),
    ]  # fmt: skip


def kernels(*ranks: int) -> Kernels:
    """The kernels for these numbers of ranks."""
    variants = [(count, vectors) for count in ranks for vectors in range(1, MAX_VECTORS + 1)]
    return Kernels("all_reduce.cu", "all_reduce", "sums over ranks are the library's", ("RANKS", "VECTORS"), variants)


class AllReduce:
    """The kernels of the ranks of `tp` on this rank's device, over `buffers` of two halves filled with EMPTY.

    loaded: `all_reduce` for each number of vectors, then `argmax_over_ranks`.
    """

    def __init__(self, tp: TensorParallel, loaded: Sequence[Kernel], buffers: PeerBuffers, device: torch.device):
        self.ranks, self.buffers = tp.size, buffers
        *self.sum, self.choose = loaded
        self.state = torch.zeros(2, dtype=torch.int32, device=device)
        addresses = (c_void_p * MAX_RANKS)(*buffers.addresses)
        self.at = Exchange(addresses, self.state.data_ptr(), buffers.size // 2, tp.rank)

    def refusal(self, x: Tensor) -> str | None:
        """None, or the reason why the kernel does not sum x [rows, width]."""
        width = x.shape[-1]
        if x.dtype is not torch.bfloat16 or x.dim() != 2 or not x.is_contiguous():
            return "not contiguous BF16 rows"
        if width % VALUES or width > MAX_THREADS * VALUES * MAX_VECTORS or x.data_ptr() % 16:
            return f"rows of {width} values, or not at multiples of 16 bytes"
        return None

    def __call__(
        self, x: Tensor, total: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, eps: float = 0.0,
        dense: Tensor | None = None, quantized: Quantized | None = None,
    ) -> None:  # fmt: skip
        """The sum of x [rows, width] plus `residual` into `total`; its norm by `weight` into `dense` and `quantized`.

        What the buffers do not hold at once is summed in several calls.
        """
        rows, width = x.shape
        vectors = -(-width // (VALUES * MAX_THREADS))
        threads = -(-width // (VALUES * vectors * 32)) * 32
        resident = launch.device_units() * max(1, MAX_THREADS // threads)
        two_shots = self.ranks > 2 and x.nbytes >= TWO_SHOTS
        most = self.buffers.size // 2 // (2 * width * (self.ranks if two_shots else self.ranks - 1))
        by_row = x, residual, total, dense, *(quantized or (None, None))
        groups = quantized.scale.shape[1] if quantized is not None else 0
        for first in range(0, rows, most):
            count = min(most, rows - first)
            own, before, *out = (None if t is None else t[first].data_ptr() for t in by_row)
            gain = None if weight is None else weight.data_ptr()
            arguments = _Rows(self.at, own, before, gain, *out, count, width, groups, two_shots, eps)
            self.sum[vectors - 1].launch(min(count, resident), arguments, early=True, threads=threads)

    def argmax(self, logits: Tensor) -> Tensor:
        """As `argmax_over_ranks`."""
        rows, width = logits.shape
        local, out = gpu.argmax(logits), torch.empty(rows, dtype=torch.int64, device=logits.device)
        arguments = _Choice(self.at, logits.data_ptr(), local.data_ptr(), out.data_ptr(), logits.stride(0), rows, width)
        self.choose.launch(1, arguments, early=True, threads=min(MAX_THREADS, -(-rows // 32) * 32))
        return out


_connected: dict[Collectives, AllReduce] = {}  # of this process's present group; a group is joined once


def connect(platform: Platform, tp: TensorParallel) -> str | None:
    """Makes the kernels ready for sums over the ranks of `tp`. None, or the reason why the library sums, the same on every
    rank. All ranks call it at the same place.
    """
    assert tp.group is not None
    if tp.group in _connected:
        return None
    for old in _connected.values():
        old.buffers.close(tp)
    _connected.clear()
    reason, loaded = no_warpgroups(platform), list[Kernel]()
    if reason is None and tp.size > MAX_RANKS:
        reason = f"more than {MAX_RANKS} ranks"
    if reason is None:
        try:
            own = kernels(tp.size)
            own.configure(platform)
            cubins = [own.compiling()[variant].result() for variant in own.variants]
            loaded += [*(Kernel(cubin, own.function) for cubin in cubins), Kernel(cubins[0], "argmax_over_ranks")]
        except NoKernel as error:
            reason = str(error).splitlines()[0]
    found = peer_buffers.connect(tp, 2 * HALF, EMPTY, reason)
    if isinstance(found, str):
        return found
    _connected[tp.group] = AllReduce(tp, loaded, found, platform.device)
    return None


def connected(tp: TensorParallel) -> AllReduce | None:
    """The kernels of these ranks; None if the library sums."""
    return None if tp.group is None else _connected.get(tp.group)


def _kernel_for(x: Tensor, tp: TensorParallel) -> AllReduce | None:
    found = connected(tp)
    return None if found is None or found.refusal(x) is not None else found


def all_reduce(x: Tensor, tp: TensorParallel) -> Tensor:
    kernel = _kernel_for(x, tp)
    if kernel is None:
        return tp.all_reduce(x)
    if len(x):
        kernel(x, x)
    return x


def all_reduce_norm_quantize(
    x: Tensor, tp: TensorParallel, weight: Tensor, eps: float, residual: Tensor | None = None, readers: Sequence[Reader] = ()
) -> tuple[Activation, Tensor] | None:
    kernel = _kernel_for(x, tp)
    if kernel is None or weight.dtype is not x.dtype or not len(x):
        return None
    dense, form = wanted(readers, len(x))
    if form is not None and not _makes(form, x.shape[1]):
        dense, form = True, None
    total = x if residual is None else torch.empty_like(x)
    values = torch.empty_like(x) if dense else None
    quantized = None
    if form is not None:
        codes = torch.empty(x.shape, dtype=form.dtype, device=x.device)
        quantized = Quantized(codes, torch.empty(len(x), form.groups, dtype=torch.float32, device=x.device))
    kernel(x, total, residual, weight, eps, values, quantized)
    return Activation(values, quantized), total


def _makes(form: CodeFormat, width: int) -> bool:
    """Whether the kernel makes codes of rows of `width` values in this format."""
    one = form.granularity is Granularity.ROW or (form.groups > 1 and width % BLOCK == 0)
    return form.dtype is torch.float8_e4m3fn and form.width == width and one


def argmax_over_ranks(logits: Tensor, tp: TensorParallel) -> Tensor | None:
    found = connected(tp)
    if found is None or logits.dtype is not torch.bfloat16 or logits.stride(1) != 1 or not len(logits):
        return None
    return found.argmax(logits)
