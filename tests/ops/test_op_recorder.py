"""A recorded step computes again what was called, C kernels' work and torch's, from what its tensors hold then."""

from __future__ import annotations

import ctypes
import gc
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from ops.caches import Scale, layer_cache
from torch import Tensor

from octavo import batch as batches
from octavo.kvcache import KVCache, LayerCache, Layout, spec_for
from octavo.ops import reference
from octavo.ops.contract import PackedWeight, Rope
from octavo.ops.cpu import library, native, op_recorder
from octavo.ops.cpu.op_recorder import Arena, capture, launch
from octavo.platform import Platform
from octavo.quant import FP8_PER_CHANNEL, quantize


def weight(n: int, k: int) -> PackedWeight:
    return native.Native().pack(quantize(torch.randn(n, k), FP8_PER_CHANNEL), Platform(torch.device("cpu"), "test"))


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
def test_kernels_run_again_with_what_is_there_now() -> None:
    """A gated layer in BF16, with a copy of the input at its place in memory."""
    up, down, norm = weight(96, 40), weight(40, 48), torch.rand(40).bfloat16()

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = native.rms_norm(x, norm, 1e-5, residual)
        y = down(native.silu_mul(up(normed)))
        return y, total

    x, residual = torch.randn(3, 40).bfloat16(), torch.randn(3, 40).bfloat16()
    replay, out, _ = capture(lambda: layer(x, residual))
    assert all(map(torch.equal, out, layer(x, residual)))  # the capture computed it
    for _ in range(2):
        x.normal_(), residual.normal_()
        replay()
        assert all(map(torch.equal, out, layer(x, residual)))


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
@pytest.mark.parametrize("scales", [(0.04, 0.02), ([0.04, 0.7], [0.02, 0.3])], ids=["layer", "heads"])
def test_a_replay_reads_the_scales_of_the_cache_as_they_are_then(scales: tuple[Scale, Scale]) -> None:
    """Of a decode step, which writes and attends; it is the recording that holds them."""
    spec = spec_for("fp8_e4m3", 2, 16, torch.float32, torch.float8_e4m3fn, Layout.BY_HEAD)
    views = [KVCache([spec], 4, 4, torch.device("cpu")).views[0] for _ in range(2)]
    batch = batches.build([batches.Span([0], 0, [1]), batches.Span([0], 2, [2])], 4, torch.device("cpu"))
    qkv, cos_sin = torch.randn(2, 8, 16), torch.randn(3, 16)

    def step(cache: LayerCache) -> Tensor:
        q = native.rope_write_kv(*qkv.split([4, 2, 2], 1), Rope(None, cos_sin, batch.rotary_rows), cache, batch.slot_mapping)
        return native.attention(q, cache, batch, 0.25, None)

    def record() -> tuple[Callable[[], None], Tensor, list[Tensor]]:
        cache = layer_cache(views[0], *scales)
        held = [cache.k_scale[:], cache.v_scale[:]]  # other tensors over the same memory
        return *capture(lambda: step(cache))[:2], held

    replay, out, held = record()
    for _ in range(3):
        for scale in held:
            scale.mul_(torch.rand(scale.shape) + 0.5)
        now = [scale.tolist() for scale in held]
        qkv.normal_()
        replay()
        assert torch.equal(out, step(layer_cache(views[1], *now)))
        assert all(torch.equal(views[0][name].view(torch.uint8), views[1][name].view(torch.uint8)) for name in "kv")


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
def test_a_recording_keeps_the_scales_of_its_cache() -> None:
    spec = spec_for("fp8_e4m3", 2, 16, torch.float32, torch.float8_e4m3fn, Layout.BY_HEAD)
    views = KVCache([spec], 4, 4, torch.device("cpu")).views[0]
    batch = batches.build([batches.Span([0], 2, [2])], 4, torch.device("cpu"))
    cache, q = layer_cache(views, 0.04, 0.02), torch.randn(1, 4, 16)
    kept = [weakref.ref(scale) for scale in cache[1:3]]
    replay, _, _ = capture(partial(native.attention, q, cache, batch, 0.25, None))
    del cache
    native._made_struct.cache_clear()
    gc.collect()
    assert all(ref() is not None for ref in kept)
    del replay
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_what_torch_computes_views_and_changes_is_run_again() -> None:
    table, memory = torch.randn(50, 8), torch.tensor([3, 4, 5, 6])
    chosen, place = memory[:2], memory[2:]

    def step() -> Tensor:
        rows = table[chosen] * 2
        left, right = rows.split([4, 4], 1)
        joined = left.flatten(0) + right.reshape(-1)
        chosen.copy_(place)
        return joined.view(2, 4)

    replay, out, _ = capture(step)
    for ids in ([5, 6], [9, 9], [9, 0]):
        at = torch.tensor(ids)
        memory[:2], memory[2:] = at, torch.tensor([1, 2])
        replay()
        assert torch.equal(out, 2 * table[at][:, :4] + 2 * table[at][:, 4:])
        assert memory.tolist() == [1, 2, 1, 2]


