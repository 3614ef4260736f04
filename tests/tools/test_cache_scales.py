"""Scales of an FP8 cache that calibration writes: those of transformers' own keys and values, read alike by transformers, and
used by what is served."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import cases
from conftest import COMMON, LoadModel, relative_error, tokens
from models.test_mla_checkpoints import wide
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tools.test_quantize import assert_sentence, run, tensors_of
from tools.test_quantize_calibrated import calibrated, windows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from octavo import LLM
from octavo.cli import main
from octavo.convert.cache_scales import STRATEGIES, cache_scale
from octavo.convert.calibrated_layer import _Attention
from octavo.convert.save_quantized import save_quantized
from octavo.demo import MODEL_DIR
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.platform import Platform, detect
from octavo.quant import QuantRules
from octavo.quant.scheme import FP8_W8A16

LAYERS, HEADS = COMMON["num_hidden_layers"], COMMON["num_key_value_heads"]
EXACT = Platform(torch.device("cpu"), "test", widened_dtype=torch.float32)


def model_of(path: Path, first: float = 0.0) -> Path:
    """A Llama in BF16 with keys and values of other sizes in each layer and head. first: powers of two by which keys are larger
    and queries smaller, and values smaller and what reads them larger: in BF16 the same model, to the last bit."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**COMMON))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.where(torch.rand_like(p) < 0.02, 6.0, 2.0))
        for number, layer in enumerate(model.model.layers):
            attention, by = layer.self_attn, 2.0 ** (first + 3 * number)
            attention.k_proj.weight[:16] *= 3
            attention.v_proj.weight[16:] *= 3
            for linear, factor in (("q_proj", 1 / by), ("k_proj", by), ("v_proj", 1 / by), ("o_proj", by)):
                getattr(attention, linear).weight.mul_(factor)
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("cache_scales") / "model")


@pytest.fixture(scope="module")
def made(model: Path) -> dict[str | None, Path]:
    """Calibrated, by the strategy that was asked for."""
    found: dict[str | None, Path] = {strategy: model.parent / str(strategy) for strategy in (None, *STRATEGIES)}
    for strategy, path in found.items():
        calibrated(model, path, FP8_W8A16, kv_cache_scheme=strategy)
    return found


def scales_of(path: Path, layer: int) -> list[torch.Tensor]:
    return [tensors_of(path)[f"model.layers.{layer}.self_attn.{name}_scale"] for name in "kv"]


def read_by_transformers(path: Path) -> list[tuple[list[float], list[float]]]:
    """Of each layer, the largest rotated key and the largest value of each KV head, in float64."""
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        read = [theirs(torch.tensor([window]), use_cache=True).past_key_values.layers for window in windows()]
    found = []
    for number in range(LAYERS):
        each = ([layers[number].keys for layers in read], [layers[number].values for layers in read])
        keys, values = (torch.stack([one.abs().amax((0, 2, 3)) for one in some]).amax(0).tolist() for some in each)
        found.append((keys, values))
    return found


@cases("strategy", [None, "attn_head"])
def test_scales_are_of_what_transformers_caches(strategy: str | None, made: dict[str | None, Path], model: Path) -> None:
    """Of a layer, or of each head: a power of two, under which the largest key or value is a code from 28 to 56."""
    for layer, read in enumerate(read_by_transformers(model)):
        for scale, peaks in zip(scales_of(made[strategy], layer), read, strict=True):
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (HEADS, 1, 1) if strategy else (1,))
            largest = peaks if strategy else [max(peaks)]
            assert scale.flatten().tolist() == [2.0 ** (math.floor(math.log2(peak / 56)) + 1) for peak in largest]


def test_a_layer_has_its_own(made: dict[str | None, Path]) -> None:
    found = [tuple(scale.flatten().tolist()) for layer in range(LAYERS) for scale in scales_of(made["attn_head"], layer)]
    assert len(set(found)) == 2 * LAYERS
    assert all(len(set(pair)) == 2 for pair in found)


