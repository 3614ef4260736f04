"""MLA's and the indexer's C kernels with every instruction set that this CPU has: what the contract says, as test_latent.py
holds every implementation against it, and what is theirs: contexts in parts, many heads, threads, exact choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from conftest import relative_error
from ops import test_latent as contract
from ops.cases import on_each_instruction_set, over
from ops.latents import attended, index_scene, latent_scene, stored

from octavo import ops
from octavo.kvcache import IndexCache
from octavo.ops import Rotation, reference_latent
from octavo.ops.cpu import latent, library, native
from octavo.platform import Platform

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")

CPU = Platform(torch.device("cpu"), "test")


@on_each_instruction_set
def test_the_contract() -> None:
    """All that test_latent.py asks, of a library that it would have bound with the best instructions alone."""
    contract.test_the_bytes_are_those_that_flashmla_and_deepgemm_read(CPU)
    contract.test_products_of_heads(CPU)
    contract.check_equal_scores(ops, CPU)
    contract.check_stored(op=ops, platform=CPU)
    for rows in ("mixed", "decode"):
        contract.check_attention(rows=rows, op=ops, platform=CPU)
    contract.check_choices(op=ops, platform=CPU)
    assert {ops.table()[name] for name in latent.__all__} == {"cpu.latent"}


# (heads, latent, ...) and rows: heads in several panels and in a part of one; contexts of several parts; prompts.
LONG = [
    ((40, 144, 24, 16, 20), [(400, 1), (0, 1), (250, 1)]),
    ((16, 512, 128, 64, 128), [(300, 1)]),
    ((3, 64, 16, 8, 12), [(200, 70), (30, 1)]),
    ((18, 32, 16, 8, 12), [(390, 5)]),
]


@on_each_instruction_set
@over("kv", ["auto", "fp8_ds_mla"])
@over("shape, rows", LONG)
def test_long_contexts(kv: str, shape: tuple[int, ...], rows: list[tuple[int, int]]) -> None:
    heads, rank, _, rope, _ = shape
    scene = latent_scene(rows, shape, kv, ops, CPU)
    batch, cache = scene.batch, scene.cache
    q = torch.randn(batch.num_tokens, 2 * heads, rank + rope)[:, ::2]
    chosen = torch.full((batch.num_tokens, 230), -1, dtype=torch.int32)
    every, picked, start = [], [], 0
    for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        part = slice(start, start + count)
        for token in range(count):
            places = torch.randperm(context - count + token + 1)[:230].sort().values
            chosen[start + token, : len(places)] = places.int()
        keys = stored(scene, request)
        every.append(attended(q[part].double(), keys, rank, 0.07))
        picked.append(attended(q[part].double(), keys, rank, 0.07, chosen[part]))
        start += count
    assert relative_error(latent.latent_attention(q, cache, batch, 0.07), torch.cat(every)) < 3e-6
    assert relative_error(latent.latent_attention(q, cache, batch, 0.07, chosen), torch.cat(picked)) < 3e-6
    q[0, 0, 3] = float("nan")
    spoiled = latent.latent_attention(q, cache, batch, 0.07)
    assert spoiled[0, 0].isnan().all()
    assert spoiled[0, 1:].isfinite().all()
    assert spoiled[1:].isfinite().all()


@on_each_instruction_set
def test_keys_and_values_are_made_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few places and a few queries at a time give what all together give."""
    shape = (3, 64, 16, 8, 12)
    scene = latent_scene([(200, 70), (0, 5)], shape, "fp8_ds_mla", ops, CPU)
    q, up_k, up_v = torch.randn(75, 3, 24), torch.randn(3, 16, 64) / 8, torch.randn(3, 64, 12) / 8
    given = q, up_k, up_v, scene.rotation, scene.cache, scene.batch, 0.2
    expected = reference_latent.expanded_attention(*given)
    for values in (1 << 22, 2000, 1):
        monkeypatch.setattr(latent, "VALUES", values)
        assert relative_error(latent.expanded_attention(*given), expected) < 1e-5


