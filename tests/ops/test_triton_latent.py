"""Attention over latents by Triton, on the GPU where there is one, else interpreted: see test_triton.py."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from ops.caches import with_padding
from ops.cases import combined, over, pairwise
from ops.interpreter import HAS_GPU
from ops.latents import latent_scene
from ops.shapes import BATCHES, LATENTS

from octavo.ops import reference_latent
from octavo.ops.triton import expanded_attention, latent_attention
from octavo.platform import detect

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ROWS = {"decode": BATCHES["decode"], "mixed": BATCHES["mixed"], "long": [(150, 1), (40, 1), (129, 1)], "prompt": [(130, 9)]}
CONFIGS = [{}, {"splits": 3, "TILE": 32}, {"splits": 2, "TILE": 64, "ROWS": 64, "warps": 8, "first": 1}]
KV_DTYPES = ["auto", "fp8_ds_mla"]
CASES = [(rows, s, c, kv) for rows in ROWS for s in LATENTS[:2] for c in CONFIGS[rows == "decode" :] for kv in KV_DTYPES]
LARGE = [("long", LATENTS[2], {}, kv) for kv in KV_DTYPES]
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, of infinities that the kernels mask


@over("rows, shape, config, kv", [*(CASES if HAS_GPU else pairwise(ROWS, LATENTS[:2], CONFIGS, KV_DTYPES)), *LARGE])
def test_attention_over_latents(rows: str, shape: tuple[int, ...], kv: str, config: dict[str, int]) -> None:
    """In one part of the context and in several, rows first and the context first, rows that pad a graph among them."""
    heads, rank, _, rope, _ = shape
    scene = latent_scene(ROWS[rows], shape, kv, reference_latent, detect(), torch.bfloat16)  # type: ignore[arg-type]
    batch, cache = scene.batch, scene.cache
    q = torch.randn(batch.num_tokens, heads, rank + rope, device=DEVICE).bfloat16()
    chosen = torch.full((batch.num_tokens, 70), -1, dtype=torch.int32)
    for token, place in enumerate(batch.positions.tolist()):
        places = torch.randperm(place + 1)[:70].sort().values
        chosen[token, : len(places)] = places.int()
    for given in (None, chosen.to(DEVICE)):
        expected = reference_latent.latent_attention(q, cache, batch, 0.11, given)
        found = latent_attention.latent_attention(q, cache, batch, 0.11, given, config)
        assert relative_error(found, expected) < 6e-3
        if set(batch.query_lens) == {1}:
            padded = with_padding(batch, 2, 0, bound=512)
            more = torch.cat([q, torch.full_like(q[:2], 7.0)])
            wide = None if given is None else torch.cat([given, torch.full_like(given[:2], -1)])
            out = latent_attention.latent_attention(more, cache, padded, 0.11, wide, config)
            assert relative_error(out[:-2], expected) < 6e-3
            assert not out[-2:].any()


PROMPTS = [(BATCHES["mixed"], {}), ([(200, 70), (0, 5)], {"most": 128}), ([(300, 30)], {"most": 256, "BM": 16})]


@over("shape, kv, prompt, interleaved", combined(LATENTS[:2], KV_DTYPES, PROMPTS, [True, False]))
def test_attention_over_what_latents_expand_to(
    shape: tuple[int, ...], kv: str, prompt: tuple[list[tuple[int, int]], dict[str, int]], interleaved: bool
) -> None:
    """Contexts side by side, and one that comes in parts."""
    (heads, rank, nope, rope, v), (rows, config) = shape, prompt
    scene = latent_scene(rows, shape, kv, reference_latent, detect(), torch.bfloat16, interleaved=interleaved)  # type: ignore[arg-type]
    q = torch.randn(scene.batch.num_tokens, heads, nope + rope, device=DEVICE).bfloat16()
    up = torch.randn(heads, nope + v, rank, device=DEVICE).bfloat16() * rank**-0.5
    args = q, up[:, :nope], up[:, nope:].mT, scene.rotation, scene.cache, scene.batch, 0.11
    found = expanded_attention.expanded_attention(*args, config)
    assert relative_error(found, reference_latent.expanded_attention(*args)) < 8e-3
