"""The C kernels: every path that this CPU can run, against float64, the reference's codes, and themselves."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import relative_error
from ops.caches import SCALES, Scale, layer_cache, with_padding
from ops.cases import INSTRUCTION_SETS, case, instruction_sets, on_each_instruction_set, over
from ops.sampled import SPREADS, check_draw
from ops.shapes import BATCHES, HEADS, LINEAR
from ops.test_attention import FP8, KV_DTYPES, expected_of, scene
from ops.test_linear import activations
from quant import float64
from quant.float64 import E4M3FN, E4M3FNUZ, E5M2, FORMATS, Format, array

from octavo.kvcache import KVCache, Layout, spec_for
from octavo.ops import reference
from octavo.ops.contract import Filters, HeadNorms, Rope
from octavo.ops.cpu import library, native
from octavo.platform import Platform, detect
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, FP8_W8A16, QTensor, Scheme, quantize

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")

CPU = Platform(torch.device("cpu"), "test")
QUANTIZED = [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK, FP8_W8A16]
# More tokens than a row at a time takes, than a panel holds, than one pass takes.
SHAPES = [*LINEAR, (2, 40, 64), (4, 7, 65), (5, 25, 31), (8, 24, 512), (9, 50, 513), (17, 100, 1100), (530, 30, 70)]
DTYPES = [torch.float32, torch.bfloat16]
dtypes = over("dtype", DTYPES)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bound(dtype: torch.dtype) -> float:
    return 4e-3 if dtype is torch.bfloat16 else 2e-6


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_an_instruction_set_is_there(name: str) -> None:
    """What each test here goes through are those that this CPU has."""
    if library.use(name) is None:
        pytest.skip(f"needs a CPU with {name}")
    assert name in instruction_sets()


@over("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_named_set_uses_what_it_has(dtype: torch.dtype) -> None:
    """Whether that is faster here or not; without a name, what was measured."""
    for name in instruction_sets():
        last = "tiles" if name == "amx" else "pairs" if name == "avx512_bf16" else "FP32"
        assert {library.way_of(dtype, m) for m in (1, 4, 16, 700)} == {last}
    assert {library.way_of(dtype, m) for m in (1, 4, 16, 700)} <= set(library.WAYS)


@over("shape", SHAPES)
@over("scheme, fmt", [*((scheme, E4M3FN) for scheme in QUANTIZED), (FP8_PER_CHANNEL, E4M3FNUZ), (FP8_BLOCK, E4M3FNUZ)])
def test_linear(shape: tuple[int, int, int], scheme: Scheme, fmt: Format) -> None:
    m, n, k = shape
    w = torch.randn(n, k)
    q = quantize(w, scheme, fmt.dtype).padded(16)
    for dtype in DTYPES:
        x = activations(m, k, dtype)
        expected = torch.from_numpy(float64.linear(array(x), array(w), scheme.name, fmt)) if m else None
        for name in instruction_sets():
            with case(dtype, name):
                check_linear(q, x, expected)


def check_linear(q: QTensor, x: torch.Tensor, expected: torch.Tensor | None) -> None:
    assert native.Native().supports(q, CPU) is None
    packed = native.Native().pack(q, CPU)
    tiles = [-(-size // native.TILE) * native.TILE for size in q.data.shape] if packed.struct.tiled else q.data.shape
    assert packed.held_bytes == q.nbytes + (tiles[0] * tiles[1] - q.data.numel()) * q.data.itemsize
    y = packed(x)
    assert (y.dtype, y.shape) == (x.dtype, (len(x), q.shape[0]))
    assert expected is None or relative_error(y, expected) < bound(x.dtype)


@on_each_instruction_set
@over("scheme", QUANTIZED)
@over("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2])
@over("m", [1, 3, 20])
def test_subnormal_codes_count(m: int, dtype: torch.dtype, scheme: Scheme) -> None:
    """A matrix of nothing else, for a caller whose own floats have no subnormal numbers."""
    k, n = 384, 40
    codes = torch.randint(1, 4 if dtype is torch.float8_e5m2 else 8, (n, k), dtype=torch.uint8)
    codes += 128 * torch.randint(0, 2, (n, k), dtype=torch.uint8)
    q = QTensor(codes.view(dtype), torch.ones(1, 3) if scheme is FP8_BLOCK else torch.ones(n, 1), scheme, (n, k))
    x = torch.randint(-8, 9, (m, k)).float()
    x[:, ::128] = 448.0 if dtype is torch.float8_e4m3fn else 224.0  # so that activations are codes as they are
    packed = native.Native().pack(q, CPU)
    assert torch.set_flush_denormal(True)
    try:
        y = packed(x)
        assert torch.tensor([1e-40]) * 1 == 0  # as it was
    finally:
        torch.set_flush_denormal(False)
    assert relative_error(y, x.double() @ codes.view(dtype).double().mT) < 2e-6


@on_each_instruction_set
@over("power", [2.0**16, 2.0**-60])
@over("scheme", QUANTIZED)
@over("m", [1, 4, 20])
def test_scales_of_any_size(m: int, scheme: Scheme, power: float) -> None:
    """A power of two in them is one in the result, bit for bit."""
    q, x = quantize(torch.randn(24, 384), scheme), torch.randn(m, 384)
    assert q.scale is not None
    other = QTensor(q.data, q.scale * power, scheme, q.shape)
    assert torch.equal(native.Native().pack(other, CPU)(x), native.Native().pack(q, CPU)(x) * power)


@on_each_instruction_set
@over("power", [2.0**40, 2.0**-40])
@over("rows", [[(0, 1), (300, 1)], [(5, 40)]])
def test_values_of_any_size_in_a_cache_with_scales(rows: list[tuple[int, int]], power: float) -> None:
    made = scene(rows, (4, 2, 32), "fp8_per_token_head", CPU, native)
    before = made.attend(0.2, None)
    made.views["v_scale"].mul_(power)
    assert torch.equal(made.attend(0.2, None), before * power)


@on_each_instruction_set
@over("fmt", [E4M3FN, E4M3FNUZ, E5M2])
@over("scheme", QUANTIZED)
@over("shape", [(67, 538, 128), (35, 290, 1100), (20, 33, 70), (130, 3, 64)])
def test_blocks_of_many_tokens(shape: tuple[int, int, int], scheme: Scheme, fmt: Format) -> None:
    """More rows and values than matrix tiles take at a time; weights small enough that some codes have no leading one."""
    m, n, k = shape
    x, w = activations(m, k, torch.bfloat16), torch.randn(n, k) * torch.logspace(-4, 0, k)
    q = quantize(w, scheme, fmt.dtype).padded(16)
    found = native.Native().pack(q, CPU)(x)
    if fmt is E5M2:
        assert relative_error(found, reference.ReferenceLinear().pack(q, CPU)(x).double()) < 2 * bound(found.dtype)
    else:
        assert relative_error(found, torch.from_numpy(float64.linear(array(x), array(w), scheme.name, fmt))) < bound(
            found.dtype
        )


@over("m", [1, 20])
@over("scheme", [BF16, FP8_PER_CHANNEL])
def test_a_weight_packed_for_tiles_is_not_multiplied_without_them(m: int, scheme: Scheme) -> None:
    """Its rows are looked up with any instructions."""
    if library.use("amx") is None:
        pytest.skip("needs a CPU with amx")
    q, ids = quantize(torch.randn(70, 130).bfloat16(), scheme), torch.arange(70)
    packed = native.Native().pack(q, CPU)
    try:
        library.use("portable")
        with pytest.raises(RuntimeError, match="packed for matrix tiles"):
            packed(torch.randn(m, 130))
        assert torch.equal(packed.rows(ids, torch.bfloat16), q.rows(ids, torch.bfloat16))
    finally:
        library.use(None)


@on_each_instruction_set
@dtypes
@over("fmt", [E4M3FN, E4M3FNUZ, E5M2])
@over("scheme", QUANTIZED)
@over("shape", [(1, 300), (130, 130), (538, 20)])
def test_rows_are_the_stored_weights(shape: tuple[int, int], scheme: Scheme, fmt: Format, dtype: torch.dtype) -> None:
    q = quantize(torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None], scheme, fmt.dtype)
    packed = native.Native().pack(q, CPU)
    for ids in (torch.randint(shape[0], (40,)), torch.tensor([shape[0] - 1, 0], dtype=torch.int32), torch.zeros(0).long()):
        assert torch.equal(packed.rows(ids, dtype), q.rows(ids, dtype))


@over("shape", SHAPES)
@over("held", [torch.bfloat16, torch.float32])
@dtypes
def test_dense(shape: tuple[int, int, int], held: torch.dtype, dtype: torch.dtype) -> None:
    m, n, k = shape
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(held)
    q, expected = quantize(w, BF16), torch.from_numpy(array(x) @ array(w).T)
    for name in instruction_sets():
        with case(name):
            y = native.Native().pack(q, CPU)(x)
            assert not m or relative_error(y, expected) < bound(dtype)


@on_each_instruction_set
@over("m", [4, 16])
@over("name", FORMATS)
def test_every_code_is_exact(name: str, m: int) -> None:
    """Weights of one code each, times tokens of one code each at a scale of 1: each result is one product."""
    fmt = FORMATS[name]
    codes = torch.arange(256, dtype=torch.uint8)
    codes[~torch.from_numpy(np.isfinite(fmt.values))] = 0
    q = QTensor(codes.view(16, 16).to(torch.uint8).view(fmt.dtype), torch.ones(16, 1), FP8_PER_CHANNEL, (16, 16))
    for start in range(0, 16, m):
        x = torch.eye(16)[start : start + m] * fmt.limit
        y = native.Native().pack(q, CPU)(x)
        expected = fmt.values[codes.numpy()].reshape(16, 16).T[start : start + m] * fmt.limit
        np.testing.assert_array_equal(array(y), expected)


@on_each_instruction_set
@dtypes
@over("m", [3, 40])
@over("fmt", [E4M3FN, E4M3FNUZ, E5M2])
def test_activations_have_the_reference_codes(fmt: Format, m: int, dtype: torch.dtype) -> None:
    """Times the identity, bit for bit; what is not a number stays within its token."""
    k = 150
    x = torch.cat([activations(m - 2, k, dtype), torch.full((2, k), 1e-7, dtype=dtype)])
    x[0] *= torch.logspace(-6, 0, k).to(dtype)  # over subnormal codes
    x[-1, 3], x[1, 5] = float("nan"), float("inf")
    one = quantize(torch.eye(k), FP8_PER_CHANNEL, fmt.dtype)
    one = QTensor(torch.eye(k).to(fmt.dtype), torch.ones(k, 1), FP8_PER_CHANNEL, one.shape)
    y = native.Native().pack(one, CPU)(x)
    codes, scale = reference.quantize_activation(x, FP8_PER_CHANNEL.activation, fmt.dtype)
    expected = (codes.float() * scale).to(dtype)
    finite = x.isfinite().all(1)
    assert torch.equal(y[finite], expected[finite])
    assert y[~finite].isnan().all()
    assert reference.ReferenceLinear().pack(one, CPU)(x)[~finite].isnan().all()


@on_each_instruction_set
@over("m", [1, 4, 5, 40])
def test_zero_rows_strides_and_e5m2(m: int) -> None:
    w = torch.randn(33, 70)
    w[4] = 0
    wide = torch.randn(m, 200)
    wide[m // 2] = 0
    for x in (wide[:, 7:77], wide.mT.contiguous().mT[:, 1:71]):
        q = QTensor(w.to(torch.float8_e5m2), torch.rand(33, 1) + 0.1, FP8_PER_CHANNEL, (33, 70))
        y, expected = (i.pack(q, CPU)(x) for i in (native.Native(), reference.ReferenceLinear()))
        assert not y[:, 4].any()
        assert not y[m // 2].any()
        assert m == 1 or relative_error(y, expected) < 2e-6


@over("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2])
def test_codes_that_are_not_numbers_are_found(dtype: torch.dtype) -> None:
    """Each code, wherever it lies among finite ones."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes.view(dtype).float().isfinite()
    others = codes[finite][torch.randint(0, int(finite.sum()), (23,))]
    for code in range(256):
        for count in (1, 7, 8, 9, 23):
            placed = others[:count].clone()
            placed[code % count] = code
            found = library.kernels().octavo_not_finite(placed.data_ptr(), count, library.KINDS[dtype])
            assert bool(found) != bool(finite[code])


