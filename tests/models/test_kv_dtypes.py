"""Decoding over each kind of KV cache against a full forward, and where an FP8 cache's scales come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cases import cases
from conftest import COMMON, Loaded, LoadModel, relative_error, tokens
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import batch
from octavo.distributed import TensorParallel
from octavo.engine.kv_setup import cache_specs
from octavo.errors import OctavoError
from octavo.kvcache import KVCache, spec_for
from octavo.layers.attention import PagedAttention
from octavo.layers.rope import RotaryEmbedding, rope_parameters
from octavo.platform import Platform
from octavo.quant import BF16, QuantRules
from octavo.quant.formats import WHOLE, Shard
from octavo.weights import Loader, SafetensorsSource

CPU = Platform(torch.device("cpu"), "test", widened_dtype=torch.float32)
FNUZ = dataclasses.replace(CPU, fp8_dtype=torch.float8_e4m3fnuz)
IDS = tokens(33)
# What storing keys and values costs the logits. A value in e4m3 is good to 2.6% of itself (3 mantissa bits, to nearest),
# in e5m2 to 5.3%, in BF16 to 0.17%; attention averages errors, and the residual stream dilutes them.
COST = {
    "auto": (0.0, 1e-5),
    "bfloat16": (1e-4, 3e-3),
    "fp8_e4m3": (2e-3, 0.07),
    "fp8_per_token_head": (2e-3, 0.07),
    "fp8_e5m2": (4e-3, 0.14),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**COMMON))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    model.save_pretrained(tmp_path)
    return tmp_path


def add(path: Path, **tensors: torch.Tensor) -> None:
    """More tensors for the checkpoint; `_` in a name's module path is written as given."""
    stored = load_file(path / "model.safetensors")
    save_file(stored | tensors, path / "model.safetensors", metadata={"format": "pt"})


@cases("on", [CPU, FNUZ], ids=["e4m3fn", "e4m3fnuz"])
@cases("kv", COST)
def test_decoding_costs_no_more_than_the_cache_rounds(kv: str, on: Platform, checkpoint: Path, load_model: LoadModel) -> None:
    full = load_model(checkpoint, on=on).logits(IDS)
    loaded = load_model(checkpoint, kv=kv, on=on)
    least, most = COST[kv]
    tokenwise = loaded.logits(IDS, (1,) * len(IDS))
    assert least <= relative_error(tokenwise, full) < most
    # The cache is read back within a step too, so chunks and single tokens see the same keys and values.
    assert relative_error(loaded.logits(IDS), tokenwise) < max(1e-5, least / 10)
    assert relative_error(loaded.logits(IDS, (5, 1, 20, 7)), tokenwise) < max(1e-5, least / 10)


@cases("kv", COST)
def test_requests_decoded_together_are_those_decoded_alone(kv: str, checkpoint: Path, load_model: LoadModel) -> None:
    loaded = load_model(checkpoint, kv=kv, on=CPU)
    prompts = [tokens(n, seed=n) for n in (9, 4, 14)]
    alone = [loaded.logits(ids)[-1] for ids in prompts]
    tables = [list(range(1 + 6 * i, 7 + 6 * i)) for i in range(3)]
    loaded.hidden([batch.Span(ids[:-1], 0, table) for ids, table in zip(prompts, tables, strict=True)])
    last = [batch.Span(ids[-1:], len(ids) - 1, table) for ids, table in zip(prompts, tables, strict=True)]
    with torch.inference_mode():
        together = loaded.model.logits(loaded.hidden(last))
    assert relative_error(together, torch.stack(alone)) < 1e-5


def test_an_fp8_cache_takes_half_of_bf16() -> None:
    def nbytes(kv: str) -> int:
        specs = [spec_for(kv, 8, 128, torch.bfloat16, torch.float8_e4m3fn)] * 3
        cache = KVCache(specs, 10, 16, torch.device("cpu"))
        assert cache.nbytes == sum(view.nbytes for views in cache.views for view in views.values())
        return cache.nbytes

    bf16 = nbytes("auto")
    assert nbytes("bfloat16") == bf16 == 3 * 10 * 16 * 8 * 128 * 2 * 2
    assert nbytes("fp8_e4m3") == nbytes("fp8_e5m2") == bf16 / 2
    assert nbytes("fp8_per_token_head") == bf16 / 2 + 3 * 10 * 16 * 8 * 4 * 2


