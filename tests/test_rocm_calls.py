"""The calls of torch that docs/rocm.md lists, on a stand-in for the device: what is passed, and what is made of the answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo import distributed, platform
from octavo.engine import loading
from octavo.engine.step_tokens import StepTokens
from octavo.ops import reference
from octavo.ops.contract import Activation, Quantized
from octavo.platform import Platform
from octavo.quant import FP8_PER_CHANNEL, Granularity, quantize
from octavo.weights import transfer
from octavo.weights.checkpoint import Checkpoint

pytest.importorskip("triton", reason="needs Triton")

from octavo.ops.gpu import PackedScaledMM, ScaledMM

MI300X = Platform(torch.device("cuda", 1), "gfx942", fp8_dtype=torch.float8_e4m3fnuz, multiprocessors=304)


def test_memory_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 150 << 30, 192 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", answer)
    assert MI300X.memory() == (150 << 30, 192 << 30)
    assert asked == [torch.device("cuda", 1)]


def test_freed_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("device"))
    monkeypatch.setattr(platform, "release", lambda: calls.append("host"))
    MI300X.release()
    assert calls == ["device", "host"]


def test_a_card_is_called_as_its_driver_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", {MI300X.device: "AMD Instinct MI300X"}.__getitem__)
    assert replace(MI300X).name == "AMD Instinct MI300X (gfx942)"


def test_the_peak_while_loading_is_the_devices_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is reset when loading begins, and read when the device has done all that was launched."""
    calls: list[str] = []

    def answering(name: str, value: int = 0) -> None:
        def call(device: torch.device) -> int:
            assert device == MI300X.device
            calls.append(name)
            return value

        monkeypatch.setattr(torch.accelerator, name, call)

    answering("memory_allocated", 1 << 30)
    answering("reset_peak_memory_stats")
    peak = loading._Peak(MI300X.device)
    assert calls == ["memory_allocated", "reset_peak_memory_stats"]
    answering("synchronize")
    answering("memory_allocated", 9 << 30)
    answering("max_memory_allocated", 11 << 30)
    assert peak.describe() == "peak while loading 10.00 GiB (model 8.00 GiB + 2.00 GiB)"
    assert calls[2] == "synchronize"


def test_threads_work_on_the_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[tuple[str, int]] = []

    def set_index(index: int) -> None:
        current.append((threading.current_thread().name, index))

    monkeypatch.setattr(torch.accelerator, "set_device_index", set_index)
    with platform.threads_on(MI300X.device, 1, "octavo-read") as pool:
        assert pool.submit(lambda: threading.current_thread().name).result() == current[0][0]
    assert current == [("octavo-read_0", 1)]


class Event:
    """The stand-in's: says where it was recorded and waited for."""

    def __init__(self, log: list[str], number: int):
        self.log, self.number = log, number

    def record(self) -> None:
        self.log.append(f"record {self.number}")

    def synchronize(self) -> None:
        self.log.append(f"wait {self.number}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to events of the device, whose memory is this host's and whose copies end at once. Pinned memory is asked
    for and is ordinary."""
    log: list[str] = []
    made: list[Event] = []
    empty = torch.empty

    def event(device: torch.device) -> Event:
        assert device == MI300X.device
        made.append(Event(log, len(made)))
        return made[-1]

    def stand_in(*size: Any, device: Any = None, pin_memory: bool = False, **rest: Any) -> Tensor:
        if pin_memory:
            log.append("pinned")
        return empty(*size, device="cpu" if device == MI300X.device else device, **rest)

    monkeypatch.setattr(torch, "Event", event)
    monkeypatch.setattr(torch, "empty", stand_in)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    return log


def test_a_buffer_is_filled_again_when_its_copy_has_ended(
    events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pinned buffers for five chunks: each is waited for before it is written again, and all at the end."""
    monkeypatch.setattr(transfer, "CHUNK", 64)
    monkeypatch.setattr(transfer, "BUFFERS", 2)
    monkeypatch.setattr(transfer, "THREADS", 1)
    stored = torch.randint(0, 255, (320,), dtype=torch.uint8)
    save_file({"a": stored}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    reader = transfer.Transfer(checkpoint, MI300X.device)
    found = reader.read(checkpoint.tensors["a"], 0, slice(0, 320))
    reader.close()
    assert torch.equal(found, stored)
    assert events.count("pinned") == 2
    for number in (0, 1):
        own = [word.split()[0] for word in events if word.endswith(f" {number}")]
        assert own == ["wait", *["record", "wait"] * own.count("record")]
    assert sum(word.startswith("record") for word in events) == 5


def test_tokens_come_to_the_host_when_their_copy_has_ended(events: list[str]) -> None:
    class OnDevice(Tensor):
        """Numbers of this host that say that they are the device's."""

        device = MI300X.device

    tokens = torch.tensor([7, 8, 9]).as_subclass(OnDevice)
    out = StepTokens()
    out.put(tokens, ["x", "y", "z"])
    assert events == ["pinned", "record 0"]
    assert out.to_host() == [7, 8, 9]
    assert events[2:] == ["wait 0"]


def test_a_step_is_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

        def pool(self) -> str:
            return "its pool"

    @contextmanager
    def capturing(graph: Graph, pool: object) -> Iterator[None]:
        calls.append(("begin", pool))
        yield
        calls.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    replay, _, pool = platform.capture(lambda: calls.append("launches"), "a pool")
    replay()
    assert pool == "its pool"
    assert calls == [("begin", "a pool"), "launches", "end", "replay"]


@pytest.mark.parametrize(("n", "k"), [(48, 32), (1008, 4096), (16, 9216)])
def test_products_of_many_tokens_are_of_codes_and_scales_of_rows(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """hipBLASLt takes codes of the device's own format, the second ones column-major, with scales [M, 1] and [1, N]."""
    weight, x = torch.randn(n, k), torch.randn(70, k).bfloat16()
    q = quantize(weight, FP8_PER_CHANNEL, MI300X.fp8_dtype)
    assert ScaledMM().supports(q, MI300X) is None
    packed = PackedScaledMM(q)
    given = Quantized(*reference.quantize_activation(x, Granularity.ROW, MI300X.fp8_dtype))

    def product(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, bias: Any, out_dtype: Any, **_: Any) -> Tensor:
        assert a.dtype is b.dtype is torch.float8_e4m3fnuz
        assert a.stride(1) == b.stride(0) == 1
        assert not any(size % 16 for size in (a.shape[1], *b.shape))
        assert (scale_a.shape, scale_b.shape) == ((len(a), 1), (1, b.shape[1]))
        assert (out_dtype, bias) == (torch.bfloat16, None)
        return ((a.double() @ b.double()) * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    out, expected = packed(Activation(None, given)), x.double() @ weight.double().T
    assert out.shape == (70, n)
    assert torch.linalg.norm(out.double() - expected) / torch.linalg.norm(expected) < 0.06


def test_ranks_join_by_the_name_that_rccl_answers_to(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    current: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **rest: given.update(rest, backend=backend))
    monkeypatch.setattr(distributed, "_joined", None)
    for name in distributed._ENVIRONMENT:
        monkeypatch.setenv(name, "0")
    ranks = distributed.join(1, 2, lambda: "a store", "its name", MI300X.device)
    assert (ranks.rank, ranks.size, ranks.device) == (1, 2, MI300X.device)
    assert (given["backend"], given["store"]) == ("nccl", "a store")
    assert (given["rank"], given["world_size"], given["device_id"]) == (1, 2, MI300X.device)
    assert current == [MI300X.device]