def test_weights_that_are_not_theirs_are_refused() -> None:
    q = quantize(torch.randn(32, 64), FP8_PER_CHANNEL)
    q.data.view(torch.uint8)[31, 63] = 0x7F
    assert native.Native().supports(q, CPU) == "codes that are not numbers"
    assert "widened" in str(native.Native().supports(q, Platform(CPU.device, "test", widened_dtype=torch.float32)))
    assert native.Native().supports(quantize(torch.randn(4, 4).half(), BF16), CPU) is not None


def check_attention(
    rows: list[tuple[int, int]], heads: tuple[int, int, int], kv: str, window: int | None = None,
    dtype: torch.dtype = torch.float32, scales: tuple[Scale, Scale] = (0.04, 0.02),
) -> None:  # fmt: skip
    """The same requests with every instruction set, which writes the cache and attends over it, against float64."""
    seed, expected = int(torch.randint(1 << 30, ())), None
    for name in instruction_sets():
        with case(name):
            torch.manual_seed(seed)
            made = scene(rows, heads, kv, CPU, native, dtype, scales)
            if expected is None:
                expected = expected_of(made, kv, FP8.get(kv, E4M3FN), window)
            assert relative_error(made.attend(0.3, window), expected) < (2e-6 if dtype is torch.float32 else 5e-3)


