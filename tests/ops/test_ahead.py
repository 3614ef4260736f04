"""Compiling ahead: nothing is launched and no rank waits for another, whatever calls what."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from octavo import batch as batches
from octavo import ops
from octavo.distributed import TensorParallel, Unheard
from octavo.engine.vocabulary import Vocabulary
from octavo.ops import ahead, gpu
from octavo.ops.contract import LayerParts, Quantized, Rope
from octavo.ops.hopper import (
    attention,
    block_gate_up_silu,
    block_gemm,
    gate_up_silu,
    layer_by_layer,
    qkv_rope_kv_write,
)
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper.decode import DecodeAttention
from octavo.ops.hopper.layer_megakernel import LayerMegakernels
from octavo.ops.hopper.prefill import PrefillAttention
from octavo.ops.triton import launch
from octavo.platform import Platform
from octavo.quant import BF16, FP8_BLOCK, QTensor, quantize
from tests.ops.megakernels import hopper, parts
from tests.ops.paged import requests, weight

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs no accelerator: the driver is replaced")


class Driver:
    """Counts launches instead of making them; of a module it says that its constants are 32; a thread has a context."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, call: str, *arguments: Any) -> None:
        self.calls.append(call)
        if call == "cuMemcpyDtoH_v2":
            arguments[0]._obj.value = 32
        if call == "cuCtxGetCurrent":
            arguments[0]._obj.value = 1

    @property
    def launches(self) -> int:
        return self.calls.count("cuLaunchKernelEx")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """With kernels that "compile", for a platform that has them."""
    stub = Driver()
    monkeypatch.setattr(compiler, "driver", stub)
    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: type("Stream", (), {"cuda_stream": 0}))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(layer_by_layer, "compile_cubin", lambda *_: b"")
    of_blocks = block_gemm.KERNELS, block_gate_up_silu.KERNELS
    for kernels in (attention.PREFILL, attention.DECODE, gate_up_silu.KERNELS, qkv_rope_kv_write.KERNELS, *of_blocks):
        monkeypatch.setattr(kernels, "platform", hopper())
        monkeypatch.setattr(kernels, "kernel", lambda *_: compiler.Kernel(b"", "stub"))
    monkeypatch.setattr(gate_up_silu, "FILLED", 0)
    compiler._tensor_map.cache_clear()
    yield stub
    compiler._tensor_map.cache_clear()  # of what the stub has made
    attention._prefill.cache_clear()
    attention._decode.cache_clear()


def bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8).clone()


