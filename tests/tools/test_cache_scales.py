"""Scales of an FP8 cache that calibration writes: those of transformers' own keys and values, read alike by transformers, and
used by what is served."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import cases
from conftest import COMMON, LoadModel, relative_error, tokens
from models.test_mla_checkpoints import wide
from quant.float64 import E4M3FN
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tools.test_quantize import assert_sentence, run, tensors_of
from tools.test_quantize_calibrated import calibrated, windows
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from octavo import LLM
from octavo.cli import main
from octavo.convert.cache_scales import STRATEGIES, Measured
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
SEEN = "for_test_cache_scales"  # the name of an attention function of transformers


class Read(NamedTuple):
    """Of one layer over all windows, float64 [windows][heads, T, D]: rotated queries [KV heads, queries, D], keys, values."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def model_of(path: Path, first: float = 0.0) -> Path:
    """A Llama in BF16 with keys and values of other sizes in each layer and head. first: powers of two by which keys are larger
    and queries smaller, and values smaller and what reads them larger: in BF16 the same model, to the last bit."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**COMMON))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.where(torch.rand_like(p) < 0.02, 6.0, 2.0))
        for number, layer in enumerate(model.model.layers):
            attention, by = layer.self_attn, 2.0**first
            attention.k_proj.weight[:16] *= 3 + number
            attention.v_proj.weight[16:] *= 5 - number
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


@cache
def read_by_transformers(path: Path) -> list[Read]:
    """In float64, of each layer."""
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    found = [Read([], [], []) for _ in range(LAYERS)]

    def see(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:
        one = found[module.layer_idx]
        one.queries.append(query[0].unflatten(0, (HEADS, -1)).flatten(1, 2))
        one.keys.append(key[0])
        one.values.append(value[0])
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **options)

    AttentionInterface.register(SEEN, see)
    theirs.set_attn_implementation(SEEN)
    with torch.no_grad():
        for window in windows():
            theirs(torch.tensor([window]))
    return found


def lost(x: list[torch.Tensor], scale: float, grams: torch.Tensor | None) -> np.ndarray:
    """float64 [heads]: squared errors of codes, or those of their products with queries, without each window's mean."""
    total = np.zeros(HEADS)
    for one in x:
        error = E4M3FN.values[E4M3FN.nearest(one.numpy() / scale)] * scale - one.numpy()
        if grams is None:
            total += np.square(error).sum((1, 2))
        else:
            error -= error.mean(1, keepdims=True)
            total += np.einsum("htd,hde,hte->h", error, grams.numpy(), error)
    return total


def candidates(peak: float) -> list[float]:
    """BF16 values between twice what the largest needs and four times that, and 1.0 where it leaves as much room."""
    least = 2 * peak / 448
    mantissas = 1 + np.arange(16) / 16
    return [1.0] * (least <= 1) + [float(m * 2.0 ** np.ceil(np.log2(least / m))) for m in mantissas]


@cases("by_head", [False, True])
@cases("size", [1e-6, 0.3, 5.0, 700.0])
def test_the_scale_of_least_error(size: float, by_head: bool) -> None:
    """As float64 finds it, by squares and by products with queries; not the same ones."""
    g = torch.Generator().manual_seed(4)
    windows_of = [size * torch.randn(60, HEADS, 8, generator=g) * torch.tensor([1.0, 0.2])[:, None] for _ in range(3)]
    windows_of = [(x + 3 * size * torch.arange(8) / 8).bfloat16() for x in windows_of]
    mixed = torch.randn(HEADS, 4, 8, generator=g)
    grams = mixed.mT @ mixed
    one, chosen = Measured(180), []
    for x in windows_of:
        one.see(x)
    x = [window.double().transpose(0, 1) for window in windows_of]
    peaks = torch.stack([window.abs().amax((1, 2)) for window in x]).amax(0)
    for by in (grams, None):
        chosen.append(one.scale(by_head=by_head, grams=by))
        for found, of in zip(chosen[-1].flatten().tolist(), [[0], [1]] if by_head else [[0, 1]], strict=True):
            errors = {
                scale: lost(x, scale, by if by is None else by.double())[of].sum()
                for scale in candidates(float(peaks[of].max()))
            }
            assert found == min(errors, key=errors.__getitem__)
            assert max(errors.values()) > 1.02 * min(errors.values())
    assert by_head <= (not chosen[0].equal(chosen[1]))  # of one scale for both, now and then it is the same


@cases("strategy", [None, "attn_head"])
def test_scales_are_of_what_transformers_caches(strategy: str | None, made: dict[str | None, Path], model: Path) -> None:
    """Octavo's layers are in BF16, so errors are not the same to the last percent."""
    for layer, read in enumerate(read_by_transformers(model)):
        grams = torch.stack([q.transpose(1, 2) @ q for q in read.queries]).sum(0)
        for scale, x, by in zip(scales_of(made[strategy], layer), (read.keys, read.values), (grams, None), strict=True):
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (HEADS, 1, 1) if strategy else (1,))
            peaks = torch.stack([one.abs().amax((1, 2)) for one in x]).amax(0)
            for found, of in zip(scale.flatten().tolist(), [[0], [1]] if strategy else [[0, 1]], strict=True):
                least = 2 * float(peaks[of].max()) / 448
                assert found == torch.tensor(found).bfloat16().item()
                assert found == 1.0 or 0.99 * least <= found <= 2.02 * least
                errors = [lost(x, one, by)[of].sum() for one in candidates(float(peaks[of].max()))]
                assert lost(x, found, by)[of].sum() < 1.03 * min(errors)


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
    assert errors["far", "made"] == pytest.approx(errors["plain", "made"], rel=1e-3)
    assert errors["plain", "made"] < 1.2 * errors["plain", "bare"]
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


def test_few_of_many_tokens_are_kept_and_all_of_few() -> None:
    """What is kept comes from all places of a window alike; the largest are of all."""
    for windows_of, length, kept in ((4, 100, 400), (64, 512, 2048), (1024, 512, 2048)):
        one = Measured(windows_of * length)
        places = torch.zeros(length)
        for number in range(windows_of):
            x = torch.arange(length, dtype=torch.float32).view(-1, 1, 1).expand(length, 1, 1).clone()
            x[0] = 1000.0 * (number == windows_of - 1)
            one.see(x)
        for part in one.kept:
            values = part.flatten().long()
            places[values[values < length]] += 1
        assert sum(part.shape[1] for part in one.kept) == kept
        assert float(torch.stack(one.peaks).amax()) == 1000.0
        assert places[1:].max() - places[1:].min() <= 1


@cases("fill", [0.0, torch.nan, torch.inf])
def test_scales_of_nothing_are_one(fill: float) -> None:
    one = Measured(8)
    one.see(torch.full((8, 2, 4), fill))
    for by_head in (False, True):
        assert one.scale(by_head=by_head, grams=torch.full((2, 4, 4), fill)).flatten().tolist() == [1.0] * (1 + by_head)
