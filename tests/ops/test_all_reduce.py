"""Sums over ranks by all_reduce.cu, against the library's in FP32; that it compiles, and what it is not for, without GPUs."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from ctypes import c_uint64
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch.multiprocessing.spawn import spawn

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo import ops
from octavo.distributed import TensorParallel, Unheard, file_store, join, leave
from octavo.ops import gpu, reference
from octavo.ops.contract import CodeFormat, PackedWeight, Quantized
from octavo.ops.gpu import PackedScaledMM
from octavo.ops.hopper import all_reduce, megakernel_layers, peer_buffers
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper.compile import NoKernel
from octavo.ops.hopper.peer_buffers import PeerBuffers
from octavo.platform import Platform, detect
from octavo.quant.scheme import Granularity
from tests.ops.megakernels import dumped, parts
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SM_90 = Platform(CPU, "sm_90", multiprocessors=132)


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize("ranks", [2, 8])
def test_it_compiles(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: 16 bytes at a time to and from memory that devices share, nothing in local memory."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    kernels = all_reduce.kernels(ranks)
    for variant in kernels.variants:
        options = dict(zip(kernels.options, variant, strict=True))
        stacks, code = dumped(compiler.compile_cubin("all_reduce.cu", "sm_90a", options), tmp_path)
        assert stacks == ["0", "0"]
        assert "STG.E.128.STRONG.SYS" in code
        assert "LDG.E.128.STRONG.SYS" in code
        assert "STL" not in code


class Recorder:
    """In the place of a kernel: what it was launched with."""

    def __init__(self) -> None:
        self.launched = list[tuple[int, int, Any]]()

    def launch(self, ctas: int, arguments: Any, *, early: bool, threads: int) -> None:
        assert early
        self.launched.append((ctas, threads, arguments))


def recorded(ranks: int, monkeypatch: pytest.MonkeyPatch, half: int = all_reduce.HALF) -> all_reduce.AllReduce:
    monkeypatch.setattr(all_reduce.launch, "device_units", lambda: 132)
    buffers = PeerBuffers([4096 * (rank + 1) for rank in range(ranks)], 2 * half, 1)
    kernels: Any = [Recorder() for _ in range(3)]
    return all_reduce.AllReduce(TensorParallel(1, ranks, Unheard()), kernels, buffers, CPU)


def test_what_it_is_launched_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for a row's width, CTAs that are all resident, two shots for large sums of more than two ranks."""
    bf16 = torch.bfloat16
    for ranks, rows, width, ctas, threads, vectors, two in (
        (2, 1, 8, 1, 32, 1, False), (2, 300, 4096, 264, 512, 1, False), (2, 300, 8192, 132, 1024, 1, False),
        (4, 15, 8192, 15, 1024, 1, False), (4, 16, 8192, 16, 1024, 1, True), (4, 3, 16384, 3, 1024, 2, False),
        (8, 1, 8200, 1, 544, 2, False),
    ):  # fmt: skip
        kernel, x = recorded(ranks, monkeypatch), torch.zeros(rows, width, dtype=bf16)
        assert kernel.refusal(x) is None
        kernel(x, x)
        found, idle = kernel.sum[vectors - 1], kernel.sum[2 - vectors]
        assert isinstance(found, Recorder)
        assert isinstance(idle, Recorder)
        (launched,), arguments = found.launched, found.launched[0][2]
        assert not idle.launched
        assert launched[:2] == (ctas, threads)
        assert (arguments.rows, arguments.width, arguments.groups, bool(arguments.two_shots)) == (rows, width, 0, two)
        assert arguments.x == arguments.sum == x.data_ptr()
        assert list(arguments.at.buffers) == [4096 * (rank + 1) for rank in range(ranks)] + [None] * (8 - ranks)
        assert (arguments.at.rank, arguments.at.half) == (1, all_reduce.HALF)