def test_recordings_share_their_memory() -> None:
    """Each keeps what it returned until another one runs; what a smaller one makes needs no room of its own."""
    x = torch.ones(1)

    def step(*sizes: int) -> list[Tensor]:
        return [x.new_empty(size, 7).copy_(x) for size in sizes]

    arena = None
    found = []
    for sizes in ((3, 100_000, 5), (1, 2), (100_000, 200_000), (1, 2, 3, 4)):
        replay, out, arena = capture(lambda sizes=sizes: step(*sizes), arena)
        found.append((replay, out))
        assert [part.shape for part in out] == [(size, 7) for size in sizes]
        regions = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in out)
        assert all(one[1] <= other[0] for one, other in pairwise(regions))
    assert isinstance(arena, Arena)
    assert found[1][1][0].data_ptr() == found[3][1][0].data_ptr()
    for number, (replay, out) in enumerate(found):
        x.fill_(number)
        replay()
        assert all((part == number).all() for part in out)


def test_larger_and_larger_steps_take_the_memory_of_the_largest() -> None:
    """What C kernels fill and what torch computes, of many sizes one after another, as a server meets them."""
    rows, arena = torch.ones(32, 65_536), None
    for size in range(1, 33):
        part = rows[:size]
        _, out, arena = capture(lambda part=part: [part * 2, part.new_empty(part.shape), part + 1], arena)
        assert isinstance(arena, Arena)
        within = [(chunk.data_ptr(), chunk.data_ptr() + chunk.nbytes) for chunk in arena.chunks]
        assert all(any(low <= one.data_ptr() < high for low, high in within) for one in out)
    assert arena is not None
    assert sum(chunk.numel() for chunk in arena.chunks) <= 3 * rows.nbytes + op_recorder.CHUNK


def test_a_step_that_looks_at_values_is_not_recorded() -> None:
    x = torch.ones(3)
    for step in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.max(0)):
        with pytest.raises(RuntimeError, match="could not repeat"):
            capture(step)
    capture(lambda: x + 1)  # and what was being recorded is not in the way


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
def test_which_models_are_recorded() -> None:
    """Not those whose attention or products torch would do with more memory, or more of Python's numbers, than a step has."""
    q = quantize(torch.randn(8, 8), FP8_PER_CHANNEL)
    assert native.captures(256, [weight(8, 8)], latent=False)
    assert not native.captures(257, [weight(8, 8)], latent=False)
    dequantizing = reference.ReferenceLinear().pack(q, Platform(torch.device("cpu"), "test"))
    assert not native.captures(64, [weight(8, 8), dequantizing], latent=False)


def test_a_kernel_without_memory_raises_in_a_replay_too() -> None:
    failing = [0]
    replay, _, _ = capture(lambda: launch(lambda: failing[0]))
    replay()
    failing[0] = -1
    for call in (replay, lambda: launch(lambda: failing[0])):
        with pytest.raises(MemoryError):
            call()


def test_a_profiler_sees_the_kernels_of_a_capture_and_of_its_replays() -> None:
    def octavo_kernel() -> None:
        pass

    with torch.profiler.profile(acc_events=True) as profiler:  # without it torch 2.11 warns on a GPU
        replay, _, _ = capture(lambda: launch(octavo_kernel))
        replay()
    assert {event.key: event.count for event in profiler.key_averages()}["octavo_kernel"] == 2


def test_another_thread_is_not_recorded() -> None:
    calls: list[str] = []

    def step() -> None:
        launch(calls.append, "mine")
        other = threading.Thread(target=launch, args=(calls.append, "another's"))
        other.start()
        other.join()

    replay, _, _ = capture(step)
    replay()
    assert calls == ["mine", "another's", "mine"]


def test_torchs_compiler_is_not_imported() -> None:
    """Which takes two seconds, of a start that takes three."""
    script = "import sys, torch; from octavo.ops.cpu.op_recorder import capture; capture(lambda: torch.ones(2) + 1)"
    subprocess.run([sys.executable, "-c", f"{script}; assert 'torch._dynamo' not in sys.modules"], check=True, timeout=60)


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
def test_neighbouring_kernels_are_one_call_with_the_same_arguments() -> None:
    """Every kernel that has a place in a replay: whole numbers, floats, addresses, none, and what byref made."""
    calls: list[tuple[object, tuple[object, ...]]] = []
    for name in library.REPLAYED:
        function = getattr(library.kernels(), name)
        values = [0.5 + i if kind is ctypes.c_float else i for i, kind in enumerate(function.argtypes)]
        calls.append((function, tuple(values)))
    held = library.Cache(dim=3)
    calls[0] = (calls[0][0], (None, ctypes.byref(held), *calls[0][1][2:]))
    _, (made, count) = library.merged_call(calls)
    assert count == len(library.REPLAYED) == len(made)
    for place, (call, (function, values)) in enumerate(zip(made, calls, strict=True)):
        assert call.kernel == place
        for word, value, kind in zip(call.word, values, function.argtypes, strict=False):
            if kind is ctypes.c_float:
                assert struct.unpack("<f", word.to_bytes(4, "little"))[0] == value
            elif isinstance(value, int):
                assert word == value
    assert made[0].word[:2] == [0, ctypes.addressof(held)]
