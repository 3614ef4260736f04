"""Keys rounded to FP8 one dimension after the other: every implementation beside float64, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops.cases import combined, instruction_sets, over
from quant.float64 import E4M3FN
from torch import Tensor

from octavo import ops
from octavo.batch import Span, build
from octavo.convert.key_rounding import key_rounding
from octavo.kvcache import KeyRounding, KVCache, LayerCache, Layout, spec_for
from octavo.ops import reference
from octavo.ops.bound import bound
from octavo.ops.cpu import library, native
from octavo.platform import FP8_MAX, detect

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.ops.triton import round_keys as triton_kernel
from octavo.ops.triton.rope import rope_write_kv
from tests.ops.caches import Scale, layer_cache

E4M3 = torch.float8_e4m3fn
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MADE = {"reference": (reference.round_keys, DEVICE), "Triton": (triton_kernel.round_keys, DEVICE)}
SHAPES = [(1, 1, 16), (5, 2, 40), (17, 3, 64), (3, 1, 128)]  # tokens, heads, dimensions
if library.missing() is None:
    MADE |= {f"C, {name}": (native.round_keys, torch.device("cpu")) for name in instruction_sets()}


def correlated(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Rows [heads, rows, dim] whose dimensions go together, some of them larger than others."""
    dim = shape[-1]
    return torch.randn(shape, generator=g) @ torch.randn(shape[0], dim, dim, generator=g) * torch.rand(dim, generator=g).exp()


def measured(heads: int, dim: int, g: torch.Generator) -> tuple[Tensor, KeyRounding]:
    """H of random queries, and the rounding for it."""
    queries = correlated((heads, 2 * dim, dim), g)
    gram = queries.mT @ queries
    return gram, KeyRounding(*key_rounding(gram))


def stated(k: Tensor, rounding: KeyRounding, scale: Tensor) -> np.ndarray:
    """What the contract says, in float64, a key at a time."""
    x = torch.nan_to_num(k.double(), 0.0, 0.0, 0.0).numpy()
    influence, order = (part.double().numpy() for part in rounding)
    out = np.empty_like(x)
    for token, head in np.ndindex(*x.shape[:2]):
        size, offset = float(scale[head % len(scale)]), np.zeros(x.shape[2])
        for step, dim in enumerate(order[head].astype(int)):
            wanted = (x[token, head, dim] - offset[dim]) / size
            out[token, head, dim] = E4M3FN.values[E4M3FN.nearest(np.array([wanted]))][0] * size
            offset += influence[head, step] * (out[token, head, dim] - x[token, head, dim])
    return out


@over("name", MADE)
@over("shape, dtype, scales", combined(SHAPES, [torch.float32, torch.bfloat16], ["a layer", "a head"]))
def test_it_is_the_definition(name: str, shape: tuple[int, int, int], dtype: torch.dtype, scales: str) -> None:
    """A tie that FP32 sees otherwise changes what follows in its key, so a few keys may differ."""
    made, device = MADE[name]
    if name.startswith("C, "):
        library.use(name.removeprefix("C, "))
    tokens, heads, dim = shape
    g = torch.Generator().manual_seed(sum(shape))
    _, rounding = measured(heads, dim, g)
    k = torch.randn(tokens, heads, 2 * dim, generator=g).to(dtype)[:, :, :dim]  # part of a larger matrix
    k[0, 0, 0] = torch.inf
    scale = torch.rand(1 if scales == "a layer" else heads, generator=g) + 0.01
    found = made(k.to(device), KeyRounding(*(part.to(device) for part in rounding)), scale.to(device), E4M3).cpu()
    assert (found.dtype, found.shape) == (dtype, k.shape)
    codes, want = found.double().numpy(), stated(k, rounding, scale)
    close = (np.abs(codes - want) <= (2**-8 if dtype is torch.bfloat16 else 1e-6) * np.abs(want)).all(2)
    assert close.mean() > 0.9 or (~close).sum() == 1


