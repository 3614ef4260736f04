"""Attention of single tokens by decode_attention.cu, against float64; and that it compiles where there is no GPU."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error
from ops.cases import over

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.kvcache import LayerCache
from octavo.ops.contract import HeadNorms, Rope
from octavo.ops.hopper import attention, decode
from octavo.ops.hopper import compile as compiler
from octavo.ops.triton.decode import New, decode_attention
from octavo.ops.triton.rope import rope_write_kv
from octavo.platform import Platform
from tests.ops.caches import layer_cache, with_padding
from tests.ops.megakernels import dumped
from tests.ops.paged import CACHES, cache_of, exact, needs_hopper, scene

CPU = torch.device("cpu")
GROUPS = [(32, 8), (4, 4), (14, 2), (24, 8), (8, 1)]  # query heads, KV heads
LENGTHS = {
    "one": [1],
    "blocks and one more": [64, 65, 63, 1, 130, 700],
    "long": [9000],
    "32": [1000 + 7 * i for i in range(32)],
    "more than programs": [64 * i + 1 for i in range(130)],
}


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize("heads", decode.HEADS)
@pytest.mark.parametrize("scales", [0, 1])
def test_it_compiles(heads: int, scales: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: FP8 matrix instructions of a group of warps, boxes from the cache itself, nothing in local memory."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    options = {"HEADS": heads, "PER_TOKEN_HEAD": scales}
    stacks, code = dumped(compiler.compile_cubin("decode_attention.cu", "sm_90a", options), tmp_path)
    assert stacks == ["0"]
    assert len(re.findall(rf"QGMMA\.64x{2 * heads}x32\.F32\.E4M3\.E4M3", code)) == 8
    assert "UTMALDG.5D" in code
    assert "UTMALDG.3D" in code
    assert "UTMASTG.3D" in code


def test_what_they_are_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither decode_attention.cu nor prefill_attention.cu."""
    monkeypatch.setattr(compiler, "missing", lambda: None)

    def reasons(
        cache: LayerCache,
        heads: int = 8,
        dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        window: int | None = None,
    ) -> str:
        q = torch.zeros(3, heads, dim, dtype=dtype)
        found = attention.prefill_refusal(q, cache, window), attention.decode_refusal(q, cache, window, 3)
        assert found[0] == found[1]
        return str(found[0])

    for kernels in (attention.PREFILL, attention.DECODE):
        monkeypatch.setattr(kernels, "platform", Platform(CPU, "sm_100"))
    assert "sm_100" in reasons(cache_of(2, 2))
    for kernels in (attention.PREFILL, attention.DECODE):
        monkeypatch.setattr(kernels, "platform", Platform(CPU, "sm_90"))
    assert reasons(cache_of(2, 2)) == "None"
    assert reasons(cache_of(1, 8)) == "None"
    assert "e4m3" in reasons(cache_of(2, 2, "auto"))
    assert "e4m3" in reasons(cache_of(2, 2, "fp8_e5m2"))
    assert reasons(cache_of(2, 2, "fp8_per_token_head")) == "None"
    for scales in (([0.5, 0.25], 1.0), (1.0, [0.5, 0.25])):
        assert reasons(layer_cache(cache_of(2, 2).views, *scales)) == "scales a head are Triton's"
    assert "whole context" in reasons(cache_of(2, 2), window=100)
    assert "128" in reasons(cache_of(2, 2, dim=64), dim=64)
    assert "BF16" in reasons(cache_of(2, 2), dtype=torch.float32)
    assert "64 tokens" in reasons(cache_of(2, 2, block=32))


