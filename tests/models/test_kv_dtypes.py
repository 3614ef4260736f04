"""Decoding over each kind of KV cache against a full forward, and where an FP8 cache's scales come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import COMMON, LoadModel, relative_error, tokens
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import batch
from octavo.kvcache import KVCache, spec_for
from octavo.platform import Platform

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


@pytest.mark.parametrize("on", [CPU, FNUZ], ids=["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("kv", COST)
def test_decoding_costs_no_more_than_the_cache_rounds(kv: str, on: Platform, checkpoint: Path, load_model: LoadModel) -> None:
    full = load_model(checkpoint, on=on).logits(IDS)
    loaded = load_model(checkpoint, kv=kv, on=on)
    least, most = COST[kv]
    tokenwise = loaded.logits(IDS, (1,) * len(IDS))
    assert least <= relative_error(tokenwise, full) < most
    # The cache is read back within a step too, so chunks and single tokens see the same keys and values.
    assert relative_error(loaded.logits(IDS), tokenwise) < max(1e-5, least / 10)
    assert relative_error(loaded.logits(IDS, (5, 1, 20, 7)), tokenwise) < max(1e-5, least / 10)


@pytest.mark.parametrize("kv", COST)
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


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize(
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