class Watched:
    """Memory that must be what it was: what an object holds, and what is given beside it."""

    def __init__(self, *holders: Any):
        self.tensors = [t for holder in holders for t in _tensors(holder)]
        assert self.tensors
        self.before = [bits(t) for t in self.tensors]

    def unchanged(self) -> bool:
        return all(torch.equal(bits(t), b) for t, b in zip(self.tensors, self.before, strict=True))


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from _tensors(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from _tensors(value)
    elif hasattr(x, "__dict__"):
        yield from _tensors([value for value in vars(x).values() if isinstance(value, (Tensor, list, tuple, dict))])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


class Calls:
    """Each wrapper of a kernel for sm_90, with what it may write to."""

    def __init__(self) -> None:
        self.cache, self.batch = requests([(100, 40)], 2)
        self.q = random(40, 8, 128)
        self.singles = batches.build([batches.Span([0], 30, [1]), batches.Span([0], 64, [2, 0])], 64, CPU)

    def gate_up(self) -> tuple[Any, Any]:
        x, w, out = random(40, 48), weight(48, 48), random(40, 24)
        codes, scale = elementwise_codes(x, w)
        variant = gate_up_silu.VARIANTS[0]
        return (x, w, out), lambda: gate_up_silu.multiply(codes, scale, w.weight, w.scale, out, variant)

    def qkv(self) -> tuple[Any, Any]:
        x, w, q = random(40, 48), weight(12 * 128, 48), random(40, 8, 128)
        given = Quantized(*elementwise_codes(x, w))
        variant, rope = qkv_rope_kv_write.VARIANTS[0], Rope(None, torch.rand(256, 128), self.batch.rotary_rows)
        return (q, self.cache), lambda: qkv_rope_kv_write.write(given, w, q, rope, self.cache, self.batch, variant)

    def block_product(self) -> tuple[Any, Any]:
        (x, w), out = blocks(40, 48), random(40, 48)
        return (x, w, out), lambda: block_gemm.multiply(x, w, out, block_gemm.VARIANTS[0])

    def block_gate_up(self) -> tuple[Any, Any]:
        (x, w), (made, _), dense = blocks(40, 256), blocks(40, 16), random(40, 128)
        return (x, w, made, dense), lambda: block_gate_up_silu.multiply(x, w, dense, made, block_gate_up_silu.VARIANTS[0])

    def prefill(self) -> tuple[Any, Any]:
        kernel, out = PrefillAttention(compiler.Kernel(b"", "stub"), CPU), random(*self.q.shape)
        return (kernel, out, self.cache), lambda: kernel(self.q, out, self.cache, self.batch, 0, 1, 0.1)

    def decode(self) -> tuple[Any, Any]:
        kernel, out = DecodeAttention(compiler.Kernel(b"", "stub"), 4, CPU), random(2, 8, 128)
        kernel.parts.fill_(3)
        return (kernel, out, self.cache), lambda: kernel(self.q[:2], out, self.cache, self.singles, 2, 0.1)

    def attention(self) -> tuple[Any, Any]:
        return (self.q, self.cache), lambda: attention.attention(self.q, self.cache, self.batch, 0.1, None)

    def layer_megakernel_of_one_request(self) -> tuple[Any, Any]:
        decoder, residual = LayerMegakernels(parts(), hopper()), random(1, 512)
        return (decoder, residual), lambda: decoder.between(0, random(1, 512), residual)

    def layer_megakernel(self) -> tuple[Any, Any]:
        decoder, residual = LayerMegakernels(parts(), hopper()), random(2, 512)
        return (decoder, residual), lambda: decoder.between(0, random(2, 512), residual)


def elementwise_codes(x: Tensor, w: gpu.PackedScaledMM | gpu.PackedBlocks) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(x), w.reads.width, dtype=torch.float8_e4m3fn), torch.ones(len(x), 1)


def blocks(tokens: int, rows: int) -> tuple[Quantized, block_gemm.PackedBlocks]:
    """Codes of 128 columns, and a weight of as many."""
    w = block_gemm.PackedBlocks(quantize(torch.randn(rows, 128), FP8_BLOCK), 132)
    return Quantized(*elementwise_codes(random(tokens, 128), w)), w


WRAPPERS = [name for name in vars(Calls) if not name.startswith("_")]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_launches_nothing_and_leaves_memory_as_it_is(wrapper: str, driver: Driver) -> None:
    """Though it asks nothing; outside of the mode the same call launches once."""
    memory, call = getattr(Calls(), wrapper)()
    watched = Watched(*memory)
    with ops.compile_ahead(), launch.compile_ahead():
        call()
        assert driver.launches == 0
        assert watched.unchanged()
    call()
    assert driver.launches == 1


