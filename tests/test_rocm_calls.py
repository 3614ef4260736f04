"""The calls of torch that docs/rocm.md lists, on a stand-in for the device: what is passed, and what is made of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo import distributed, platform
from octavo.ops import reference
from octavo.ops.contract import Activation, Quantized
from octavo.platform import Platform
from octavo.quant import FP8_PER_CHANNEL, Granularity, quantize

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