def test_what_decode_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "missing", lambda: None)
    for kernels in (attention.PREFILL, attention.DECODE):
        monkeypatch.setattr(kernels, "platform", Platform(CPU, "sm_90"))
    q = torch.zeros(3, 9, 128, dtype=torch.bfloat16)
    assert "8 query heads" in str(attention.decode_refusal(q, cache_of(1, 1), None, 3))
    assert attention.prefill_refusal(q, cache_of(1, 1), None) is None
    assert "64 query heads" in str(attention.prefill_refusal(q[:, :1].expand(3, 65, 128), cache_of(1, 1), None))
    cache, q = cache_of(1, 2), torch.zeros(3, 12 * 128, dtype=torch.bfloat16).view(3, 12, 128)
    heads, k, v = q.split((8, 2, 2), 1)
    rotated = [torch.zeros(4, size) for size in (64, 36)]
    new = [New(k, v, Rope(None, cos_sin, torch.zeros(3)), torch.zeros(3)) for cos_sin in rotated]
    assert attention.decode_refusal(heads, cache, None, 3, new[0]) is None
    assert "multiple of 8" in str(attention.decode_refusal(heads, cache, None, 3, new[1]))
    assert "adjacent" in str(attention.decode_refusal(q[..., :64].repeat(1, 1, 2)[:, ::2], cache, None, 3))
    assert "counters" in str(attention.decode_refusal(heads, cache, None, 1 << 14))


def test_a_graph_has_one_kind_of_attention() -> None:
    """Contexts that share a captured graph go to the same kernel, whichever of them it was captured with."""
    for requests, width in itertools.product((1, 16, 32, 200), (64, 128)):
        by_variant: dict[int, set[bool]] = {}
        for longest in (1, 500, 1152, 5000, 9000, 20000, 131072):
            kinds = by_variant.setdefault(attention.decode_variant(requests, 8, width, longest), set())
            kinds.add(attention.is_long(requests, longest))
        assert all(len(kinds) == 1 for kinds in by_variant.values())
    assert attention.is_long(16, 33000)
    assert not attention.is_long(32, 1152)


@over(
    "requests, longest, expected",
    [(32, 1152, "Triton's"), (33, 1152, "Triton's"), (34, 1152, "this"), (7, 32768, "Triton's"), (8, 32768, "this")],
)
def test_few_requests_of_short_contexts_are_not_its_own(requests: int, longest: int, expected: str) -> None:
    """Of 4 KV heads, on 132 multiprocessors."""
    q, k = (torch.zeros(requests, heads, 128) for heads in (32, 4))
    batch = SimpleNamespace(query_lens=[1] * requests, context_lens=[longest] * requests, slot_mapping=None)
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_decode_attention", lambda *_: not found.append("this"))
        patch.setattr(attention.gpu, "attend", lambda *_: found.append("Triton's"))
        attention.attend(q, k, k, None, None, batch, 1.0, None)  # type: ignore[arg-type]
    assert found == [expected]


@needs_hopper
@over("kv", CACHES)
@over("heads, kv_heads", GROUPS)
@over("lengths", LENGTHS.values())
def test_it_computes_attention(lengths: list[int], heads: int, kv_heads: int, kv: str) -> None:
    """As Triton's kernel does, and the same bits each time; counters are left at zero."""
    cache, batch, q = scene([(length - 1, 1) for length in lengths], heads, kv_heads, kv)
    assert attention.decode_refusal(q, cache, None, len(lengths)) is None
    kernel = attention._decode(q.device, 4 if heads <= 4 * kv_heads else 8, "k_scale" in cache.views)
    assert kernel is not None
    kernel.parts = torch.full_like(kernel.parts, float("nan"))
    outs = [torch.full_like(q, float("nan")) for _ in range(3)]
    for out in outs[:2]:
        kernel(q, out, cache, batch, len(lengths), 128**-0.5)
    decode_attention(q, outs[2], cache, batch, len(lengths), max(lengths), 128**-0.5, None)
    assert torch.equal(outs[0], outs[1])
    assert not kernel.counters.any()
    expected = exact(q, cache, batch)
    assert relative_error(outs[0], expected) < 3e-3  # of which rounding the result to BF16 is 1.6e-3
    assert relative_error(outs[0], expected) < 1.05 * relative_error(outs[2], expected)


