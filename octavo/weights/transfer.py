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
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress

import torch
from torch import Tensor

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
        self._slab: tuple[tuple[str, int], Tensor] | None = None  # the last transposed slab, which holds both gate and up

    def read(self, tensor: StoredTensor, dim: int, part: slice) -> Tensor:
        """The `part` of dimension `dim`, in the stored dtype."""
        if tensor.is_transposed:
            return self._transposed(tensor)[(slice(None),) * dim + (part,)].contiguous().view(tensor.torch_dtype)
        if not tensor.shape:
            return self._bytes(tensor, 0, tensor.nbytes).view(tensor.torch_dtype).view(tensor.shape)
        row = tensor.nbytes // max(tensor.shape[0], 1)
        if dim == 0:
            return self._rows(tensor, part, row)
        # For columns, whole rows are read, some at a time, and the device keeps their part.
        step = max(1, BUFFERS * CHUNK // max(row, 1))
        starts = range(0, max(tensor.shape[0], 1), step)
        columns = (slice(None),) * dim + (part,)
        pieces = [self._rows(tensor, slice(at, min(at + step, tensor.shape[0])), row)[columns].contiguous() for at in starts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _transposed(self, tensor: StoredTensor) -> Tensor:
        """A transposed view, in integers, of the tensor's slab. The slab is copied as it is in the file."""
        slab = tensor.slab
        assert slab is not None
        if self._slab is None or self._slab[0] != (tensor.key, slab.expert):
            whole, self._slab = tensor.whole_slab(), None
            found = self._bytes(whole, 0, whole.nbytes).view(whole.integers).view(whole.shape)
            self._slab = (tensor.key, slab.expert), found
        return self._slab[1].T[slab.first : slab.first + tensor.shape[0]]

    def _rows(self, tensor: StoredTensor, part: slice, row: int) -> Tensor:
        count = part.stop - part.start
        return self._bytes(tensor, part.start * row, count * row).view(tensor.torch_dtype).view(count, *tensor.shape[1:])

    def _bytes(self, tensor: StoredTensor, start: int, nbytes: int) -> Tensor:
        """Reads through the buffers: while one is copied to the device, threads fill the next ones."""
        out = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        running: deque[tuple[Future[None], _Buffer, slice]] = deque()
        try:
            for at in range(0, nbytes, CHUNK):
                if len(running) == THREADS:
                    self._copy(*running.popleft(), out)
                part = slice(at, min(at + CHUNK, nbytes))
                buffer = self._next_buffer()
                where = buffer.data[: part.stop - part.start]
                running.append((self._pool.submit(self.checkpoint.read_into, tensor, start + at, where), buffer, part))
            while running:
                self._copy(*running.popleft(), out)
        finally:
            wait([job for job, _, _ in running])  # after an error the other jobs still write to buffers
        return out

    def _next_buffer(self) -> _Buffer:
        buffer = _Buffer(CHUNK, self.device) if len(self._buffers) < BUFFERS else self._buffers.popleft()
        buffer.wait()
        self._buffers.append(buffer)
        return buffer

    def _copy(self, job: Future[None], buffer: _Buffer, part: slice, out: Tensor) -> None:
        job.result()
        out[part].copy_(buffer.data[: part.stop - part.start], non_blocking=True)
        if buffer.copied is not None:
            buffer.copied.record()

    def close(self) -> None:
        self._pool.shutdown()
        self._slab = None
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
            descriptor = self.checkpoint.descriptor(tensor.file)
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
