"""Experts by the C kernels, with every instruction set that this CPU has: against the kernels' own product of one weight, which
test_native.py holds against float64, and against the reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from ops.cases import on_each_instruction_set, over
from ops.test_experts import ROUTERS, decode_batch
from ops.test_linear import activations

import octavo
from octavo.ops import reference
from octavo.ops.contract import Routed
from octavo.ops.cpu import experts, library, native
from octavo.platform import Platform
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_W8A16, QTensor, Scheme, concat, quantize
from octavo.quant.qtensor import Stacker

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")

CPU = Platform(torch.device("cpu"), "test")
FORMATS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
dtypes = over("dtype", [torch.float32, torch.bfloat16])


def stacks(n: int, k: int, count: int) -> Iterator[QTensor]:
    """In every scheme and every format of codes; the last one's tiles are a row high, as gate and up projections' may be."""

    def stack(scheme: Scheme, dtype: torch.dtype) -> QTensor:
        made = Stacker(count)
        for e in range(count):
            w = torch.randn(n, k) * 4.0 ** (e % 3)
            one = quantize(w if scheme.quantized else w.to(dtype), scheme, dtype)
            made.put(e, one.padded(16))
        return made.finished()

    for dtype in FORMATS:
        for scheme in (FP8_PER_CHANNEL, FP8_BLOCK, FP8_W8A16):
            yield stack(scheme, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        yield stack(BF16, dtype)
    made = Stacker(count)
    for e in range(count):
        made.put(e, concat([quantize(torch.randn(rows, k), FP8_BLOCK) for rows in (n // 2, n - n // 2)]))
    yield made.finished()


@on_each_instruction_set
@dtypes
@over("shape", [(40, 200), (33, 64), (130, 257)])
def test_each_expert_has_what_it_alone_gives(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Bit for bit: no rows, a few, a panel's, more than a panel's; of tokens and of pairs; some pairs wake none."""
    n, k = shape
    sizes = (3, 0, 1, 16, 35, 4, 0, 5)
    pairs = torch.cat([torch.full((size,), e) for e, size in enumerate(sizes)] + [torch.full((2,), -1)])
    pairs = pairs[torch.randperm(len(pairs))].int().view(-1, 2)
    at = experts.dispatch(pairs, len(sizes))
    x = activations(len(pairs), k, dtype)
    by_pair = torch.cat([x, x], 1)[:, 7 : 7 + k][at.order.long() // 2]  # other values than of_tokens reads, in other places
    for q in stacks(n, k, len(sizes)):
        assert experts.NativeStack().supports(q, CPU) is None
        packed = experts.NativeStack().pack(q, CPU)
        assert packed.held_bytes == q.nbytes + packed.data.nbytes - q.data.nbytes
        assert packed.struct.tiled or packed.data is q.data
        for rows, of_tokens in ((x[at.order.long() // 2], True), (by_pair, False)):
            y = packed(x if of_tokens else by_pair, at, of_tokens=of_tokens)
            assert (y.dtype, y.shape) == (dtype, (len(at.order), n))
            for e, size in enumerate(sizes):
                part = slice(int(at.starts[e]), int(at.starts[e]) + size)
                assert torch.equal(y[part], native.PackedNative(q.expert(e))(rows[part])), (q.scheme.name, q.data.dtype, e)


@on_each_instruction_set
@over("shape", [(128, 192), (64, 100), (40, 64)])
def test_a_stack_that_is_given_away_is_packed_in_its_memory(shape: tuple[int, int]) -> None:
    """So that loading does not hold it twice; not where the order of matrix tiles takes more memory than the rows."""
    n, k = shape
    at, x = experts.dispatch(torch.randint(5, (20, 2)).int(), 5), torch.randn(20, k).bfloat16()
    for q in stacks(n, k, 5):
        want, before = experts.NativeStack().pack(q, CPU)(x, at, of_tokens=True), q.data.data_ptr()
        packed = experts.NativeStack().take(q, CPU)
        assert torch.equal(packed(x, at, of_tokens=True), want)
        fills_blocks = n % native.TILE == 0 and k % native.TILE == 0
        assert (packed.data.data_ptr() == before) == (fills_blocks or not packed.struct.tiled)


@over("scheme", [BF16, FP8_PER_CHANNEL])
def test_a_stack_packed_for_tiles_is_not_read_without_them(scheme: Scheme) -> None:
    if library.use("amx") is None:
        pytest.skip("needs a CPU with amx")
    q = quantize(torch.randn(70, 130).bfloat16(), scheme)
    made = Stacker(1)
    made.put(0, q)
    packed, at = experts.NativeStack().pack(made.finished(), CPU), experts.dispatch(torch.zeros(3, 1).int(), 1)
    try:
        library.use("portable")
        with pytest.raises(RuntimeError, match="packed for matrix tiles"):
            packed(torch.randn(3, 130), at, of_tokens=True)
    finally:
        library.use(None)


@on_each_instruction_set
@over("sizes", [(600, 3), (1, 1023, 20), (520, 0, 520), tuple(range(90))])
def test_more_rows_than_are_computed_together(sizes: tuple[int, ...]) -> None:
    q = next(iter(stacks(18, 70, len(sizes))))
    at = experts.dispatch(torch.cat([torch.full((size, 1), e) for e, size in enumerate(sizes)]).int(), len(sizes))
    x = torch.randn(sum(sizes), 70)
    y, start = experts.NativeStack().pack(q, CPU)(x, at, of_tokens=True), 0
    for e, size in enumerate(sizes):
        assert torch.equal(y[start : start + size], native.PackedNative(q.expert(e))(x[start : start + size]))
        start += size


@on_each_instruction_set
def test_the_number_of_threads_changes_no_bit() -> None:
    q, pairs, before = next(iter(stacks(130, 257, 9))), torch.randint(9, (20, 3)).int(), torch.get_num_threads()
    at, x, found = experts.dispatch(pairs, 9), torch.randn(20, 257), []
    packed = experts.NativeStack().pack(q, CPU)
    for count in (1, 2, 7, 64):
        torch.set_num_threads(count)
        found.append(packed(x, at, of_tokens=True))
    torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@on_each_instruction_set
@dtypes
@over("held", [torch.float32, torch.bfloat16])
@over("name", ROUTERS)
def test_routes(name: str, held: torch.dtype, dtype: torch.dtype) -> None:
    """Scores are of FP32 sums whatever the dtypes are, so near ones, which BF16 would make equal, keep their order."""
    router, x, w = ROUTERS[name], torch.randn(21, 300).to(dtype), torch.randn(12, 300).to(held) / 300**0.5
    w[5] = w[2] * (1 + 2**-9) if held is torch.float32 else w[2]
    wide = torch.cat([x, x], 1)[:, :300]  # rows that lie apart
    for bias in (None, torch.randn(12) * 0.1):
        found, expected = (op.route(wide, w, bias, router, decode_batch(21, CPU.device)) for op in (experts, reference))
        assert torch.equal(found.experts, expected.experts)
        assert (found.experts.dtype, found.weights.dtype) == (torch.int32, torch.float32)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-8)


@over("pairs", [(0, 3), (1, 1), (5, 8), (200, 4)])
def test_dispatches_as_the_reference_does(pairs: tuple[int, int]) -> None:
    to = torch.randint(-1, 13, pairs).int()
    for asked in (to, to.repeat(1, 2)[:, : pairs[1]], torch.full(pairs, -1, dtype=torch.int32)):
        found, expected = (op.dispatch(asked, 13) for op in (experts, reference))
        assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
        assert found.top_k == expected.top_k


@on_each_instruction_set
@dtypes
@over("width", [1, 24, 128, 300])
def test_sums(width: int, dtype: torch.dtype) -> None:
    """What lies behind the pairs that wake an expert is not read, and a weight that is no number spoils its token alone."""
    to = torch.randint(0, 6, (40, 3)).int()
    to[7], to[9, 1] = -1, -1
    at, weights = experts.dispatch(to, 6), torch.rand(40, 3)
    y = torch.randn(120, width).to(dtype)
    y[int(at.starts[-1]) :] = float("nan")
    weights[11, 2] = float("nan")
    found, expected = (op.combine(y, Routed(to, weights), at) for op in (experts, reference))
    assert found.dtype is dtype
    assert found[11].isnan().all()
    good = torch.arange(40) != 11
    assert relative_error(found[good], expected[good]) < (4e-3 if dtype is torch.bfloat16 else 2e-7)
    assert not found[7].any()


# Weights of which only one expert's may be read: the system stops a process that reads another's.
GUARDED = """
import ctypes, mmap, torch
from octavo.ops.cpu import experts, library
from octavo.platform import Platform
from octavo.quant import FP8_PER_CHANNEL, QTensor
SIZE = 64 * mmap.PAGESIZE
memory = torch.frombuffer(mmap.mmap(-1, 8 * SIZE), dtype=torch.uint8).fill_(56)
data = memory.clone().view(torch.float8_e4m3fn).view(8, -1, 512)
n = data.shape[1]
libc, at = ctypes.CDLL(None, use_errno=True), memory.data_ptr()
for e in set(range(8)) - {3}:
    assert libc.mprotect(ctypes.c_void_p(at + e * SIZE), ctypes.c_size_t(SIZE), 0) == 0
for name in ("portable", "avx2", "avx2_shift", "avx512", "avx512_bf16", "amx"):
    library.use(name)  # or, where this CPU lacks it, the one before
    packed = experts.PackedNativeStack(QTensor(data, torch.ones(8, n, 1), FP8_PER_CHANNEL, (8, n, 512)))
    assert packed.data.nbytes == memory.nbytes  # all codes are one code, in whichever order
    packed.struct.weight = at
    for tokens in (1, 4, 40):
        x = torch.ones(tokens, 512)
        y = packed(x, experts.dispatch(torch.full((tokens, 1), 3, dtype=torch.int32), 8), of_tokens=True)
        assert torch.allclose(y, torch.full_like(y, 512.0)), y
print("read one")
"""


def test_only_experts_in_use_are_read() -> None:
    """With every instruction set, one after another."""
    root = Path(octavo.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (0, "read one\n"), done.stderr


def test_stacks_that_are_not_theirs_are_refused() -> None:
    q = next(iter(stacks(16, 32, 3)))
    assert "widened" in str(experts.NativeStack().supports(q, Platform(CPU.device, "test", widened_dtype=torch.float32)))
    q.data.view(torch.uint8)[2, 15, 31] = 0x7F
    assert experts.NativeStack().supports(q, CPU) == "codes that are not numbers"