@over("rows", [*BATCHES.values(), [(200, 1), (70, 40), (0, 100), (63, 3), (31, 2)]])
@over("window", [None, 5, 33])
@over("kv", KV_DTYPES)
def test_attention(rows: list[tuple[int, int]], window: int | None, kv: str) -> None:
    check_attention(rows, (4, 2, 16), kv, window)


@over("window", [None, 33])
@over("kv", KV_DTYPES)
def test_prompts_of_bf16(window: int | None, kv: str) -> None:
    """Which matrix tiles multiply: more query rows than a task takes, contexts before them, and a window."""
    check_attention([(200, 1), (70, 40), (0, 100), (63, 3)], (6, 2, 24), kv, window, torch.bfloat16)


@over("heads", [*HEADS, (3, 1, 10), (16, 1, 80), (2, 2, 256), (20, 1, 6)])
@over("kv", KV_DTYPES)
@dtypes
def test_heads(heads: tuple[int, int, int], kv: str, dtype: torch.dtype) -> None:
    check_attention(BATCHES["mixed"], heads, kv, dtype=dtype)


@over("rows", [BATCHES["mixed"], [(200, 1), (70, 40)]])
@over("heads", [(4, 2, 16), (10, 2, 20)])
@over("scales", SCALES)
@over("kv", KV_DTYPES)
def test_scales_of_a_layer_and_of_heads(rows: list[tuple[int, int]], heads: tuple[int, int, int], scales: str, kv: str) -> None:
    check_attention(rows, heads, kv, scales=SCALES[scales])


