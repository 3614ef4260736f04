"""Copies a checkpoint's bytes to a device, and reads ahead into the page cache.

A disk is fast only with many requests in flight. So ReadAhead has the system fetch the next bytes while a layer is quantized.
They go to the page cache, so the process holds only the model and one layer. For an accelerator, threads read a tensor in
chunks into pinned buffers, used in turn, each copied while others are filled: one core alone copies slower than the link, and
from pageable memory the link is slow. On a CPU a file's pages are mapped, not copied.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.platform import threads_on
from octavo.weights.checkpoint import Checkpoint, StoredTensor

__all__ = ["ReadAhead", "Transfer"]

THREADS = 8
CHUNK = 8 << 20  # bytes per read of a thread
BUFFERS = 2 * THREADS  # half are filled while the other half are copied
AHEAD = 1 << 30  # bytes that are requested ahead of use
ADVICE = 512 << 10  # bytes per call; the kernel reads little more than this per request


class _Buffer:
    """Pinned memory of one chunk. `copied` is recorded after its copy to the device."""

    def __init__(self, nbytes: int, device: torch.device):
        self.data = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self.copied = torch.Event(device=device) if device.type != "cpu" else None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


class Transfer:
    """Reads parts of a checkpoint's tensors to one device. Not thread-safe: the buffers are used in the order of calls."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        self._pool = threads_on(device, THREADS, "octavo-read")
        self._buffers: deque[_Buffer] = deque()  # least recently used first

    def read(self, tensor: StoredTensor, dim: int, part: slice) -> Tensor:
        """The `part` of dimension `dim`, in the stored dtype. No other bytes of a matrix are read."""
        if not tensor.shape:
            return self._bytes(tensor, 0, tensor.nbytes).view(tensor.torch_dtype).view(tensor.shape)
        if (slab := tensor.slab) is not None and slab.transposed:
            whole, parts = tensor.whole_slab(), [slice(0, n) for n in tensor.shape]
            parts[dim] = part
            rows = slice(slab.first + parts[0].start, slab.first + parts[0].stop)
            return self._columns(whole, parts[1], rows).view(whole.integers).T.contiguous().view(tensor.torch_dtype)
        if dim == 1 and len(tensor.shape) == 2:
            return self._columns(tensor, slice(0, tensor.shape[0]), part).view(tensor.torch_dtype)
        row = tensor.nbytes // max(tensor.shape[0], 1)
        if dim == 0:
            return self._rows(tensor, part, row)
        # Of more dimensions there are scales alone.
        return self._rows(tensor, slice(0, tensor.shape[0]), row)[(slice(None),) * dim + (part,)].contiguous()

    def _rows(self, tensor: StoredTensor, part: slice, row: int) -> Tensor:
        count = part.stop - part.start
        return self._bytes(tensor, part.start * row, count * row).view(tensor.torch_dtype).view(count, *tensor.shape[1:])

    def _columns(self, tensor: StoredTensor, rows: slice, columns: slice) -> Tensor:
        """The `columns` of some rows of a matrix: uint8 [rows, bytes]."""
        itemsize = tensor.torch_dtype.itemsize
        within, width = slice(columns.start * itemsize, columns.stop * itemsize), (columns.stop - columns.start) * itemsize
        step, reads = max(1, CHUNK // max(width, 1)), []
        for at in range(rows.start, rows.stop, step):
            some = slice(at, min(at + step, rows.stop))
            reads.append(partial(self.checkpoint.read_columns_into, tensor, some, within))
        return self._through_buffers(reads, (rows.stop - rows.start, width), step)

    def _bytes(self, tensor: StoredTensor, start: int, nbytes: int) -> Tensor:
        reads = [partial(self.checkpoint.read_into, tensor, at) for at in range(start, start + nbytes, CHUNK)]
        return self._through_buffers(reads, (nbytes,), CHUNK)

    def _through_buffers(self, reads: Sequence[Callable[[Tensor], None]], shape: Sequence[int], step: int) -> Tensor:
        """uint8 `shape`, of which each of `reads` fills the next `step` rows: while one buffer is copied to the device, threads
        fill the next ones."""
        out = torch.empty(shape, dtype=torch.uint8, device=self.device)
        running: deque[tuple[Future[None], _Buffer, Tensor, Tensor]] = deque()
        try:
            for read, target in zip(reads, out.split(step) if reads else (), strict=True):
                if len(running) == THREADS:
                    self._copy(*running.popleft())
                buffer = self._next_buffer(target.numel())
                where = buffer.data[: target.numel()].view(target.shape)
                running.append((self._pool.submit(read, where), buffer, where, target))
            while running:
                self._copy(*running.popleft())
        finally:
            wait([job for job, *_ in running])  # after an error the other jobs still write to buffers
        return out

    def _next_buffer(self, nbytes: int) -> _Buffer:
        buffer = _Buffer(CHUNK, self.device) if len(self._buffers) < BUFFERS else self._buffers.popleft()
        buffer.wait()
        if nbytes > buffer.data.numel():  # a row's part that is longer than a chunk
            buffer = _Buffer(nbytes, self.device)
        self._buffers.append(buffer)
        return buffer

    def _copy(self, job: Future[None], buffer: _Buffer, found: Tensor, target: Tensor) -> None:
        job.result()
        target.copy_(found, non_blocking=True)
        if buffer.copied is not None:
            buffer.copied.record()

    def close(self) -> None:
        self._pool.shutdown()
        for buffer in self._buffers:
            buffer.wait()
        self._buffers.clear()


class ReadAhead:
    """A thread that requests the files' next AHEAD bytes from the system, in the order of use."""

    def __init__(self, checkpoint: Checkpoint, order: Sequence[StoredTensor]):
        self.checkpoint, self.order = checkpoint, order
        self._open = AHEAD  # bytes that may still be requested
        self._condition = threading.Condition()
        self._closed = not hasattr(os, "posix_fadvise")
        self._thread = threading.Thread(target=self._run, name="octavo-read-ahead", daemon=True)
        self._thread.start()

    def consumed(self, tensor: StoredTensor) -> None:
        """The tensor was read, so as many further bytes may be requested."""
        with self._condition:
            self._open += tensor.nbytes
            self._condition.notify()

    def _run(self) -> None:
        for tensor in self.order:
            try:
                descriptor = self.checkpoint.descriptor(tensor.file)
            except OctavoError:  # whoever reads the tensor raises it
                return
            for at in range(tensor.start, tensor.start + tensor.nbytes, ADVICE):
                size = min(ADVICE, tensor.start + tensor.nbytes - at)
                with self._condition:
                    while self._open < size and not self._closed:
                        self._condition.wait()
                    if self._closed:
                        return
                    self._open -= size
                with suppress(OSError):  # a file system that ignores the advice costs only speed
                    os.posix_fadvise(descriptor, at, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()