@over("name", MADE)
@over("fp8, dtype", combined([E4M3, torch.float8_e5m2], [torch.float32, torch.bfloat16]))
def test_rounding_the_result_to_nearest_keeps_it(name: str, fp8: torch.dtype, dtype: torch.dtype) -> None:
    """So that writers which round to nearest store its codes, whatever the scale and the size of keys."""
    made, device = MADE[name]
    if name.startswith("C, "):
        library.use(name.removeprefix("C, "))
    g = torch.Generator().manual_seed(5)
    _, rounding = measured(2, 32, g)
    k = (torch.randn(40, 2, 32, generator=g) * torch.logspace(-5, 4, 40).view(-1, 1, 1)).to(dtype)
    scale, limit = torch.tensor([0.37, 0.0121]), FP8_MAX[fp8]
    found = made(k.to(device), KeyRounding(*(part.to(device) for part in rounding)), scale.to(device), fp8).cpu()
    values = ((found.float() / scale.view(-1, 1)).clamp(-limit, limit)).to(fp8).float() * scale.view(-1, 1)
    assert (values.to(dtype) == found).all()


@over("dim, rotated", [(64, 64), (40, 24)])
@over("normed, scales", combined([False, True], [0.0371, [0.0131, 0.271]]))
def test_keys_are_rotated_rounded_and_written(dim: int, rotated: int, normed: bool, scales: Scale) -> None:
    """By Triton's two kernels: the composed op's codes, but for ties, and `rope_write_kv`'s queries and values."""
    g, (tokens, heads) = torch.Generator().manual_seed(dim), (7, 2)
    _, rounding = measured(heads, dim, g)
    rounding = KeyRounding(*(part.to(DEVICE) for part in rounding))
    qkv = torch.randn(tokens, 4 * heads, dim, generator=g).bfloat16().to(DEVICE)
    q, k, v = qkv.split([2 * heads, heads, heads], 1)
    k[2, 1, 3] = torch.nan
    norms = ops.HeadNorms(*(torch.rand(dim, generator=g).bfloat16().to(DEVICE) for _ in range(2)), 1e-5) if normed else None
    angles = torch.rand(9, rotated // 2, generator=g) * 6
    rows = torch.randint(9, (tokens,), generator=g).to(DEVICE)
    rope = ops.Rope(norms, torch.cat([angles.cos(), angles.sin()], 1).to(DEVICE), rows)
    slots = torch.randperm(64, generator=g)[:tokens].to(DEVICE)
    caches = [layer_cache(KVCache([spec_for("fp8_e4m3", heads, dim, torch.bfloat16, E4M3, Layout.TENSOR_CORE)], 4, 16,
                                  DEVICE).views[0], scales, 0.5) for _ in range(3)]  # fmt: skip
    plain, found, want = caches[0], *(cache._replace(key_rounding=rounding) for cache in caches[1:])
    turned_q = rope_write_kv(q, k, v, rope, plain, slots)
    assert triton_kernel.rope_write_rounded_kv(q, k, v, rope, found, slots).equal(turned_q)
    _, turned_k = reference.normed_and_rotated(q, k, rope)
    rounded = reference.round_keys(turned_k, rounding, want.k_scale, E4M3)
    reference.write_kv(want, slots, rounded, v)
    codes = [cache.views["k"].view(torch.uint8).flatten(0, 1)[slots] for cache in caches]
    assert codes[1].dim() == 3
    same = (codes[1] == codes[2]).float().mean(), (codes[0] == codes[2]).float().mean()
    assert same[0] > 0.97 > same[1]
    for cache in (found, want):
        assert cache.views["v"].view(torch.uint8).equal(plain.views["v"].view(torch.uint8))


@pytest.mark.parametrize("seed", range(3))
def test_queries_read_less_of_its_errors_than_of_the_nearest_codes(seed: int) -> None:
    """The sum of (k' - k) H (k' - k)^T over keys; it is much less where dimensions of queries go together."""
    g = torch.Generator().manual_seed(seed)
    heads, dim = 2, 64
    gram, rounding = measured(heads, dim, g)
    k, one = correlated((heads, 100, dim), g).transpose(0, 1).contiguous(), torch.ones(1)
    nearest = k.clamp(-448, 448).to(E4M3).float()

    def lost(values: Tensor) -> Tensor:
        return torch.einsum("thd,hde,the->h", values - k, gram, values - k)

    assert (lost(reference.round_keys(k, rounding, one, E4M3)) < 0.7 * lost(nearest)).all()


def test_heads_without_a_measure_are_rounded_to_nearest() -> None:
    gram = torch.stack([torch.full((16, 16), torch.nan), torch.zeros(16, 16)])
    influence, order = key_rounding(gram)
    assert not influence.any()
    assert order.sort().values.equal(torch.arange(16).int().repeat(2, 1))


def test_writers_of_the_cache_store_its_codes_and_fused_ones_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """`write_kv` and `rope_write_kv`, of one token and of many: a key's codes depend on the key alone. `attend` takes no
    kernel that writes keys itself, nor does `project`, and the table says why."""
    platform = detect("cpu")
    ops.bind(platform)
    g = torch.Generator().manual_seed(1)
    tokens, heads, dim, size = 9, 2, 32, 16
    _, rounding = measured(heads, dim, g)
    spec = spec_for("fp8_e4m3", heads, dim, torch.float32, E4M3, Layout.BY_HEAD)

    def fresh(rounded: bool = True) -> LayerCache:
        views = spec.views(torch.zeros(2, size * spec.bytes_per_token, dtype=torch.uint8), size)
        return LayerCache(views, torch.tensor([0.3]), torch.ones(1), rounding if rounded else None)

    def codes(cache: LayerCache) -> Tensor:
        return cache.views["k"].view(torch.uint8)[0, :tokens]

    q, k, v = (torch.randn(tokens, n, dim, generator=g) for n in (2 * heads, heads, heads))
    slots = torch.arange(tokens)
    cos_sin = torch.cat([torch.ones(1, dim // 2), torch.zeros(1, dim // 2)], 1)
    rope = ops.Rope(None, cos_sin, torch.zeros(tokens, dtype=torch.int64))
    whole, rotated, apart, plain = fresh(), fresh(), fresh(), fresh(rounded=False)
    ops.write_kv(whole, slots, k, v)
    assert ops.rope_write_kv(q, k, v, rope, rotated, slots).equal(q)
    for at in range(tokens):
        ops.write_kv(apart, slots[at : at + 1], k[at : at + 1], v[at : at + 1])
    ops.write_kv(plain, slots, k, v)
    want = (ops.round_keys(k, rounding, whole.k_scale, E4M3) / 0.3).to(E4M3).view(torch.uint8)
    for cache in (whole, rotated, apart):
        assert codes(cache).equal(want)
        assert cache.views["v"].view(torch.uint8).equal(plain.views["v"].view(torch.uint8))
    assert not codes(plain).equal(want)
    weights = (torch.rand(dim, generator=g) for _ in range(2))
    turned = ops.Rope(ops.HeadNorms(*weights, 1e-5), torch.rand(1, dim, generator=g), rope.rows)
    normed = fresh()
    want_q, rotated_k = reference.normed_and_rotated(q, k, turned)
    torch.testing.assert_close(ops.rope_write_kv(q, k, v, turned, normed, slots), want_q)
    other = (ops.round_keys(rotated_k, rounding, whole.k_scale, E4M3) / 0.3).to(E4M3).view(torch.uint8)
    assert (codes(normed) != other).float().mean() < 0.05  # norms round otherwise by a bit, and so may a tie
    batch = build([Span([1] * tokens, 0, [0])], size, platform.device)
    attended = fresh()
    monkeypatch.setitem(bound, "attend", None)
    monkeypatch.setitem(bound, "project", None)
    assert ops.project(q, None, 2 * heads, rope, attended, batch, None) is None  # type: ignore[arg-type]
    ops.attend(q, k, v, rope, attended, batch, 1.0, None)
    assert codes(attended).equal(want)
    for op in ("attend", "project"):
        assert "keys are rounded by what queries read" in ops.table()[op]