def test_sums_that_buffers_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several calls, each for the next rows of all that it reads and writes."""
    kernel, x = recorded(4, monkeypatch, half=4 * 16384 * 20), torch.zeros(47, 8192, dtype=torch.bfloat16)
    residual, total, scale = torch.zeros_like(x), torch.empty_like(x), torch.zeros(47, 64)
    kernel(x, total, residual, x[0], 1e-5, None, Quantized(torch.zeros(47, 8192, dtype=torch.float8_e4m3fn), scale))
    found = [arguments for _, _, arguments in kernel.sum[0].launched]  # type: ignore[attr-defined]
    assert [arguments.rows for arguments in found] == [20, 20, 7]
    assert [arguments.two_shots for arguments in found] == [1, 1, 1]
    for name, given in dict(x=x, residual=residual, sum=total, scales=scale).items():
        assert [getattr(arguments, name) for arguments in found] == [given[at].data_ptr() for at in (0, 20, 40)]
    assert {(arguments.weight, arguments.dense, arguments.groups) for arguments in found} == {(x.data_ptr(), None, 64)}


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = recorded(4, monkeypatch)

    def reason(*shape: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return str(kernel.refusal(torch.zeros(*shape, dtype=dtype)))

    assert reason(16, 8192) == "None"
    assert "BF16" in reason(16, 8192, dtype=torch.float32)
    assert "BF16" in reason(2, 3, 64)
    assert "BF16" in str(kernel.refusal(torch.zeros(16, 64, dtype=torch.bfloat16).mT))
    assert "rows of 12" in reason(2, 12)
    assert "rows of 16392" in reason(1, 16392)
    assert "16 bytes" in str(kernel.refusal(torch.zeros(65, dtype=torch.bfloat16)[1:].view(1, 64)))


def test_ops_are_composed_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks without buffers, and values that the kernel does not take."""
    tp, x = TensorParallel(0, 2, Unheard()), torch.randn(3, 64)
    assert all_reduce.all_reduce(x, tp) is x
    assert all_reduce.all_reduce_norm_quantize(x, tp, torch.ones(64), 1e-5) is None
    assert all_reduce.argmax_over_ranks(x, tp) is None
    kernel = recorded(2, monkeypatch)
    assert tp.group is not None
    monkeypatch.setitem(all_reduce._connected, tp.group, kernel)
    assert all_reduce.all_reduce(x, tp) is x
    assert all_reduce.all_reduce_norm_quantize(x, tp, torch.ones(64), 1e-5) is None
    assert all_reduce.argmax_over_ranks(x, tp) is None
    assert not any(one.launched for one in (*kernel.sum, kernel.choose))  # type: ignore[attr-defined]
    x = x.bfloat16()
    act, total = found = all_reduce.all_reduce_norm_quantize(x, tp, torch.ones(64).bfloat16(), 1e-5, x.clone(), (codes(64),))
    assert found is not None
    assert act.dense is None
    assert act.quantized is not None
    assert act.quantized.scale.shape == (3, 1)
    assert total.shape == x.shape
    act, _ = all_reduce.all_reduce_norm_quantize(x, tp, torch.ones(64).bfloat16(), 1e-5, None, (codes(80),))  # padded
    assert act.quantized is None
    assert act.dense is not None


def codes(width: int, granularity: Granularity = Granularity.ROW) -> PackedWeight:
    """A reader of codes."""
    reader = PackedWeight()
    reader.reads = CodeFormat(torch.float8_e4m3fn, granularity, width)
    return reader


class Driver:
    """In the driver's place: memory of several ranks, which are threads. `failing`: a call, and the rank on which it fails."""

    def __init__(self, failing: tuple[str, int] | None = None):
        self.failing, self.lock = failing, threading.Lock()
        self.allocated, self.opened, self.closed, self.freed = (list[int]() for _ in range(4))

    def __call__(self, call: str, *args: Any) -> None:
        rank = RANK.rank
        if self.failing == (call, rank):
            raise NoKernel(f"{call} failed with CUDA error 1")
        with self.lock:
            if call == "cuMemAlloc_v2":
                args[0]._obj.value = rank + 1
                self.allocated.append(rank + 1)
            elif call == "cuIpcGetMemHandle":
                args[0]._obj.reserved[0] = args[1].value
            elif call == "cuIpcOpenMemHandle_v2":
                args[0]._obj.value = 100 * (rank + 1) + args[1].reserved[0]
                self.opened.append(args[0]._obj.value)
            elif call in ("cuIpcCloseMemHandle", "cuMemFree_v2"):
                assert isinstance(args[0], c_uint64)
                (self.closed if call.startswith("cuIpc") else self.freed).append(args[0].value)


