"""Decode attention of a few requests, csrc/few_requests_attention.cu, against float64; and that it compiles without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from ops.cases import over

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.ops.contract import HeadNorms, Rope
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper import few_requests
from octavo.ops.triton import launch
from octavo.ops.triton.rope import rope_write_kv
from octavo.platform import Platform, detect
from tests.ops.caches import with_padding
from tests.ops.megakernels import dumped
from tests.ops.paged import exact, needs_hopper, scene

LENGTHS = [1], [64], [65, 129], [511, 1, 200, 64, 77, 300, 5, 128], [1000, 384], [2000], [4000]  # in 1, 2, 4 and 8 parts
GROUPS = (32, 4), (14, 2), (8, 1), (5, 1), (8, 8)  # query heads, KV heads
CPU = torch.device("cpu")
Scene = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rope, LayerCache, ForwardBatch]


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize("splits", few_requests.SPLITS)
def test_it_compiles(splits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: nothing in local memory, FP16 matrix instructions, codes widened two at a time."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    stacks, code = dumped(compiler.compile_cubin("few_requests_attention.cu", "sm_90a", {"SPLITS": splits}), tmp_path)
    assert stacks == ["0"]
    assert len(re.findall(r"HMMA\.16816\.F32", code)) == 4 * (2 * 2 + 4)
    assert "F2FP.F16.E4M3.UNPACK_B" in code
    assert ("UCGABAR_ARV" in code) == (splits > 1)


def given(lengths: list[int], heads: int, kv_heads: int, normed: bool) -> Scene:
    """Unrotated queries, keys and values beside one another, a NaN among them, which no cache holds; and a full cache."""
    cache, batch, _ = scene([(length - 1, 1) for length in lengths], heads, kv_heads)
    few_requests.KERNELS.configure(detect())
    device, count = cache.k_scale.device, len(lengths)
    qkv = torch.randn(count, heads + 2 * kv_heads, 128, device=device).bfloat16()
    qkv[count // 2, heads, 5] = float("nan")
    norms = HeadNorms(*(torch.randn(128, device=device).bfloat16() for _ in range(2)), 1e-5) if normed else None
    rope = Rope(norms, torch.randn(max(lengths), 128, device=device), batch.positions.flip(0))  # a token's row is not its place
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    return q, k, v, rope, cache, batch


@needs_hopper
@over("normed", [False, True])
@over("heads, kv_heads", GROUPS)
@over("lengths", LENGTHS)
def test_it_turns_writes_and_attends(lengths: list[int], heads: int, kv_heads: int, normed: bool) -> None:
    """The cache is afterwards what `rope_write_kv` leaves, byte for byte, and attention that over it; twice the same bits."""
    q, k, v, rope, cache, batch = one = given(lengths, heads, kv_heads, normed)
    buffer = torch.empty(0, dtype=torch.uint8, device=q.device).set_(cache.views["k"].untyped_storage())
    before, outs = buffer.clone(), []
    if few_requests.splits_of(len(lengths) * kv_heads, max(lengths)) is None:
        assert few_requests.attend(*one, 128**-0.5, None, max(lengths)) is None
        return
    for _ in range(2):
        buffer.copy_(before)
        out = few_requests.attend(*one, 128**-0.5, None, max(lengths), cache if outs else None)  # what is next changes nothing
        assert out is not None
        outs.append(out)
    found = buffer.clone()
    buffer.copy_(before)
    turned = rope_write_kv(q, k, v, rope, cache, batch.slot_mapping)
    assert not torch.equal(before, buffer)
    assert torch.equal(found, buffer)
    assert torch.equal(outs[0], outs[1])
    assert relative_error(outs[0], exact(turned, cache, batch)) < 3e-3  # of which rounding the result to BF16 is 1.6e-3


@needs_hopper
@over("longest", [500, 1000])
def test_rows_without_a_context_are_zeros(longest: int) -> None:
    """They change nothing of the others, and write nothing."""
    q, k, v, rope, cache, real = given([99, longest], 32, 4, False)
    batch = with_padding(real, 2, cache.views["k"].shape[0] - 1, bound=longest)
    q, k, v = (torch.cat((x, torch.full_like(x, float("nan")))) for x in (q, k, v))
    buffer = torch.empty(0, dtype=torch.uint8, device=q.device).set_(cache.views["k"].untyped_storage())
    before, found = buffer.clone(), []
    for count, spans in ((2, real), (4, batch)):
        buffer.copy_(before)
        turned = Rope(None, rope.cos_sin, spans.rotary_rows)
        out = few_requests.attend(q[:count], k[:count], v[:count], turned, cache, spans, 128**-0.5, None, longest)
        assert out is not None
        found.append((out, buffer.clone()))
    (alone, wanted), (padded, written) = found
    assert not padded[2:].any()
    assert torch.equal(padded[:2], alone)
    assert torch.equal(written, wanted)


def test_into_how_many_parts_a_context_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_units", lambda: 132)
    of_one = [few_requests.splits_of(4, longest) for longest in (1, 512, 513, 2048, 4096, 4097)]
    assert of_one == [1, 1, 2, 4, 8, None]
    assert [few_requests.splits_of(4 * requests, 1024) for requests in (8, 16)] == [2, None]  # more CTAs than are at once


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.setattr(launch, "device_units", lambda: 132)
    monkeypatch.setattr(few_requests.KERNELS, "platform", Platform(CPU, "sm_90"))
    cache, _, q = scene([(99, 1)], 32, 4)
    k, angles = q[:, :4], torch.zeros(100, 128)

    def reason(
        q: torch.Tensor = q, angles: torch.Tensor = angles, splits: int | None = 1, window: int | None = None
    ) -> str | None:
        return few_requests.refusal(q, k, k, Rope(None, angles, torch.zeros(1)), cache, splits, window)

    assert reason() is None
    assert "4096 tokens" in str(reason(splits=None))
    assert "more than 8 query heads" in str(reason(q=torch.cat((q, q), 1)))
    assert "not rotated" in str(reason(angles=angles[:, :64]))
    assert "adjacent" in str(reason(q=q.transpose(0, 1).reshape(1, 128, 32).transpose(1, 2)))
    assert "whole context" in str(reason(window=64))
    assert "BF16" in str(reason(q=q.float()))
    monkeypatch.setattr(few_requests.KERNELS, "platform", Platform(CPU, "gfx942"))
    assert "gfx942" in str(reason())