@cases("shape", [(), (1,)], ids=str)
@cases(
    ("k_name", "v_name"),
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("kv_scale", "kv_scale"),
    ],
)
def test_scales_come_from_the_checkpoint(
    k_name: str, v_name: str, shape: tuple[int, ...], checkpoint: Path, load_model: LoadModel
) -> None:
    scales = {}
    for i in range(COMMON["num_hidden_layers"]):
        at = f"model.layers.{i}.self_attn."
        scales |= {at + v_name: torch.full(shape, 0.03 + i), at + k_name: torch.full(shape, 0.02 + i)}
    add(checkpoint, **scales)
    for on, factor in ((CPU, 1), (FNUZ, 2)):  # an e4m3fnuz code means half as much
        layers = load_model(checkpoint, kv="fp8_e4m3", on=on).model.attention_layers()
        for i, layer in enumerate(layers):
            assert layer.scales_from_checkpoint
            assert layer.k_scale.tolist() == pytest.approx([(0.02 + i) * factor])
            assert layer.v_scale.tolist() == pytest.approx([((0.02 if k_name == v_name else 0.03) + i) * factor])


def test_scales_are_one_without_any(checkpoint: Path, load_model: LoadModel) -> None:
    for layer in load_model(checkpoint, kv="fp8_e4m3", on=CPU).model.attention_layers():
        assert (layer.k_scale.tolist(), layer.v_scale.tolist(), layer.scales_from_checkpoint) == ([1.0], [1.0], False)


def test_scales_are_used(checkpoint: Path, load_model: LoadModel) -> None:
    """Scales that fit keep the logits; scales a thousand times too small clamp nearly every key and value."""
    full = load_model(checkpoint, on=CPU).logits(IDS)

    def error(scale: float, on: Platform = CPU) -> float:
        names = (f"model.layers.{i}.self_attn.{x}_scale" for i in range(COMMON["num_hidden_layers"]) for x in "kv")
        add(checkpoint, **{name: torch.tensor(scale) for name in names})
        return relative_error(load_model(checkpoint, kv="fp8_e4m3", on=on).logits(IDS), full)

    good = error(0.01)
    assert good < COST["fp8_e4m3"][1]
    assert error(1e-5) > 10 * good
    # Doubled for e4m3fnuz, whose largest code is half, the scale covers the same range with the same codes.
    assert error(0.01, FNUZ) == pytest.approx(error(0.01), rel=0.02)


def test_measured_scales_fit_what_was_seen(checkpoint: Path, load_model: LoadModel) -> None:
    """`observe`: the largest key and value of the forward become the largest code."""
    loaded = load_model(checkpoint, kv="fp8_e4m3", on=CPU)
    layers = loaded.model.attention_layers()
    for layer in layers:
        layer.observe = True
    loaded.logits(IDS)
    used = 1 + len(IDS) // loaded.block_size
    for layer in layers:
        codes = [layer.cache.views[name][1 : 1 + used].float() for name in "kv"]
        assert [float(c.abs().max()) for c in codes] == [448.0, 448.0]
        assert layer.k_scale != layer.v_scale


def test_other_scales_in_the_checkpoint_are_no_strangers(checkpoint: Path, load_model: LoadModel) -> None:
    one = torch.tensor(1.0)
    add(checkpoint, **{"model.layers.0.self_attn.q_scale": one, "model.layers.1.self_attn.q_proj.output_scale": one.clone()})
    load_model(checkpoint, on=CPU)


@cases("on", [CPU, FNUZ], ids=["e4m3fn", "e4m3fnuz"])
@cases("count", [2, 3, 8])
def test_scales_of_heads_come_from_the_checkpoint(count: int, on: Platform, checkpoint: Path, load_model: LoadModel) -> None:
    """As many as the model has KV heads, which is 2, are kept; of another number the largest is the layer's."""
    stored = torch.rand(count, 1).double() * 0.1 + 0.01
    add(checkpoint, **{f"model.layers.1.self_attn.{x}_scale": stored * (1 + (x == "v")) for x in "kv"})
    first, layer, _ = load_model(checkpoint, kv="fp8_e4m3", on=on).model.attention_layers()
    wanted = stored.flatten() if count == COMMON["num_key_value_heads"] else stored.max().view(1)
    wanted = wanted * (2 if on is FNUZ else 1)
    for found, by in ((layer.k_scale, 1), (layer.v_scale, 2)):
        assert (found.dtype, found.device) == (torch.float32, on.device)
        torch.testing.assert_close(found, (wanted * by).float())
    assert (first.k_scale.tolist(), first.scales_from_checkpoint) == ([1.0], False)