@cases("strategy", [None, *STRATEGIES])
def test_transformers_reads_them(strategy: str | None, made: dict[str | None, Path], load_model: LoadModel) -> None:
    """Its own cache is then of codes, as Octavo's with --kv-cache-dtype fp8. Without a scheme nobody's cache changes."""
    path = made[strategy]
    scheme = json.loads((path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme and scheme["strategy"]) == strategy
    theirs, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    names = {f"model.layers.{layer}.self_attn.{name}_scale" for layer in range(LAYERS) for name in "kv"}
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == (set() if strategy else names)
    if strategy:
        held = dict(theirs.named_parameters())
        assert all(held[name].equal(tensor) for name, tensor in tensors_of(path).items() if name in names)
    ids = tokens(60)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    own, codes = (load_model(path, kv=kv, on=EXACT).logits(ids) for kv in ("auto", "fp8_e4m3"))
    same, other = (codes, own) if strategy else (own, codes)
    assert relative_error(same, expected) < 0.1 * relative_error(other, expected)


def test_what_is_served_does_not_depend_on_the_sizes_of_keys_and_values(tmp_path: Path, load_model: LoadModel) -> None:
    """Keys of 2^9 times the size and values of 2^-9 times, beyond the format's ends at a scale of 1.0, lose what others do."""
    ids, errors = tokens(60), {}
    for name, first in (("plain", 0.0), ("far", 9.0)):
        path = model_of(tmp_path / name, first)
        calibrated(path, tmp_path / f"{name}-made", FP8_W8A16)
        bare = shutil.copytree(tmp_path / f"{name}-made", tmp_path / f"{name}-bare")
        for file in bare.glob("*.safetensors"):
            kept = {key: tensor for key, tensor in load_file(file).items() if not key.endswith(("k_scale", "v_scale"))}
            save_file(kept, file, {"format": "pt"})
        for index in bare.glob("*.index.json"):
            index.unlink()
        exact = load_model(bare, on=EXACT).logits(ids)
        for kind in ("made", "bare"):
            loaded = load_model(tmp_path / f"{name}-{kind}", kv="fp8_e4m3", on=EXACT)
            errors[name, kind] = relative_error(loaded.logits(ids), exact)
    assert errors["far", "made"] == errors["plain", "made"]  # scales are powers of two
    assert errors["plain", "made"] < 1.05 * errors["plain", "bare"]  # where neither leaves the format, chance decides
    assert errors["far", "bare"] > 5 * errors["far", "made"]


def test_two_ranks_read_the_scales_of_their_heads(made: dict[str | None, Path], load_model: LoadModel) -> None:
    path, ids = made["attn_head"], tokens(40)
    whole = load_model(path, kv="fp8_e4m3", on=EXACT).logits(ids, (30, 1, 9))

    def part(tp: TensorParallel) -> tuple[list[float], torch.Tensor]:
        loaded = load_model(path, kv="fp8_e4m3", on=EXACT, tp=tp)
        logits = Vocabulary(COMMON["vocab_size"], tp).whole(loaded.logits(ids, (30, 1, 9)))
        return loaded.model.attention_layers()[0].k_scale.tolist(), logits

    given = run_ranks(2, part)
    assert [scale for scales, _ in given for scale in scales] == scales_of(path, 0)[0].flatten().tolist()
    other = relative_error(load_model(path, on=EXACT).logits(ids, (30, 1, 9)), whole)
    for _, logits in given:
        assert relative_error(logits, whole) < 0.1 * other


def test_an_engine_takes_them_where_its_cache_is_fp8(made: dict[str | None, Path]) -> None:
    """A scheme in config.json changes no cache of its own accord."""
    for strategy, path in made.items():
        for kv, part in (("auto", "the checkpoint has KV scales, which --kv-cache-dtype auto does not use; fp8 does"),
                         ("fp8", "KV scales taken from the checkpoint")):  # fmt: skip
            llm = LLM(path, kv_cache_dtype=kv, device="cpu", cpu_kv_cache_gib=0.01, threads=1)
            assert any(part in line for line in llm._core.info.report), (strategy, kv)
            width = llm._core.runner.model.attention_layers()[0].cache.views["k"].element_size()  # type: ignore[attr-defined]
            assert width == (1 if kv == "fp8" else 2)


def test_the_first_start_writes_what_the_command_writes(made: dict[str | None, Path], model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    told = save_quantized(model, config, tmp_path / "out", QuantRules(FP8_W8A16), detect("cpu"), 1, windows=windows())
    assert "; KV scales of each layer, which --kv-cache-dtype fp8 uses: keys " in told
    expected, found = tensors_of(made[None]), tensors_of(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items() if name.endswith("_scale"))


def test_scales_that_are_there_are_kept(model: Path, tmp_path: Path) -> None:
    path = shutil.copytree(model, tmp_path / "model")
    file = next(path.glob("*.safetensors"))
    mine = {f"model.layers.0.self_attn.k_proj.{name}_scale": torch.tensor([0.25]) for name in "k"}
    save_file(load_file(file) | mine, file, {"format": "pt"})
    for index in path.glob("*.index.json"):
        index.unlink()
    said = calibrated(path, tmp_path / "out", FP8_W8A16)
    (name,) = mine
    assert f"no KV scales written: those that the checkpoint has are kept, such as {name}" in said
    assert {key for key in tensors_of(tmp_path / "out") if key.endswith(("k_scale", "v_scale"))} == {name}


def test_what_is_refused(made: dict[str | None, Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    wide(tmp_path / "mla").bfloat16().save_pretrained(tmp_path / "mla")
    with pytest.raises(OctavoError) as raised:
        calibrated(tmp_path / "mla", out, kv_cache_scheme="tensor")
    assert_sentence(raised.value, "--kv-cache-scheme tensor has no KV scales to write: MLA's FP8 cache", "leave it out")
    with pytest.raises(OctavoError) as raised:
        run(model, made[None], FP8_W8A16, windows=windows(), kv_cache_scheme="tensor")
    assert_sentence(raised.value, "other settings", "'kv_cache_scheme'")
    assert main(["quantize", str(MODEL_DIR), "-o", str(out), "--kv-cache-scheme", "tensor"]) == 1
    assert "--kv-cache-scheme is for --calibrate" in capsys.readouterr().err
    assert not out.exists()


@cases(("peaks", "layer", "heads"), [
    ([56.0, 55.9], [2.0], [2.0, 1.0]),
    ([28.0, 27.9], [1.0], [1.0, 0.5]),
    ([0.0, 0.0], [1.0], [1.0, 1.0]),
    ([1e-30, 3e38], [2.0**123], [2.0**-105, 2.0**123]),
])  # fmt: skip
def test_powers_of_two(peaks: list[float], layer: list[float], heads: list[float]) -> None:
    found = torch.tensor(peaks)
    assert cache_scale(found, by_head=False).tolist() == layer
    assert cache_scale(found, by_head=True).flatten().tolist() == heads


def test_values_that_are_not_finite_are_no_measure() -> None:
    """An FP8 cache stores 0 for them."""
    views = {name: torch.arange(48.0).view(3, 2, 2, 4).bfloat16() * sign for name, sign in (("k", 1), ("v", -2))}
    for view in views.values():
        view[2, 1, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    layer: Any = SimpleNamespace(kv_heads=2, head_dim=4, cache=SimpleNamespace(views=views))
    read = _Attention(layer, torch.device("cpu"))
    read.see()
    views["k"].zero_()
    read.see()
    assert read.peaks.tolist() == [[43.0, 47.0], [86.0, 94.0]]