@on_each_instruction_set
@over("kv", KV_DTYPES)
@over("heads, dim", [(4, 16), (12, 20)])
@over("window", [None, 5])
def test_rows_without_a_context_are_zeros(window: int | None, heads: int, dim: int, kv: str) -> None:
    """As a graph has them, whose host knows no more of a context than a bound."""
    made = scene(BATCHES["decode"], (heads, 2, dim), kv, CPU, native)
    count, expected = len(made.queries), made.attend(0.3, window)
    made.queries.append(torch.full((3, heads, dim), float("nan")))
    made.batch = with_padding(made.batch, 3, scratch_block=0, bound=100)
    found = made.attend(0.3, window)
    assert torch.equal(found[:count], expected)
    assert not found[count:].any()


def test_heads_too_wide_go_to_torch() -> None:
    check_attention(BATCHES["mixed"], (2, 1, 300), "fp8_e4m3")


@on_each_instruction_set
@dtypes
@over("kv", [*KV_DTYPES, "fnuz"])
@over("layout", [Layout.PLAIN, Layout.BY_HEAD])
@over("scales", [(0.04, 0.02), ([0.04, 1.7, 0.013], [0.02, 0.31, 1.1])])
def test_the_cache_holds_what_the_reference_writes(
    scales: tuple[Scale, Scale], layout: Layout, kv: str, dtype: torch.dtype
) -> None:
    fp8 = torch.float8_e4m3fnuz if kv == "fnuz" else torch.float8_e4m3fn
    spec = spec_for("fp8_per_token_head" if kv == "fnuz" else kv, 3, 20, dtype, fp8, layout)
    caches = [KVCache([spec], 6, 4, CPU.device) for _ in range(2)]
    qkv = (torch.randn(9, 10, 20) * torch.logspace(-5, 3, 9)[:, None, None]).to(dtype)
    qkv[2, 3, 4], qkv[3, 8, 1], qkv[4, 7, 19], qkv[5] = float("nan"), float("inf"), float("-inf"), 0
    slots = torch.tensor([7, 3, 22, 23, 0, 11, 12, 13, 5])
    for cache, op in zip(caches, (native, reference), strict=True):
        op.write_kv(layer_cache(cache.views[0], *scales), slots, qkv[:, 4:7], qkv[:, 7:])
    assert torch.equal(*(cache.buffers[0] for cache in caches))