def test_scales_of_heads_are_used(checkpoint: Path, load_model: LoadModel) -> None:
    """Where one head's keys and values take other scales than the other's, one scale for both costs more."""
    stored = load_file(checkpoint / "model.safetensors")
    for name, w in stored.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            w[:16] *= 1e-5  # the first head's: of one scale with the other they would all be 0
    save_file(stored, checkpoint / "model.safetensors", metadata={"format": "pt"})
    full = load_model(checkpoint, on=CPU)
    wide = full.logits(IDS)
    errors = []
    for scale in ([3e-7, 0.01], 0.01):
        add(checkpoint, **{f"model.layers.{i}.self_attn.{x}_scale": torch.tensor(scale) for i in range(3) for x in "kv"})
        loaded = load_model(checkpoint, kv="fp8_e4m3", on=CPU)
        loaded.logits(IDS)
        layer, value = loaded.model.attention_layers()[0], full.cache.views[0]["v"]
        found = layer.cache.views["v"].float() * layer.v_scale.view(-1, 1)
        errors.append(relative_error(found[..., 0, :], value[..., 0, :].float()))
        assert relative_error(loaded.logits(IDS), wide) < COST["fp8_e4m3"][1]
    assert errors[0] < 0.05
    assert errors[1] > 0.5


@pytest.mark.parametrize(
    ("size", "count", "parts"), [(2, 4, [[0, 1], [2, 3]]), (4, 2, [[0], [0], [1], [1]]), (2, 2, [[0], [1]])]
)
def test_a_rank_has_the_scales_of_its_heads(size: int, count: int, parts: list[list[int]], tmp_path: Path) -> None:
    """As QKVLinear splits the heads; a part for each rank, of which several may have the same."""
    save_file({"k_scale": torch.arange(count) + 1.0, "v_scale": torch.arange(count) + 5.0}, tmp_path / "model.safetensors")
    for rank, part in enumerate(parts):
        tp = TensorParallel(rank, size)
        layer = PagedAttention(8, tp.part(count), 16, 0.25, RotaryEmbedding(16, rope_parameters({}), 64, 64))
        layer.load(Loader(SafetensorsSource(tmp_path), CPU, QuantRules(BF16), torch.float32, tp))
        assert layer.k_scale.tolist() == [i + 1.0 for i in part]
        assert layer.v_scale.tolist() == [i + 5.0 for i in part]