class _Rank(threading.local):
    rank = -1


RANK = _Rank()


def connected(driver: Driver, monkeypatch: pytest.MonkeyPatch, refusing: int | None = None) -> list[PeerBuffers | str]:
    monkeypatch.setattr(peer_buffers, "driver", driver)

    def run(tp: TensorParallel) -> PeerBuffers | str:
        RANK.rank = tp.rank
        return peer_buffers.connect(tp, 1 << 10, 7, "not this one" if tp.rank == refusing else None)

    return run_ranks(3, run)


def test_buffers_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks have them, or none: what one has opened and allocated is closed and freed then."""
    driver = Driver()
    found = connected(driver, monkeypatch)
    assert all(isinstance(one, PeerBuffers) for one in found)
    assert [one.addresses for one in found if isinstance(one, PeerBuffers)] == [[1, 102, 103], [201, 2, 203], [301, 302, 3]]
    for failing in (("cuMemAlloc_v2", 1), ("cuIpcGetMemHandle", 2), ("cuIpcOpenMemHandle_v2", 0)):
        driver = Driver(failing)
        (reason,) = set(connected(driver, monkeypatch))
        assert failing[0] in str(reason)
        assert sorted(driver.opened) == sorted(driver.closed)
        assert sorted(driver.allocated) == sorted(driver.freed)
    driver = Driver()
    assert set(connected(driver, monkeypatch, refusing=1)) == {"not this one"}
    assert sorted(driver.allocated) == sorted(driver.freed) == [1, 3]


def test_megakernels_are_of_one_rank() -> None:
    kinds = (PackedScaledMM,)
    assert megakernel_layers.unfit(parts(), kinds) in (None, compiler.missing())
    assert megakernel_layers.unfit(parts()._replace(ranks=2), kinds) in ("several ranks share each layer", compiler.missing())


def test_a_reason_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a device without the kernels agree on it."""
    reasons = run_ranks(2, lambda tp: all_reduce.connect(Platform(CPU, "sm_80"), tp))
    assert set(reasons) == {"sm_80 has no matrix instructions of a group of warps as sm_90 has them"}


SHAPES = [(1, 8), (1, 4096), (3, 8192), (16, 8192), (33, 5120), (7, 16384), (130, 4096), (300, 2880), (9000, 4096), (0, 64)]


def on_ranks(rank: int, size: int, directory: str) -> None:
    """One rank's process: joins the others on its GPU and goes through the checks below."""
    platform = detect("cuda", rank, size)
    tp = join(rank, size, partial(file_store, f"{directory}/ranks", size), directory, platform.device)
    ops.bind(platform, tp)
    kernel = all_reduce.connected(tp)
    assert kernel is not None, ops.table()
    torch.manual_seed(rank)
    with torch.device(platform.device), torch.inference_mode():
        for check in (sums, norms, choices, thousands):
            check(kernel, tp)
    torch.cuda.synchronize()
    leave()


def shots(tp: TensorParallel) -> Iterator[bool]:
    """Sums in one shot and, of more than two ranks, in two."""
    before = all_reduce.TWO_SHOTS
    for two in [False, True][: max(1, tp.size - 1)]:
        all_reduce.TWO_SHOTS = -1 if two else 1 << 60
        yield two
    all_reduce.TWO_SHOTS = before


def sums(kernel: all_reduce.AllReduce, tp: TensorParallel) -> None:
    """Those of FP32 in the order of ranks, rounded; the same bits on every rank; NaN and infinity come through."""
    for (rows, width), _ in itertools.product(SHAPES, shots(tp)):
        x = torch.randn(rows, width).bfloat16()
        x[:1, :2] = -0.0
        x[-1:, -1:] = [torch.nan, torch.inf][rows % 2] if tp.rank else 1.0
        out = torch.full_like(x, torch.nan)
        assert kernel.refusal(x) is None
        if rows:
            kernel(x, out)
        total = torch.zeros(rows, width)
        assert tp.group is not None
        for one in tp.group.all_gather(x):
            total += one.float()
        assert torch.equal(out.nan_to_num(7), total.bfloat16().nan_to_num(7))
        library = x.float()
        torch.distributed.all_reduce(library)
        assert rows == 0 or relative_error(out[:, :-1].float(), library[:, :-1]) < 2**-8
        assert torch.equal(ops.all_reduce(x.clone(), tp).view(torch.int16), out.view(torch.int16))
        bits = out.view(torch.uint8)  # NCCL knows no 16-bit integers
        assert all(torch.equal(one, bits) for one in tp.group.all_gather(bits))