def test_a_whole_step_of_layers_launches_nothing(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """LayerMegakernels's norm, product and attention are others' kernels; its own and theirs are left out alike."""
    decoder, calls = LayerMegakernels(parts(), hopper()), Calls()
    seen: list[LayerParts[Any]] = []
    monkeypatch.setattr(gpu, "rms_norm", lambda x, *_: (x, x))
    monkeypatch.setattr(gpu.PackedScaledMM, "__call__", lambda self, x: random(len(x), self.n))
    monkeypatch.setattr(LayerMegakernels, "_attend", lambda self, layer, qkv, batch: seen.append(layer) or random(2, 512))
    with ops.compile_ahead(), launch.compile_ahead():
        decoder(random(2, 512), calls.singles)
    assert (len(seen), driver.launches) == (2, 0)
    decoder(random(2, 512), calls.singles)
    assert (len(seen), driver.launches) == (4, 2)


class Ranks:
    """A group of two whose collectives are counted."""

    size = 2

    def __init__(self) -> None:
        self.calls = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mul_(2)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        self.calls += 1
        return torch.cat([x, x + 1], dim)


@pytest.mark.parametrize("mode", [ops.compile_ahead, launch.compile_ahead, ahead.mode], ids=["ops", "triton", "mode"])
def test_ranks_do_not_wait_for_one_another(mode: Any) -> None:
    """On any platform, a CPU too; shapes are as they would be."""
    ops.bind(Platform(CPU, "test"))
    group, x = Ranks(), torch.ones(2, 3)
    with mode():
        assert torch.equal(ops.all_reduce(x, group), torch.ones(2, 3))
        assert ops.all_gather(x, group).shape == (2, 6)
        assert ops.all_gather(x, group, 0).shape == (4, 3)
    assert group.calls == 0
    assert torch.equal(ops.all_gather(x, group), torch.tensor([[1.0, 1, 1, 2, 2, 2]] * 2))
    assert torch.equal(ops.all_reduce(x, group), torch.full((2, 3), 2.0))
    assert group.calls == 2


def test_a_row_parallel_layer_reduces_by_the_op() -> None:
    from octavo.layers.linear import RowParallelLinear

    class Two(Ranks):
        rank = 0

    layer = RowParallelLinear("o_proj", 64, 32, bias=False, tp=Two())  # type: ignore[arg-type]
    layer.weight, layer.bias = gpu.PackedDense(QTensor(torch.randn(32, 32), None, BF16, (32, 32))), None
    x = torch.randn(3, 32)
    norm, residual = torch.rand(32), torch.randn(3, 32)
    with ops.compile_ahead():
        ops.finished(layer(x))
        ops.rms_norm(layer(x), norm, 1e-5)
    assert layer.tp.calls == 0
    total = 2 * ops.linear(x, layer.weight)
    assert torch.equal(ops.finished(layer(x)), total)
    assert layer.tp.calls == 1
    for found, expected in zip(
        ops.rms_norm(layer(x), norm, 1e-5, residual), ops.rms_norm(total, norm, 1e-5, residual), strict=True
    ):
        torch.testing.assert_close(ops.contract.values_of(found), ops.contract.values_of(expected), rtol=0, atol=0)
    assert layer.tp.calls == 2, "in one op with the norm"
    assert ops.table()["all_reduce_norm_quantize"] == "all_reduce, then rms_norm"


def test_the_mode_is_a_thread_s_own_and_ends_with_an_error() -> None:
    """Ranks may be threads of one process: another's compiling must not swallow this one's launches."""
    others: list[bool] = []

    def fail() -> None:
        thread = threading.Thread(target=lambda: others.append(ahead.is_on()))
        thread.start()
        thread.join()
        assert ahead.is_on()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), ahead.mode(), ahead.mode():
        fail()
    assert others == [False]
    assert not ahead.is_on()
    with ahead.mode():
        with ahead.mode():
            pass
        assert ahead.is_on()


def test_no_wrapper_asks() -> None:
    """What looks at the mode is listed here."""
    from pathlib import Path

    root = Path(ops.__file__).parent
    asking = {str(path.relative_to(root)) for path in root.rglob("*.py") if "is_on()" in path.read_text()}
    assert asking == {"__init__.py", "ahead.py", "triton/launch.py", "hopper/compile.py", "triton/routing.py"}


def test_an_undefined_argmax_can_be_indexed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks look up the value of their largest logit, which no kernel has found then."""
    monkeypatch.setitem(ops._bound, "argmax", lambda x: torch.full(x.shape[:1], 1 << 40))
    ranks = Vocabulary(14, TensorParallel(1, 2, Unheard()))
    with ahead.mode():
        assert ranks.argmax(random(3, 7)).shape == (3,)