def scored_exactly(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """int64 [n, context] of small integers: no sum is rounded, in FP32 either."""
    return torch.einsum("qhk,qh->qk", torch.einsum("qhd,kd->qhk", q.long(), keys.long()).clamp_(min=0), weights.long())


@on_each_instruction_set
@over("heads", [3, 20, 64])
def test_choices_are_exact(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many equal scores, negative ones and zeros of either sign, over prompts and single tokens with long contexts."""
    scene = index_scene([(500, 1), (90, 30), (0, 1), (0, 4), (480, 3)], 32, ops, CPU, wide=True)
    batch, cache = scene.batch, scene.cache
    assert isinstance(cache, IndexCache)
    cache.k.copy_(torch.randint(-3, 4, cache.k.shape))
    still = Rotation(torch.tensor([[1.0] * 8 + [0.0] * 8]), torch.zeros(batch.num_tokens, dtype=torch.int64), False)
    for spread in (2, 1, 0):
        q = torch.randint(-2, 3, (batch.num_tokens, heads, 32)).float()
        weights = torch.randint(-spread, spread + 1, (batch.num_tokens, heads)).float()
        for top_k in (1, 50, 200):
            found = latent.select_keys(q, weights, still, cache, batch, top_k)
            token = 0
            for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
                keys = stored(scene, request)
                for position in range(context - count, context):
                    scores = scored_exactly(q[token : token + 1], weights[token : token + 1], keys[: position + 1])[0]
                    best = scores.sort(descending=True, stable=True).indices[:top_k].sort().values.tolist()
                    assert found[token].tolist() == best + [-1] * (top_k - len(best))
                    token += 1
    wide = dataclasses.replace(batch, seq_lens=batch.seq_lens.clone())
    wide.seq_lens[2] = 0  # its one token pads a graph
    q[0, heads - 1, 5], q[31] = float("nan"), float("nan")
    spoiled = latent.select_keys(q, weights.fill_(1), still, cache, wide, 50)
    assert spoiled[0].tolist() == list(range(50)), "a score of what is no number is as good as minus infinity"
    assert spoiled[1].tolist() != list(range(50))
    assert spoiled[31].tolist() == [-1] * 50


def test_products_of_any_shape() -> None:
    """Of matrices whose rows, or columns, lie one after another, in either dtype, by few tokens and by many."""
    for tokens in (1, 2, 4, 5, 37):
        for k, n in ((16, 32), (24, 144), (128, 512), (20, 12)):
            products_of(tokens, k, n)


@on_each_instruction_set
def products_of(tokens: int, k: int, n: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for held in (torch.float32, torch.bfloat16):
            wide = torch.randn(tokens, 3, 2 * k).to(dtype)
            x, bound = wide[..., k // 2 : k // 2 + k], 2e-6 if dtype is torch.float32 else 4e-3
            for w in (torch.randn(3, k, n).to(held), torch.randn(3, n, k).to(held).mT):
                expected = torch.einsum("thk,hkn->thn", x.double(), w.double())
                assert relative_error(latent.head_linear(x, w), expected) < bound, (tokens, k, n, dtype, held)


@on_each_instruction_set
def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    scene = latent_scene([(450, 1), (200, 1)], (18, 144, 24, 16, 20), "fp8_ds_mla", ops, CPU)
    index = index_scene([(450, 1), (200, 1)], 128, ops, CPU)
    q, queries, weights = torch.randn(2, 18, 160), torch.randn(2, 16, 128), torch.randn(2, 16)
    steps: list[Callable[[], torch.Tensor]] = [
        lambda: latent.latent_attention(q, scene.cache, scene.batch, 0.1),
        lambda: latent.select_keys(queries, weights, index.rotation, index.cache, index.batch, 40),
    ]
    try:
        for step in steps:
            results = []
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                results.append(step())
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_what_is_captured() -> None:
    assert native.captures(576, [], latent=True)
    assert not native.captures(576, [], latent=False)
    assert not native.captures(native.MAX_SHARED + 1, [], latent=True)