def norms(kernel: all_reduce.AllReduce, tp: TensorParallel) -> None:
    """Residual add, RMSNorm and codes are those of the ops apart, in each form that readers ask for."""
    for (rows, width), _ in itertools.product([s for s in SHAPES if s[0]], shots(tp)):
        x = torch.randn(rows, width).bfloat16()
        torch.manual_seed(rows)
        residual, weight = torch.randn(rows, width).bfloat16(), torch.randn(width).bfloat16()
        torch.manual_seed(rows + 1 + tp.rank)
        total = ops.all_reduce(x.clone(), tp)
        forms: list[tuple[PackedWeight | None, ...]] = [(), (codes(width),), (None, codes(width))]
        if width % 128 == 0:
            forms.append((codes(width, Granularity.BLOCK),))
        for readers, given in itertools.product(forms, (residual, None)):
            found = all_reduce.all_reduce_norm_quantize(x.clone(), tp, weight, 1e-5, given, readers)
            assert found is not None
            act, carried = found
            (expected, _), (_, want) = (gpu.rms_norm(total, weight, 1e-5, given, r) for r in ((), readers))
            dense, reads = expected.values(), readers[-1].reads if readers and readers[-1] is not None else None
            assert torch.equal(carried, want)
            assert (act.dense is None) == (readers not in ((), forms[2]))
            assert act.dense is None or relative_error(act.dense.float(), dense.float()) < 1e-3
            if reads is not None:
                assert act.quantized is not None
                ref, scale = reference.quantize_activation(dense, reads.granularity, reads.dtype)
                assert relative_error(act.quantized.scale, scale) < 1e-3
                assert (act.quantized.codes.view(torch.uint8) != ref.view(torch.uint8)).float().mean() < 0.01


def choices(_: all_reduce.AllReduce, tp: TensorParallel) -> None:
    """The first of the largest over all ranks' parts, NaN above all."""
    for rows in (1, 5, 256, 700):
        logits = torch.randint(-50, 50, (rows, 1003)).bfloat16()  # the largest recurs
        if tp.rank == tp.size - 1:
            logits[0, 700] = torch.nan
        found = ops.argmax_over_ranks(logits, tp)
        whole = tp.all_gather(logits).float()
        assert torch.equal(found, torch.where(whole.isnan(), torch.inf, whole).argmax(-1))


def thousands(_: all_reduce.AllReduce, tp: TensorParallel) -> None:
    """Launches of many sizes, with delays of each rank: nobody reads what an earlier call has left, in graphs neither."""
    alike, own = random.Random(0), random.Random(tp.rank)
    wrong = torch.zeros((), dtype=torch.int64)

    def check(x: torch.Tensor, number: int) -> None:
        wrong.add_((x != sum(number + rank for rank in range(tp.size))).sum())

    def delay() -> None:
        if own.random() < 0.3:
            torch.cuda._sleep(own.randrange(1, 60000))

    for number in range(3000):
        rows, width = alike.choice([1, 2, 5, 17, 64, 200]), alike.choice([256, 4096, 8192, 12288])
        all_reduce.TWO_SHOTS = alike.choice([-1, 1 << 60])
        x = torch.full((rows, width), float(number % 30 + tp.rank), dtype=torch.bfloat16)
        delay()
        check(ops.all_reduce(x, tp), number % 30)
    given = [torch.empty(rows, 4096, dtype=torch.bfloat16) for rows in (1, 3, 40)]
    replay, summed, _ = ops.capture(lambda: [ops.all_reduce(x.clone(), tp) for x in given])
    for number in range(1000):
        for x in given:
            x.fill_(float(number % 30 + tp.rank))
        delay()
        replay()
        for x in summed:
            check(x, number % 30)
    assert not int(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("size", [2, 4])
def test_on_gpus(size: int, tmp_path: Path) -> None:
    if size > torch.cuda.device_count():
        pytest.skip(f"needs {size} GPUs")
    spawn(on_ranks, (size, str(tmp_path)), nprocs=size)
