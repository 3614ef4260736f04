"""Queries, keys and values by qkv_rope_kv_write_gemm.cu, against float64; and that it compiles where there is no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from ops.cases import over

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo import batch as batches
from octavo import ops
from octavo.ops import gpu
from octavo.ops.contract import HeadNorms, Rope
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper import qkv_rope_kv_write
from octavo.ops.hopper.gemm import Variant
from octavo.platform import Platform, detect
from tests.ops.caches import layer_cache
from tests.ops.megakernels import dumped
from tests.ops.paged import CACHES, needs_hopper, requests, weight
from tests.ops.test_block_gemm import weight as block_weight

K_SCALE, V_SCALE, F8, CPU = 0.3, 0.2, torch.float8_e4m3fn, torch.device("cpu")
SPANS = {  # of each request: tokens before, tokens in this step
    "one prompt": [(0, 33)],
    "whole tiles": [(0, 128), (64, 128)],
    "places of all kinds": [(0, 100), (7, 1), (61, 300), (128, 16)],
    "single tokens": [(5 * i % 64, 1) for i in range(50)],
    "many": [(0, 1024), (16, 700), (3, 500)],
}
HEADS = [(32, 8), (4, 4), (14, 2)]  # queries, keys


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize(
    ("variant", "blocks", "scales"),
    [
        *((variant, 0, 0) for variant in qkv_rope_kv_write.VARIANTS),
        *((variant, 1, 0) for variant in qkv_rope_kv_write.VARIANTS[::2]),  # of the smallest and the largest tile
        *((qkv_rope_kv_write.VARIANTS[-1], blocks, 1) for blocks in (0, 1)),  # of the largest tile
    ],
)
def test_it_compiles(variant: Variant, blocks: int, scales: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: FP8 matrix instructions of a group of warps, four to a step; cosines and sines asked for before them, where
    they do not take the place of a second set of sums."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    options = dict(zip(qkv_rope_kv_write.KERNELS.options, variant, strict=True)) | {"BLOCKS": blocks, "PER_TOKEN_HEAD": scales}
    stacks, code = dumped(compiler.compile_cubin("qkv_rope_kv_write_gemm.cu", "sm_90a", options), tmp_path)
    # Of 240 registers a thread: 128 sums and 64 cosines and sines are there at once.
    assert int(stacks[0]) <= (32 if not blocks else 48 if scales else 40)
    columns, parts = (128, variant.half // 64) if blocks else (2 * variant.half, 1)
    assert len(re.findall(rf"QGMMA\.64x{columns}x32\.F32\.E4M3\.E4M3", code)) == 4 * parts
    assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == (parts if blocks else 2)
    early = len(re.findall(r"LDG\.E\.64\.CONSTANT", code[: code.index("QGMMA")]))
    assert early == (0 if parts > 1 else 32)


class Scene:
    """A batch, its weight, its cache full of NaN."""

    def __init__(
        self, spans: list[tuple[int, int]], heads: int, kv_heads: int, depth: int = 256, blocks: bool = False,
        kv: str = "fp8_e4m3",
    ):  # fmt: skip
        platform = detect()
        ops.bind(platform)
        qkv_rope_kv_write.BLOCK_KERNELS.configure(platform)
        device = platform.device
        self.heads, self.kv_heads = heads, kv_heads
        cache, self.batch = requests(spans, kv_heads, kv)
        self.cache = layer_cache(cache.views, K_SCALE, V_SCALE)
        rows = (heads + 2 * kv_heads) * 128
        self.w = block_weight(rows, depth)[0] if blocks else weight(rows, depth)
        self.x = (torch.randn(self.batch.num_tokens, depth, device=device) * (0.01 if blocks else 1)).bfloat16()
        self.norms = HeadNorms(*(torch.rand(128, device=device).add(0.5).bfloat16() for _ in range(2)), 1e-5)
        angles = torch.rand(2048, 64, device=device) * 6
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        self.rows = self.batch.positions + 7  # a token's row is not its place
        self.spoil()

    def rope(self, norms: HeadNorms | None) -> Rope:
        return Rope(norms, self.cos_sin, self.rows)

    def raw(self) -> torch.Tensor:
        storage = self.cache.views["k"].untyped_storage()
        return torch.empty(0, dtype=torch.uint8, device=self.x.device).set_(storage)  # type: ignore[call-overload, no-any-return]

    def spoil(self) -> None:
        self.raw().fill_(0x7F)

    def written(self) -> list[torch.Tensor]:
        """Keys and values [T, H', 128] as the cache has them."""
        at, views = self.batch.slot_mapping, self.cache.views
        made = []
        for name, by in (("k", K_SCALE), ("v", V_SCALE)):
            scales = views.get(f"{name}_scale")
            scale = by if scales is None else scales[at // 64, at % 64].double().unsqueeze(-1)
            made.append(views[name][at // 64, at % 64].double() * scale)
        return made

    def exact(self, norms: HeadNorms | None) -> list[torch.Tensor]:
        codes, scale = self.w.codes(self.x)
        by_row = self.w.scale.view(-1, 1)
        if isinstance(self.w, gpu.PackedBlocks):
            scale = scale.repeat_interleave(128, 1)[:, : codes.shape[1]]
            by_row = self.w.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, : codes.shape[1]]
        y = (codes.double() * scale) @ (self.w.weight.double() * by_row).T
        q, k, v = y.unflatten(1, (-1, 128)).split((self.heads, self.kv_heads, self.kv_heads), 1)
        cos, sin = self.cos_sin[self.rows].double().unsqueeze(1).chunk(2, 2)
        turned = []
        for x, gain in ((q, norms and norms.q), (k, norms and norms.k)):
            if norms is not None:
                x = x / (x.square().mean(2, keepdim=True) + norms.eps).sqrt() * gain.double()
            low, high = x.chunk(2, 2)
            turned.append(torch.cat([low * cos - high * sin, high * cos + low * sin], 2))
        return [*turned, v]


@needs_hopper
@over("variant", qkv_rope_kv_write.VARIANTS)
@over("blocks", [False, True])
@over("normed", [False, True])
@over("heads, kv_heads", HEADS)
@over("spans", SPANS.values())
@over("kv", CACHES)
def test_it_computes_and_writes(
    spans: list[tuple[int, int]], heads: int, kv_heads: int, normed: bool, blocks: bool, variant: Variant, kv: str
) -> None:
    """As exact as BF16 queries and e4m3 keys and values are; nothing else of the cache is touched; the same bits each time."""
    s = Scene(spans, heads, kv_heads, 400 if blocks else 256, blocks, kv)
    norms = s.norms if normed else None
    given = codes, _ = s.w.codes(s.x)
    found = []
    for _ in range(2):
        s.spoil()
        q = torch.full((len(codes) + 1, heads, 128), float("nan"), dtype=torch.bfloat16, device=codes.device)
        assert qkv_rope_kv_write.write(given, s.w, q[:-1], s.rope(norms), s.cache, s.batch, variant)
        found.append((q, s.raw().clone()))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0][:-1], found[1][0][:-1])
    assert found[0][0][-1].isnan().all()
    expected, (k, v) = s.exact(norms), s.written()
    assert relative_error(q[:-1], expected[0]) < 4e-3
    assert relative_error(k, expected[1]) < 0.04
    assert relative_error(v, expected[2]) < 0.04
    scales = (k.numel() + v.numel()) // 128 if "k_scale" in s.cache.views else 0
    assert (s.raw() != 0x7F).sum() <= k.numel() + v.numel() + 4 * scales


@needs_hopper
@over("kv", CACHES)
def test_what_is_not_finite_is_stored_as_zero(kv: str) -> None:
    s = Scene([(0, 40)], 4, 4, kv=kv)
    s.w.scale[0, :] = float("inf")
    assert ops.project(s.x, s.w, 4, s.rope(None), s.cache, s.batch, None) is not None
    assert all(x.isfinite().all() for x in s.written())


@needs_hopper
@over("variant", qkv_rope_kv_write.VARIANTS)
def test_it_reads_the_scales_that_are_there(variant: Variant) -> None:
    """Codes are those of round(x / scale), as another launch writes them, whatever the scale."""
    s = Scene(SPANS["places of all kinds"], 14, 2)
    given = s.w.codes(s.x)
    q = torch.empty(len(s.x), 14, 128, dtype=torch.bfloat16, device=s.x.device)
    for k_scale, v_scale in ((0.4137, 0.0713), (0.0931, 1.913)):
        s.cache.k_scale.fill_(k_scale), s.cache.v_scale.fill_(v_scale)
        assert qkv_rope_kv_write.write(given, s.w, q, s.rope(None), s.cache, s.batch, variant)
        expected = s.exact(None)[1:]
        for found, name, by in zip(expected, "kv", (k_scale, v_scale), strict=True):
            at = s.batch.slot_mapping
            got = s.cache.views[name][at // 64, at % 64].double() * by
            assert relative_error(got, found.clamp(-448 * by, 448 * by)) < 0.06


@needs_hopper
@over("kv", CACHES)
@over("blocks", [False, True])
def test_it_is_the_one_that_is_used(blocks: bool, kv: str) -> None:
    """The queries are those of the product and the launch after it, and the cache, but for codes that a last bit moves."""
    s = Scene(SPANS["many"], 32, 8, blocks=blocks, kv=kv)
    rope = s.rope(s.norms)
    assert qkv_rope_kv_write.refusal(s.x, s.w, rope, s.cache, None) is None
    q = ops.project(s.x, s.w, 32, rope, s.cache, s.batch, None)
    found = s.written()
    s.spoil()
    parts = ops.linear(s.x, s.w).unflatten(1, (-1, 128)).split((32, 8, 8), 1)
    before = ops.rope_write_kv(*parts, rope, s.cache, s.batch.slot_mapping)
    assert q is not None
    assert relative_error(q, before) < 6e-3
    for one, other in zip(found, s.written(), strict=True):
        assert relative_error(one, other) < 0.02


def test_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Scene([(0, 40)], 4, 2, depth=32)
    rope = s.rope(s.norms)
    given = rope, s.cache, None
    monkeypatch.setattr(qkv_rope_kv_write.KERNELS, "platform", Platform(CPU, "gfx942"))
    assert "gfx942" in str(qkv_rope_kv_write.refusal(s.x, s.w, *given))
    monkeypatch.setattr(qkv_rope_kv_write.KERNELS, "platform", Platform(CPU, "sm_90"))
    monkeypatch.setattr(compiler, "missing", lambda: None)
    assert qkv_rope_kv_write.refusal(s.x, s.w, *given) is None
    assert "32 tokens" in str(qkv_rope_kv_write.refusal(s.x[:32], s.w, *given))
    assert "not rotated" in str(qkv_rope_kv_write.refusal(s.x, s.w, rope._replace(cos_sin=s.cos_sin[:, :64]), *given[1:]))
    wide = HeadNorms(s.norms.q.float(), s.norms.k.float(), 1e-5)
    assert "BF16" in str(qkv_rope_kv_write.refusal(s.x, s.w, s.rope(wide), *given[1:]))
    by_head = layer_cache(s.cache.views, [K_SCALE] * 2, V_SCALE)
    assert "scales a head" in str(qkv_rope_kv_write.refusal(s.x, s.w, rope, by_head, None))
    assert "whole context" in str(qkv_rope_kv_write.refusal(s.x, s.w, rope, s.cache, 512))
    singles = batches.build([batches.Span([0], 0, [0])] * 40, 64, s.x.device)
    assert qkv_rope_kv_write.project(s.x, s.w, 4, rope, s.cache, singles, None) is None