@on_each_instruction_set
@dtypes
@over("normed", [False, True])
@over("dim, rotated", [(2, 2), (80, 80), (64, 16), (256, 256), (300, 300)])
def test_from_the_product_to_attention(dim: int, rotated: int, normed: bool, dtype: torch.dtype) -> None:
    spec = spec_for("fp8_e4m3", 2, dim, dtype, torch.float8_e4m3fn)
    caches = [KVCache([spec], 6, 4, CPU.device) for _ in range(2)]
    q, k, v = torch.randn(5, 8, dim).to(dtype).split([4, 2, 2], 1)
    before, angles = q.clone(), torch.rand(50, rotated // 2) * 7
    norms = HeadNorms(torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-5) if normed else None
    rope = Rope(norms, torch.cat([angles.cos(), angles.sin()], 1), torch.tensor([0, 49, 3, 3, 17]))
    out = [
        op.rope_write_kv(q, k, v, rope, layer_cache(cache.views[0], 0.03, 0.02), torch.tensor([7, 3, 22, 23, 0]))
        for op, cache in zip((native, reference), caches, strict=True)
    ]
    assert torch.equal(q, before)
    assert relative_error(*out) < bound(dtype)
    keys, values = (
        [c.views[0][name].view(torch.uint8).view(torch.float8_e4m3fn).float() for c in caches] for name in ("k", "v")
    )
    assert relative_error(*keys) < 0.02  # a last bit before rounding to FP8 may be a code after it
    assert torch.equal(*values)


@on_each_instruction_set
@dtypes
@over("width", [1, 6, 128, 300])
def test_norms_and_activations(width: int, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(7, width).to(dtype), torch.randn(7, width).to(dtype), torch.randn(width).to(dtype)
    for more in (None, residual):
        y, carried = native.rms_norm(x, weight, 1e-5, more)
        expected, total = reference.rms_norm(x, weight, 1e-5, more)
        assert torch.equal(carried, total)
        assert relative_error(y.values(), expected.values()) < bound(dtype)
    heads = torch.randn(5, 4, width).to(dtype)[:, 1:3]
    found, expected = (op.rms_norm(heads, weight, 1e-5)[0].values() for op in (native, reference))
    assert relative_error(found, expected) < bound(dtype)
    both = torch.randn(9, 2 * width).to(dtype) * 20
    gate, up = both.double().chunk(2, 1)
    assert relative_error(native.silu_mul(both).values(), gate / (1 + (-gate).exp()) * up) < bound(dtype)
    spoiled = torch.tensor([[float("nan"), 0.0, 1.0, 1.0], [float("-inf"), float("inf"), 2.0, 3.0]]).to(dtype)
    assert torch.equal(*(op.silu_mul(spoiled).values().isfinite() for op in (native, reference)))


@on_each_instruction_set
@over("m", [1, 40])
def test_the_number_of_threads_changes_no_bit(m: int, threads: None) -> None:
    x, q = torch.randn(m, 700), quantize(torch.randn(301, 700), FP8_PER_CHANNEL)
    packed = native.Native().pack(q, CPU)
    made = scene(BATCHES["many"], (4, 2, 16), "fp8_e4m3", CPU, native)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append((packed(x), made.attend(0.3, None)))
    assert all(torch.equal(y, results[0][0]) and torch.equal(o, results[0][1]) for y, o in results)


@on_each_instruction_set
def test_calls_from_several_threads_and_after_a_fork(threads: None) -> None:
    torch.set_num_threads(2)
    packed = native.Native().pack(quantize(torch.randn(640, 512), FP8_PER_CHANNEL), CPU)
    xs = [torch.randn(m, 512) for m in (1, 3, 16, 40)]
    expected, wrong = [packed(x) for x in xs], []

    def work() -> None:
        for _ in range(30):
            wrong.extend(1 for x, y in zip(xs, expected, strict=True) if not torch.equal(packed(x), y))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    if not (child := os.fork()):
        # The kernels alone: torch's own threads do not survive a fork.
        y = torch.empty(16, 640)
        packed.multiply(packed.address, xs[2].data_ptr(), 16, 512, y.data_ptr(), 0, 2)
        os._exit(0 if torch.equal(y, expected[2]) else 1)
    assert os.waitpid(child, 0)[1] == 0


@on_each_instruction_set
@dtypes
@over("vocab", [1, 15, 77, 128, 300, 16_391])
def test_the_likeliest_token(vocab: int, dtype: torch.dtype) -> None:
    """The first of equal ones; NaN as if infinite; rows that lie apart; nothing but minus infinity."""
    x = torch.randn(9, vocab + 3).to(dtype)[:, :vocab]
    x[1, vocab // 2 :] = x[1].amax()
    x[2, vocab // 3] = float("nan")
    x[3] = -float("inf")
    x[4] = -3.0
    x[5, -1] = float("inf")
    assert native.argmax(x).tolist() == x.float().argmax(-1).tolist()
    assert native.argmax(x[:0]).shape == (0,)
    assert native.argmax(x.half()).tolist() == x.half().float().argmax(-1).tolist()


@over("vocab", [1, 15, 40, 1023, 16_391, 33_000])
@over("spread", SPREADS)
def test_a_token_that_is_drawn(vocab: int, spread: float) -> None:
    check_draw(native.sample, vocab, spread, ways=instruction_sets)


@on_each_instruction_set
def test_tokens_that_lie_close_together_are_kept_one_by_one() -> None:
    """Though there are more of them than blocks that have any."""
    x = torch.full((50, 4096), -float("inf"))
    x[:, 100:130] = torch.linspace(0, 1, 30)
    cut = Filters(torch.full((50,), 20, dtype=torch.int32), torch.ones(50), torch.zeros(50), 20)
    found = native.sample(x, torch.ones(50), torch.linspace(0, 0.9999, 50).double(), cut)
    assert sorted(set(found.tolist())) == list(range(110, 130))


def test_this_machine_uses_them() -> None:
    assert detect("cpu").widened_dtype is None
