"""Requests over caches of latents and of index keys, and what they stand for in float64."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch

from octavo import batch as batches
from octavo import ops
from octavo.kvcache import IndexCache, KVCache, LatentCache, index_spec, latent_spec
from octavo.ops import Norm, Rotation, reference_latent
from octavo.platform import Platform

__all__ = [
    "BLOCK_SIZE",
    "POSITIONS",
    "Scene",
    "attended",
    "double_keys",
    "double_latents",
    "index_scene",
    "latent_scene",
    "rotations",
]

BLOCK_SIZE, POSITIONS = 4, 512


@dataclasses.dataclass
class Scene:
    """Requests of (tokens before this step, tokens in this step), and the cache that the op wrote of `given`, by request."""

    op: ModuleType
    batch: batches.ForwardBatch
    cache: LatentCache | IndexCache
    buffer: torch.Tensor
    given: list[torch.Tensor]
    norm: Norm
    rotation: Rotation


def rotations(width: int, rows: torch.Tensor, interleaved: bool) -> Rotation:
    """Angles of no formula; a token's row is 2 behind its position."""
    angles = torch.randn(POSITIONS, width // 2, generator=torch.Generator().manual_seed(3)) * 3
    return Rotation(torch.cat([angles.cos(), angles.sin()], 1).to(rows.device), rows, interleaved)


def _scene(
    rows: list[tuple[int, int]], op: ModuleType, platform: Platform, spec: object, kind: type, width: int, norm: Norm,
    rotation: tuple[int, bool], dtype: torch.dtype, scale: float,
) -> Scene:  # fmt: skip
    ops.bind(platform)
    device = platform.device
    lengths = [before + count for before, count in rows]
    free = iter(torch.randperm(sum(lengths) + 8).add(1).tolist())
    tables = [[next(free) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]
    spans = [batches.Span([5] * n, before, table, 2) for (before, n), table in zip(rows, tables, strict=True)]
    batch = batches.build(spans, BLOCK_SIZE, device)
    cache = KVCache([spec], sum(lengths) + 9, BLOCK_SIZE, device)  # type: ignore[list-item]
    held = kind.of(cache.views[0])  # type: ignore[attr-defined]
    write = op.write_latent if kind is LatentCache else op.write_index_keys
    slots = torch.arange(cache.num_blocks * BLOCK_SIZE, device=device)
    bad = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e4, -1e4])[torch.randint(5, (len(slots), width))]
    write(bad.to(device, dtype), norm, rotations(rotation[0], slots % POSITIONS, rotation[1]), held, slots)
    given = [(torch.randn(length, width) * scale * torch.rand(length, 1)).to(device, dtype) for length in lengths]
    for table, x in zip(tables, given, strict=True):
        every = batches.build([batches.Span([5] * len(x), 0, table, 2)], BLOCK_SIZE, device)
        write(x, norm, rotations(rotation[0], every.rotary_rows, rotation[1]), held, every.slot_mapping)
    return Scene(op, batch, held, cache.buffers[0], given, norm, rotations(rotation[0], batch.rotary_rows, rotation[1]))


def latent_scene(
    rows: list[tuple[int, int]], shape: tuple[int, int, int, int, int], kv: str, op: ModuleType, platform: Platform,
    dtype: torch.dtype = torch.float32, *, interleaved: bool = True,
) -> Scene:  # fmt: skip
    """A cache of `kv`, full of what requests with infinities and NaN wrote before."""
    _, rank, _, rope, _ = shape
    norm = Norm((1 + 0.3 * torch.randn(rank)).to(platform.device, dtype), 1e-6)
    spec = latent_spec(kv, rank, rope, dtype, platform.fp8_dtype)
    return _scene(rows, op, platform, spec, LatentCache, rank + rope, norm, (rope, interleaved), dtype, 3.0)


def index_scene(
    rows: list[tuple[int, int]], dim: int, op: ModuleType, platform: Platform, dtype: torch.dtype = torch.float32,
    *, wide: bool = False, interleaved: bool = False,
) -> Scene:  # fmt: skip
    """As latent_scene, of index keys half of whose dimensions are rotated."""
    weight, bias = (x.to(platform.device, dtype) for x in (1 + 0.3 * torch.randn(dim), 0.3 * torch.randn(dim)))
    spec = index_spec(dim, platform.fp8_dtype, wide=wide)
    norm = Norm(weight, 1e-6, bias)
    return _scene(rows, op, platform, spec, IndexCache, dim, norm, (dim // 2, interleaved), dtype, 1.0)


def turned_exactly(x: torch.Tensor, rows: torch.Tensor, width: int, interleaved: bool) -> torch.Tensor:
    """float64 x [n, width] rotated by `rotations`' rows, pair by pair."""
    table = rotations(width, rows, interleaved).cos_sin.double().cpu()[rows.cpu()]
    out = torch.empty_like(x)
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        cos, sin = table[:, i], table[:, i + width // 2]
        out[:, a], out[:, b] = x[:, a] * cos - x[:, b] * sin, x[:, b] * cos + x[:, a] * sin
    return out


def double_latents(scene: Scene, request: int) -> torch.Tensor:
    """float64 [context, R + D], unrounded: what a cache of latents stands for."""
    assert isinstance(scene.cache, LatentCache)
    x, rank = scene.given[request].double().cpu(), scene.cache.latent.shape[-1]
    latent = (
        x[:, :rank] / (x[:, :rank].square().mean(1, keepdim=True) + scene.norm.eps).sqrt() * scene.norm.weight.double().cpu()
    )
    rows = torch.arange(len(x)) + 2
    return torch.cat([latent, turned_exactly(x[:, rank:], rows, x.shape[1] - rank, scene.rotation.interleaved)], 1)


def double_keys(scene: Scene, request: int) -> torch.Tensor:
    """float64 [context, D], unrounded and without a transform: what a cache of index keys stands for."""
    x = scene.given[request].double().cpu()
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + scene.norm.eps).sqrt() * scene.norm.weight.double().cpu()
    assert scene.norm.bias is not None
    normed = normed + scene.norm.bias.double().cpu()
    half = x.shape[1] // 2
    rows = torch.arange(len(x)) + 2
    return torch.cat([turned_exactly(normed[:, :half], rows, half, scene.rotation.interleaved), normed[:, half:]], 1)


def stored(scene: Scene, request: int) -> torch.Tensor:
    """float64 of a request's context as its codes have it."""
    context = scene.batch.context_lens[request]
    blocks = scene.batch.block_tables[request, : -(-context // BLOCK_SIZE)].long()
    read = reference_latent.read_latents if isinstance(scene.cache, LatentCache) else reference_latent.read_index_keys
    return read(scene.cache, blocks, context).double().cpu()  # type: ignore[arg-type]


def attended(q: torch.Tensor, keys: torch.Tensor, rank: int, scale: float, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """float64 attention of the last len(q) tokens of one context, q [n, H, R + D] over keys [context, R + D]: [n, H, R]."""
    out = torch.empty(*q.shape[:2], rank, dtype=torch.float64)
    for token in range(len(q)):
        seen = torch.arange(len(keys) - len(q) + token + 1)
        if chosen is not None:
            seen = chosen[token][chosen[token] >= 0].long()
        weights = (q[token] @ keys[seen].T * scale).softmax(-1)
        out[token] = weights @ keys[seen, :rank]
    return out