def test_scales_are_loaded_without_looking_at_them(tmp_path: Path) -> None:
    """A loader that has no values, only shapes."""
    save_file({"k_scale": torch.ones(2), "v_scale": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    meta = dataclasses.replace(CPU, device=torch.device("meta"))

    class Shapes(Loader):
        def read(self, name: str, shape: Sequence[int] | None, shard: Shard = WHOLE, part: slice | None = None) -> torch.Tensor:
            return torch.empty(self.stored_shape(name), device="meta")

    layer = PagedAttention(8, 2, 16, 0.25, RotaryEmbedding(16, rope_parameters({}), 64, 64))
    layer.load(Shapes(SafetensorsSource(tmp_path), meta, QuantRules(BF16), torch.float32))
    assert [(s.device.type, s.shape) for s in (layer.k_scale, layer.v_scale)] == [("meta", (2,)), ("meta", (1,))]


def test_measuring_leaves_the_scales_where_they_are(checkpoint: Path, load_model: LoadModel) -> None:
    """Graphs, and the table of a kernel, hold their addresses."""
    loaded = load_model(checkpoint, kv="fp8_e4m3", on=CPU)
    layers = loaded.model.attention_layers()
    before = [(layer.k_scale.data_ptr(), layer.v_scale.data_ptr()) for layer in layers]
    for layer in layers:
        layer.observe = True
    loaded.logits(IDS)
    for layer, places in zip(layers, before, strict=True):
        assert (layer.k_scale.data_ptr(), layer.v_scale.data_ptr()) == places
        assert layer.cache[1:3] == (layer.k_scale, layer.v_scale)
        assert 0 < float(layer.k_scale) != 1


@pytest.mark.parametrize("chunks", [(33,), (5, 1, 20, 7)], ids=str)
def test_a_span_s_rotary_rows_are_not_its_places(chunks: tuple[int, ...], checkpoint: Path, load_model: LoadModel) -> None:
    """Shifted by 7, they give what a table shifted by 7 gives; a part of a request may have another shift than the rest."""
    loaded = load_model(checkpoint, on=CPU)
    blocks = list(range(1, 12))

    rotary = loaded.model.attention_layers()[0].rotary
    cos_sin = rotary.cos_sin

    def hidden(delta: int, table_delta: int) -> torch.Tensor:
        """Of all parts, the second and later ones shifted."""
        start, found = 0, []
        for length in chunks:
            by, rolled = (0, 0) if start == 0 and len(chunks) > 1 else (delta, table_delta)
            rotary.cos_sin = cos_sin.roll(-rolled, 0)
            found.append(loaded.hidden([batch.Span(IDS[start : start + length], start, blocks, rotary_delta=by)]))
            start += length
        return torch.cat(found)

    shifted = hidden(7, 0)
    assert relative_error(shifted, hidden(0, 7)) < 1e-6
    if len(chunks) > 1:  # attention sees no shift of all tokens
        assert relative_error(shifted, hidden(0, 0)) > 1e-3


def skip_layers(loaded: Loaded, kv: str, skipped: Sequence[str]) -> Loaded:
    """The same model over a new cache, in which `skipped` layers are in FP32."""
    specs = cache_specs(loaded.model, kv, torch.float32, CPU, skipped)
    cache = KVCache(specs, 40, 4, CPU.device)
    loaded.model.bind_cache(cache.views)
    return dataclasses.replace(loaded, cache=cache)


@cases("kv", [kv for kv in COST if kv != "auto"])
def test_layers_whose_cache_is_the_models_own(kv: str, checkpoint: Path, load_model: LoadModel) -> None:
    """A skipped layer keeps what it is given, bit for bit: with all skipped nothing differs, with the first its keys do not."""
    own = load_model(checkpoint, kv="auto", on=CPU)
    exact, first = own.logits(IDS, (1,) * len(IDS)), own.cache.buffers[0].clone()
    loaded = load_model(checkpoint, kv=kv, on=CPU)
    everywhere = relative_error(loaded.logits(IDS, (1,) * len(IDS)), exact)
    layers = len(loaded.cache.views)
    every = skip_layers(loaded, kv, [str(layer) for layer in range(layers)])
    assert torch.equal(every.logits(IDS, (1,) * len(IDS)), exact)
    some = skip_layers(loaded, kv, ["0"])
    less = relative_error(some.logits(IDS, (1,) * len(IDS)), exact)
    assert 0 < less < everywhere
    assert torch.equal(some.cache.buffers[0], first)
    wide, narrow = (view["k"].dtype for view in some.cache.views[:2])
    assert (wide, narrow) == (torch.float32, loaded.cache.views[1]["k"].dtype)


def test_skipped_layers_have_no_scales(checkpoint: Path, load_model: LoadModel) -> None:
    loaded = skip_layers(load_model(checkpoint, on=CPU), "fp8_e4m3", ["1"])
    loaded.model.calibrate(lambda: loaded.hidden([batch.Span(IDS, 0, list(range(9)))]))
    scales = [float(layer.k_scale) for layer in loaded.model.attention_layers()]
    assert [scale != 1.0 for scale in scales] == [layer != 1 for layer in range(len(scales))]
    assert len(loaded.model.kv_scales()[0]) == 2 * (len(scales) - 1)


def test_layers_that_cannot_be_skipped(checkpoint: Path, load_model: LoadModel) -> None:
    loaded = load_model(checkpoint, on=CPU)
    last = len(loaded.cache.views) - 1
    with pytest.raises(OctavoError, match=f"names layer {last + 1}; the model's are 0 to {last}."):
        skip_layers(loaded, "fp8_e4m3", [str(last + 1), "0"])
    assert skip_layers(loaded, "fp8_e4m3", ["sliding_window"]).cache.views[0]["k"].dtype is torch.float8_e4m3fn  # it has none
