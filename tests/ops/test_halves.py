"""Steps in two halves on Hopper: what copy engines and streams are told, without a GPU."""

from __future__ import annotations

from ctypes import c_void_p
from typing import Any

import pytest
import torch

from octavo.distributed import TensorParallel, Unheard
from octavo.ops import ahead, half
from octavo.ops.hopper import all_reduce, halves
from octavo.ops.hopper.halves import APART, SLOT, Halves
from octavo.ops.hopper.peer_buffers import PeerBuffers

CPU = torch.device("cpu")
STREAM = 77


class Told:
    """In the driver's place: the calls, their arguments as numbers."""

    def __init__(self) -> None:
        self.calls = list[tuple[Any, ...]]()

    def __call__(self, call: str, *args: Any) -> None:
        self.calls.append((call.removesuffix("_v2"), *(arg.value for arg in args)))


def made(ranks: int, rank: int) -> Halves:
    found = object.__new__(Halves)  # without streams, which a CPU has none of
    found.tp, found.sums = TensorParallel(rank, ranks, Unheard()), [0, 0]
    found.buffers = PeerBuffers([(to + 1) << 40 for to in range(ranks)], 4 * SLOT, rank)
    return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr(halves, "driver", found)
    monkeypatch.setattr(halves, "current_stream", lambda: c_void_p(STREAM))
    return found


@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 2)])
def test_an_exchange(ranks: int, rank: int, told: Told) -> None:
    """To each peer the values, then the flag; then this stream waits for all peers' flags. Slots take turns."""
    found, x = made(ranks, rank), torch.zeros(3, 64, dtype=torch.bfloat16)
    own, peers = (rank + 1) << 40, [to for to in range(ranks) if to != rank]
    for count in range(3):
        told.calls.clear()
        for number in (0, 1):
            assert found.exchange(x, number) == own + (2 * number + count % 2) * SLOT
        for number, calls in enumerate((told.calls[: 3 * len(peers)], told.calls[3 * len(peers) :])):
            slot, flags = (2 * number + count % 2) * SLOT, 4 * SLOT + number * ranks * APART
            copies = {call[1]: call for call in calls if call[0] == "cuMemcpyDtoDAsync"}
            assert copies == {
                (at := ((to + 1) << 40) + slot + (rank - (rank > to)) * x.nbytes): (
                    "cuMemcpyDtoDAsync", at, x.data_ptr(), x.nbytes, STREAM,
                )
                for to in peers
            }  # fmt: skip
            sent = [call for call in calls if call[0] == "cuStreamWriteValue32"]
            assert {call[2] for call in sent} == {((to + 1) << 40) + flags + rank * APART for to in peers}
            waits = [call for call in calls if call[0] == "cuStreamWaitValue32"]
            assert {call[2] for call in waits} == {own + flags + peer * APART for peer in peers}
            assert {call[3] for call in sent + waits} == {count + 1}
            assert [call[0] for call in calls] == ["cuMemcpyDtoDAsync", "cuStreamWriteValue32"] * len(peers) + [
                "cuStreamWaitValue32"
            ] * len(peers)


def test_compiling_ahead_exchanges_nothing(told: Told) -> None:
    """Ranks compile independently, so what they count must stay alike."""
    found = made(2, 0)
    with ahead.mode():
        found.exchange(torch.zeros(1, 64), 0)
    assert not told.calls
    assert found.sums == [0, 0]


def test_the_kernel_reads_what_was_copied(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a half it neither sends nor waits, and needs no resident CTAs; more than a slot holds comes in several calls."""
    monkeypatch.setattr(all_reduce.launch, "device_units", lambda: 132)
    monkeypatch.setattr(halves, "SLOT", 2 * 8192 * 300)
    launched = list[tuple[int, Any]]()

    class Kernel:
        def launch(self, ctas: int, arguments: Any, *, early: bool, threads: int) -> None:
            launched.append((ctas, arguments))

    kernels: Any = [Kernel() for _ in range(3)]
    sums = all_reduce.AllReduce(TensorParallel(0, 2, Unheard()), kernels, PeerBuffers([1, 2], 2 << 26, 0), CPU, made(2, 0))
    x = torch.zeros(700, 8192, dtype=torch.bfloat16)
    with half.launching(1):
        assert half.workspace() == 1
        sums(x, x)
    assert half.current() is None
    assert [(ctas, at.rows, at.copied, at.two_shots) for ctas, at in launched] == [(n, n, 1, 0) for n in (300, 300, 100)]
    assert all(at.at.half == 0 for _, at in launched)
    turns = [at.at.buffers[0] - (1 << 40) for _, at in launched]
    assert turns == [2 * halves.SLOT, 3 * halves.SLOT, 2 * halves.SLOT]
    sums(x, x)
    assert not launched[-1][1].copied
    assert launched[-1][0] == 132
