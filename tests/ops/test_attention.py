"""write_kv and attention: every KV dtype, over mixed batches and shared blocks, against dense attention in float64.

The cache starts full of what an unlucky earlier owner left in it: what a request has not written must not matter.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import relative_error
from ops.caches import SCALES, Scale, layer_cache, with_padding
from ops.cases import over
from ops.shapes import BATCHES, HEADS
from quant.float64 import E4M3FN, E4M3FNUZ, E5M2, Array, Format, array, dequantize, quantize

from octavo import batch as batches
from octavo import ops
from octavo.kvcache import KVCache, LayerCache, Layout, spec_for
from octavo.ops import reference
from octavo.platform import Platform, detect

BLOCK_SIZE = 4
CPU_ATTENTION = importlib.import_module("octavo.ops.cpu.attention")  # the package's attribute of that name is the function
K_SCALE, V_SCALE = 0.04, 0.02
FP8 = {"fp8_e4m3": E4M3FN, "fp8_e5m2": E5M2, "fp8_per_token_head": E4M3FN}
KV_DTYPES = ["auto", "bfloat16", *FP8]


@dataclasses.dataclass
class Scene:
    """Requests over a cache: each one's keys and values, and the batch of this step."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    queries: list[torch.Tensor]
    blocks: list[list[int]]
    batch: batches.ForwardBatch
    cache: KVCache
    op: ModuleType
    layer: LayerCache

    @property
    def views(self) -> dict[str, torch.Tensor]:
        return self.layer.views

    def write(self, slots: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        device = self.views["k"].device
        self.op.write_kv(self.layer, torch.tensor(slots, device=device), k.to(device), v.to(device))

    def attend(self, scale: float, window: int | None) -> torch.Tensor:
        q = torch.cat(self.queries).to(self.views["k"].device)
        return self.op.attention(q, self.layer, self.batch, scale, window)


def blocks_of(lengths: list[int]) -> list[list[int]]:
    """Scattered blocks for contexts; every second request begins with the first blocks of the one before it, as far as full."""
    free = iter(torch.randperm(2 * sum(lengths) + 8).add(1).tolist())
    tables: list[list[int]] = []
    for i, length in enumerate(lengths):
        shared = tables[-1][: min(length, lengths[i - 1]) // BLOCK_SIZE] if i % 2 else []
        tables.append([*shared, *(next(free) for _ in range(-(-length // BLOCK_SIZE) - len(shared)))])
    return tables


def scene(
    rows: list[tuple[int, int]],
    heads: tuple[int, int, int],
    kv: str,
    platform: Platform,
    op: ModuleType,
    dtype: torch.dtype = torch.float32,
    scales: tuple[Scale, Scale] = (K_SCALE, V_SCALE),
) -> Scene:
    """Random requests whose caches hold what came before this step and this step's own tokens."""
    query_heads, kv_heads, dim = heads
    ops.bind(platform)
    lengths = [before + count for before, count in rows]
    tables = blocks_of(lengths)
    keys, values = ([torch.randn(n, kv_heads, dim).to(dtype) * 2 for n in lengths] for _ in range(2))
    for i in range(1, len(rows), 2):  # shared blocks hold the same tokens
        same = min(lengths[i], lengths[i - 1]) // BLOCK_SIZE * BLOCK_SIZE
        keys[i][:same], values[i][:same] = keys[i - 1][:same], values[i - 1][:same]
    queries = [torch.randn(count, query_heads, dim).to(dtype) for _, count in rows]
    spans = [batches.Span([5] * count, before, t) for (before, count), t in zip(rows, tables, strict=True)]
    batch = batches.build(spans, BLOCK_SIZE, platform.device)
    spec = spec_for(kv, kv_heads, dim, dtype, platform.fp8_dtype, Layout.on(platform.is_cpu))
    cache = KVCache([spec], 2 * sum(lengths) + 9, BLOCK_SIZE, platform.device)
    made = Scene(keys, values, queries, tables, batch, cache, op, layer_cache(cache.views[0], *scales))
    spoil(made)
    for table, k, v in zip(tables, keys, values, strict=True):
        made.write([table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(len(k))], k, v)
    return made


def spoil(made: Scene) -> None:
    """Every slot holds what requests with infinities, NaN and large values wrote."""
    slots = made.cache.num_blocks * BLOCK_SIZE
    bad = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e4, -1e4])
    shape = (slots, *made.keys[0].shape[1:])
    k, v = (bad[torch.randint(5, shape)].to(made.keys[0].dtype) for _ in range(2))
    made.write(list(range(slots)), k, v)


def cached(x: torch.Tensor, kv: str, fp8: Format, scale: torch.Tensor) -> Array:
    """What the cache gives back for x [tokens, heads, dim]; scale [1] or [heads]."""
    if kv == "auto":
        return array(x)
    if kv == "bfloat16":
        return array(x.bfloat16())
    flat = array(x).reshape(-1, x.shape[-1])
    if kv == "fp8_per_token_head":
        tile = (1, x.shape[-1])
        return dequantize(*quantize(flat, tile, fp8, floor=1 / (448 * 512)), tile, fp8).reshape(x.shape)
    by = scale.cpu().numpy()[:, None]
    codes = fp8.nearest((array(x).astype(np.float32) / by).astype(np.float64))
    return fp8.values[codes] * by.astype(np.float64)


def dense(q: Array, k: Array, v: Array, scale: float, window: int | None) -> Array:
    """Attention of the last tokens of one context, one token at a time."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    out = np.full(q.shape, np.nan)
    for token in range(len(q)):
        position = len(k) - len(q) + token
        seen = np.s_[(0 if window is None else max(0, position - window + 1)) : position + 1]
        scores = np.einsum("khd,hd->kh", k[seen], q[token]) * scale
        weights = np.exp(scores - scores.max(0))
        out[token] = np.einsum("kh,khd->hd", weights / weights.sum(0), v[seen])
    return out


def expected_of(made: Scene, kv: str, fp8: Format, window: int | None) -> torch.Tensor:
    """float64 [tokens, heads, dim] of the values that the cache's codes should have."""
    scales = made.layer.k_scale, made.layer.v_scale
    parts = [
        dense(array(q), cached(k, kv, fp8, scales[0]), cached(v, kv, fp8, scales[1]), 0.3, window)
        for q, k, v in zip(made.queries, made.keys, made.values, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def check(made: Scene, kv: str, fp8: Format, window: int | None, bound: float) -> None:
    assert relative_error(made.attend(0.3, window), expected_of(made, kv, fp8, window)) < bound


def within(exact: float, kv: str, op: ModuleType, platform: Platform) -> float:
    """The bound of an implementation: an accelerator's multiplies as the cache is stored, queries and weights rounded to it."""
    if platform.is_cpu or op is reference:
        return exact
    return max(exact, 0.06 if kv in FP8 else 6e-3 if kv == "bfloat16" else 0)


implementations = over("op", [ops, reference])


@over("op", [ops, reference, CPU_ATTENTION])
@over("kv", KV_DTYPES)
@over("window", [None, 5])
@over("rows", BATCHES)
def test_batches(rows: str, window: int | None, kv: str, op: ModuleType, platform: Platform) -> None:
    platform = detect("cpu") if op is CPU_ATTENTION else platform
    fp8 = E4M3FNUZ if platform.fp8_dtype is torch.float8_e4m3fnuz and kv != "fp8_e5m2" else FP8.get(kv, E4M3FN)
    check(scene(BATCHES[rows], (4, 2, 16), kv, platform, op), kv, fp8, window, within(2e-6, kv, op, platform))


@implementations
@over("kv", KV_DTYPES)
@over("scales", SCALES)
@over("rows", ["decode", "mixed"])
def test_scales_of_a_layer_and_of_heads(rows: str, scales: str, kv: str, op: ModuleType, platform: Platform) -> None:
    fp8 = E4M3FNUZ if platform.fp8_dtype is torch.float8_e4m3fnuz and kv != "fp8_e5m2" else FP8.get(kv, E4M3FN)
    made = scene(BATCHES[rows], (4, 2, 16), kv, platform, op, scales=SCALES[scales])
    check(made, kv, fp8, None, within(2e-6, kv, op, platform))


@over("op", [ops, reference, CPU_ATTENTION])
@over("kv", KV_DTYPES)
@over("window", [None, 5])
def test_rows_without_a_context_are_zeros(window: int | None, kv: str, op: ModuleType, platform: Platform) -> None:
    """Rows that pad a graph, whose queries are anything, change nothing for the others."""
    made = scene(BATCHES["decode"], (4, 2, 16), kv, detect("cpu") if op is CPU_ATTENTION else platform, op)
    count, expected = len(made.queries), made.attend(0.3, window)
    made.queries.append(torch.full((3, 4, 16), float("nan")))
    made.batch = with_padding(made.batch, 3, scratch_block=0)
    found = made.attend(0.3, window)
    assert relative_error(found[:count], expected) < 1e-6  # torch adds up in another order
    assert not found[count:].any()


@implementations
@over("kv", KV_DTYPES)
@over("heads", HEADS)
def test_grouped_queries(heads: tuple[int, int, int], kv: str, op: ModuleType) -> None:
    check(scene(BATCHES["mixed"], heads, kv, detect("cpu"), op), kv, FP8.get(kv, E4M3FN), 1, 2e-6)


@implementations
@over("kv", ["fp8_e4m3", "fp8_per_token_head"])
def test_fnuz(kv: str, op: ModuleType) -> None:
    on = Platform(torch.device("cpu"), "test", fp8_dtype=torch.float8_e4m3fnuz, widened_dtype=torch.float32)
    check(scene(BATCHES["mixed"], (4, 2, 16), kv, on, op), kv, E4M3FNUZ, None, 2e-6)


@implementations
@over("kv", KV_DTYPES)
def test_bf16_queries(kv: str, op: ModuleType, platform: Platform) -> None:
    bound = within(5e-3, kv, op, platform)
    check(scene(BATCHES["mixed"], (4, 2, 16), kv, platform, op, torch.bfloat16), kv, FP8.get(kv, E4M3FN), None, bound)


@over("budget", [1, 300, 2000])
@over("rows", ["decode", "mixed", "many"])
def test_splitting_groups_changes_nothing(budget: int, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU_ATTENTION, "GROUP_VALUES", budget)
    check(scene(BATCHES[rows], (4, 2, 16), "fp8_e4m3", detect("cpu"), CPU_ATTENTION), "fp8_e4m3", E4M3FN, 5, 2e-6)


@over("rows", BATCHES)
def test_groups_cover_every_row_once_within_bounds(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU_ATTENTION, "GROUP_VALUES", 1500)
    made = scene(BATCHES[rows], (4, 2, 16), "auto", detect("cpu"), ops)
    groups = CPU_ATTENTION._make_groups(made.batch, None, 32)
    covered = [row for group_rows, *_ in groups for row in range(group_rows.start, group_rows.stop)]
    assert covered == list(range(made.batch.num_tokens))
    shared = [table.shape for _, table, *_ in groups if len(table) > 1]
    assert all(count * (width - 1) * BLOCK_SIZE * 32 < 1500 for count, width in shared)
    if rows == "many":
        assert 1 < len(groups) < len(BATCHES[rows])


@implementations
@over("kv", KV_DTYPES)
def test_writing_touches_its_slots_only(kv: str, op: ModuleType, platform: Platform) -> None:
    made = scene(BATCHES["prefill"], (4, 2, 16), kv, platform, op)
    before = {name: as_bytes(view) for name, view in made.views.items()}
    made.write([9, 22], *torch.randn(2, 2, 2, 16))
    for name, view in made.views.items():
        changed = (as_bytes(view) != before[name]).any(1).nonzero().flatten().tolist()
        assert changed == [9, 22], name


def as_bytes(view: torch.Tensor) -> torch.Tensor:
    """[slots, bytes] of a view of the cache."""
    return view.flatten(0, 1).flatten(1).contiguous().view(torch.uint8)