@needs_hopper
@over("kv", CACHES)
@over("rotated", [128, 64])
@over("normed", [False, True])
@over("heads, kv_heads", GROUPS)
@over("lengths", LENGTHS.values())
def test_it_turns_and_writes(lengths: list[int], heads: int, kv_heads: int, normed: bool, rotated: int, kv: str) -> None:
    """The cache is afterwards what `rope_write_kv` leaves, byte for byte, and attention that over it."""
    cache, batch, _ = scene([(length - 1, 1) for length in lengths], heads, kv_heads, kv)
    device, count = cache.k_scale.device, len(lengths)
    qkv = torch.randn(count, heads + 2 * kv_heads, 128, device=device).bfloat16()
    qkv[count // 2, heads, 5] = float("nan")  # which the cache does not hold
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    norms = HeadNorms(*(torch.randn(128, device=device).bfloat16() for _ in range(2)), 1e-5) if normed else None
    cos_sin = torch.randn(max(lengths), rotated, device=device)
    rope = Rope(norms, cos_sin, batch.positions.flip(0))  # a token's row is not its place
    new = New(k, v, rope, batch.slot_mapping)
    assert attention.decode_refusal(q, cache, None, count, new) is None
    kernel = attention._decode(device, 4 if heads <= 4 * kv_heads else 8, "k_scale" in cache.views)
    assert kernel is not None
    buffer = torch.empty(0, dtype=torch.uint8, device=device).set_(cache.views["k"].untyped_storage())
    before, out = buffer.clone(), torch.full(q.shape, float("nan"), dtype=q.dtype, device=device)
    kernel(q, out, cache, batch, count, 128**-0.5, new)
    found = buffer.clone()
    buffer.copy_(before)
    turned = rope_write_kv(q, k, v, rope, cache, batch.slot_mapping)
    assert not torch.equal(before, buffer)
    assert torch.equal(found, buffer)
    assert relative_error(out, exact(turned, cache, batch)) < 3e-3


@needs_hopper
@over("kv", CACHES)
@over("new", [False, True])
@over("heads, kv_heads", [(32, 8), (14, 2)])
@over("lengths", [[], *LENGTHS.values()])
def test_rows_without_a_context_are_zeros(lengths: list[int], heads: int, kv_heads: int, new: bool, kv: str) -> None:
    """They take no tile from the others, bit for bit, and write nothing, not even to the scratch block."""
    cache, real, _ = scene([(length - 1, 1) for length in lengths or [1]], heads, kv_heads, kv)
    count, rows = len(lengths), 40
    batch = with_padding(real, rows, cache.views["k"].shape[0] - 1, bound=10_000)
    if not lengths:
        batch.seq_lens.zero_()
        count, rows = 0, 41
    device, total = cache.k_scale.device, len(batch.query_lens)
    qkv = torch.randn(total, heads + 2 * kv_heads, 128, device=device).bfloat16()
    qkv[count:] = float("nan")
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    given = New(k, v, Rope(None, torch.randn(10_000, 128, device=device), batch.rotary_rows), batch.slot_mapping)
    kernel = attention._decode(device, 4 if heads <= 4 * kv_heads else 8, "k_scale" in cache.views)
    assert kernel is not None
    buffer = torch.empty(0, dtype=torch.uint8, device=device).set_(cache.views["k"].untyped_storage())
    before, found = buffer.clone(), []
    for requests in (total, count):
        buffer.copy_(before)
        out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=device)
        kernel(q, out, cache, batch, requests, 128**-0.5, given if new else None)
        found.append((out, buffer.clone()))
    assert not kernel.counters.any()
    (padded, written), (alone, wanted) = found
    assert not padded[count:].any()
    assert torch.equal(padded[:count], alone[:count])
    assert torch.equal(written, wanted)


@needs_hopper
def test_a_scale_that_changes_is_read_by_a_captured_graph() -> None:
    cache, batch, q = scene([(99, 1), (700, 1)], 32, 8)
    kernel = attention._decode(q.device, 4, False)
    assert kernel is not None
    out, graph = torch.empty_like(q), torch.cuda.CUDAGraph()
    kernel(q, out, cache, batch, 2, 128**-0.5)
    with torch.cuda.graph(graph):
        kernel(q, out, cache, batch, 2, 128**-0.5)
    for k_scale, v_scale in ((0.013, 0.7), (0.031, 0.0191)):
        cache.k_scale.fill_(k_scale), cache.v_scale.fill_(v_scale)
        graph.replay()
        assert relative_error(out, exact(q, cache, batch)) < 3e-3
