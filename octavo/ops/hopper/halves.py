"""Steps in two halves, so that the sums of one half are on their way over NVLink while the other half computes.

Each half has a stream. A sum copies this rank's values to its peers by the copy engines, which take no multiprocessor; then the
stream, and nothing else, waits for the peers' values. So the multiprocessors run what the other half has ready. A kernel that
waits for peers could not do so: two of them, one of each half, would wait for one another from rank to rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_size_t, c_uint32, c_uint64

import torch
from torch import Tensor

from octavo.distributed import TensorParallel
from octavo.ops import ahead, half
from octavo.ops.hopper.compile import current_stream, driver
from octavo.ops.hopper.peer_buffers import PeerBuffers

__all__ = ["FLAGS", "SLOT", "Halves"]

SLOT = 64 << 20  # bytes that a rank receives at once; each half has two slots, which take turns
FLAGS, APART = 4096, 64  # bytes of the flags behind the slots, and between two of them
DEFAULT, AT_LEAST = 0, 0  # CU_STREAM_WRITE_VALUE_DEFAULT, CU_STREAM_WAIT_VALUE_GEQ (of the difference's sign)


class Halves:
    """The streams of both halves, and `buffers` of four slots and the flags, which are 0 at first.

    Two slots a half suffice. A rank copies into a slot again two sums later, when the sum between has come from this peer,
    which sent it behind the kernel that read the slot.
    """

    def __init__(self, tp: TensorParallel, buffers: PeerBuffers, device: torch.device):
        self.tp, self.buffers, self.sums = tp, buffers, [0, 0]
        self.streams = [torch.Stream(device) for _ in range(2)]
        self.read = torch.Event(device)

    @contextmanager
    def both(self) -> Iterator[None]:
        """Around all launches of both halves: the caller's launches before come first, and those behind come last."""
        outer = torch.accelerator.current_stream()
        for stream in self.streams:
            stream.wait_stream(outer)
        yield
        for stream in self.streams:
            outer.wait_stream(stream)

    @contextmanager
    def half(self, number: int) -> Iterator[None]:
        """Launches within are of half `number`. Those of half 1 come behind those of half 0's context before, whose keys and
        values they read."""
        if number:
            self.streams[1].wait_event(self.read)
        with self.streams[number], half.launching(number):
            yield
        if not number:
            self.read.record(self.streams[0])

    def most_rows(self, width: int) -> int:
        """Rows of BF16 values that one exchange takes."""
        return SLOT // (2 * width * (self.tp.size - 1))

    def exchange(self, x: Tensor, number: int) -> int:
        """Copies x to all peers and receives theirs, on the current stream: the address of [peers, *x.shape], in rank order."""
        size, rank = self.tp.size, self.tp.rank
        count = self.sums[number]
        slot, flags = (2 * number + count % 2) * SLOT, 4 * SLOT + number * size * APART
        if ahead.is_on():
            return self.buffers.addresses[rank] + slot
        self.sums[number] += 1
        stream, told = current_stream(), c_uint32((count + 1) % (1 << 32))
        for k in range(1, size):
            to = (rank + k) % size
            there = self.buffers.addresses[to]
            place = there + slot + (rank - (rank > to)) * x.nbytes
            driver("cuMemcpyDtoDAsync_v2", c_uint64(place), c_uint64(x.data_ptr()), c_size_t(x.nbytes), stream)
            driver("cuStreamWriteValue32_v2", stream, c_uint64(there + flags + rank * APART), told, c_uint32(DEFAULT))
        for peer in range(size):
            if peer != rank:
                own = c_uint64(self.buffers.addresses[rank] + flags + peer * APART)
                driver("cuStreamWaitValue32_v2", stream, own, told, c_uint32(AT_LEAST))
        return self.buffers.addresses[rank] + slot
