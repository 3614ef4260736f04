"""`octavo compare`: its numbers against float64 by transformers, outliers that one scheme survives and another does not, the
search for a configuration, the file that serving takes, and the report.
"""

from __future__ import annotations

import functools
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import COMMON, tokens
from models.test_quantized import fake_quantize
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM, SamplingParams
from octavo.cli import engine_config, main, make_parser
from octavo.command_words import with_dashes
from octavo.config import EngineConfig
from octavo.convert.output_directory import ORIGIN
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.engine import joining
from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant import FP8_PER_CHANNEL, QuantRules
from octavo.quant.scheme import FP8_W8A16
from octavo.server import serve
from octavo.text.tokenizer import Tokenizer
from octavo.tools.compare import html_report, loss_table
from octavo.tools.compare.compare import add_arguments, compare, write_atomically, write_config
from octavo.tools.compare.comparison import Comparison
from octavo.tools.compare.layer_errors import Sensitivity, ignore_list, worth_keeping
from octavo.tools.compare.measure import REFERENCE, Measurement, Reference, Variant, cut, measure, open_core
from octavo.tools.compare.search import DEFAULT_BUDGET, Budget, name_of, rungs, search, verdict
from octavo.tools.quantize.quantize import quantize_checkpoint

IDS = tokens(192, seed=5)
WINDOW = 64
EXACT = Platform(torch.device("cpu"), "test", widened_dtype=torch.float32)  # sums in FP32 whatever the CPU prefers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama whose distributions are far from uniform, in BF16."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**COMMON))
    with torch.no_grad():
        for name, p in model.named_parameters():
            sharp = 10 if "q_proj" in name or "k_proj" in name else 4  # attention that looks at some tokens more than others
            p.copy_(p * sharp if p.ndim == 2 else p + torch.randn(p.shape) * 0.2)
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def _fp32_sums() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "detect", lambda *_: EXACT)
        yield


def config(model: Path, **options: object) -> EngineConfig:
    return EngineConfig(model=str(model), device="cpu", threads=1, cpu_kv_cache_gib=0.05, max_model_len=WINDOW, **options)


def compared(model: Path, schemes: list[str], kvs: list[str], budget: str | None = None, **options: object) -> Comparison:
    return compare(config(model, **options), IDS, schemes, kvs, Budget.parse(budget) if budget else None, window=WINDOW)


@functools.cache
def both(model: Path) -> Comparison:
    """Per tensor and per channel, with a BF16 cache."""
    return compared(model, ["fp8", "ptpc_fp8"], ["auto"])


def row(found: Comparison, scheme: str, kv: str = "auto") -> Measurement:
    return next(m for m in found.measured if m.variant == Variant(scheme, kv))


# --- the numbers ------------------------------------------------------------------------


def log_probs(model: LlamaForCausalLM) -> torch.Tensor:
    """Float64 [windows, positions, vocabulary] of transformers' logits."""
    with torch.no_grad():
        return model(torch.tensor(IDS).view(-1, WINDOW)).logits.double().log_softmax(-1)[:, :-1]


@pytest.mark.parametrize("scheme", ["fp8", "ptpc_fp8", "fp8_block"])
def test_the_metrics_are_those_of_float64_through_transformers(tiny: Path, scheme: str) -> None:
    found = compared(tiny, [scheme], ["auto"], dtype="float32")
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager")
    targets = torch.tensor(IDS).view(-1, WINDOW)[:, 1:, None]
    p = log_probs(model)
    fake_quantize(model, scheme)
    q = log_probs(model)
    m = row(found, scheme)
    assert found.predictions == targets.numel() == 3 * (WINDOW - 1)
    assert found.reference.perplexity == pytest.approx(float((-p.gather(-1, targets)).mean().exp()), rel=1e-5)
    # a value between two codes goes the other way now and then, hence percents and not FP32's precision
    assert m.perplexity == pytest.approx(float((-q.gather(-1, targets)).mean().exp()), rel=2e-3)
    kl = (p.exp() * (p - q)).sum(-1)
    assert m.kl == pytest.approx(float(kl.mean()), rel=0.05)
    assert m.kl_p99 == pytest.approx(float(kl.flatten().quantile(0.99)), rel=0.1)
    assert m.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.02)
    excess = (p - q).gather(-1, targets).flatten()
    assert m.change == pytest.approx(float(excess.mean().exp()) - 1, rel=0.15, abs=2e-3)
    assert m.change_error == pytest.approx(float(excess.std(correction=0)) / math.sqrt(len(excess)), rel=0.05)
    assert m.kl > 1e-4  # something was quantized


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_kl_keeps_its_precision_however_small(size: float) -> None:
    from octavo.tools.compare.measure import _kl

    g = torch.Generator().manual_seed(0)
    p = torch.randn(16, 5000, generator=g) * 4
    q = p + torch.randn(16, 5000, generator=g) * size + 7  # a constant changes nothing
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    torch.testing.assert_close(_kl(p, q).double(), (a.exp() * (a - b)).sum(-1), rtol=2e-2 if size < 1e-3 else 1e-4, atol=1e-12)


def test_greedy_counts_the_tokens_before_the_first_difference(tiny: Path) -> None:
    found = both(tiny)
    text = cut(IDS, WINDOW, None, WINDOW)
    params = SamplingParams(temperature=0, max_tokens=text.greedy, ignore_eos=True)
    counts = []
    llms = [LLM(tiny, device="cpu", threads=1, cpu_kv_cache_gib=0.05, quantization=q) for q in (None, "fp8")]
    a, b = ([out.outputs[0].token_ids for out in llm.generate(text.prompts, params, use_tqdm=False)] for llm in llms)
    for x, y in zip(a, b, strict=True):
        counts.append(next((i for i in range(text.greedy) if x[i] != y[i]), text.greedy))
    assert row(found, "fp8").greedy == sum(counts) / len(counts) < text.greedy


def test_equal_configurations_differ_in_nothing(tiny: Path) -> None:
    same = row(compared(tiny, ["bf16"], ["auto", "bfloat16"]), "bf16", "bfloat16")
    assert (same.kl, same.kl_p99, same.top1, same.change, same.change_error) == (0, 0, 1, 0, 0)
    base, text = config(tiny, quantization_ignore=("*",)), cut(IDS, WINDOW, 100, WINDOW)
    reference = Reference.of(open_core(base, REFERENCE, text), text)
    ignored = measure(base, Variant("fp8"), text, reference)  # FP8 of nothing
    assert (ignored.kl, ignored.top1, ignored.greedy, ignored.quantized_values) == (0, 1, text.greedy, 0)


def test_layer_errors_are_those_of_the_stored_weights(tiny: Path) -> None:
    found = both(tiny)
    assert [e.path for e in found.layers[:4]] == [
        f"model.layers.0.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    tensors = load_file(tiny / "model.safetensors")
    for e in found.layers:
        w = [tensors[f"{name}.weight"].double() for name in e.names]
        codes = [((x.float() / (x.float().abs().amax(1, keepdim=True) / 448)).to(torch.float8_e4m3fn)) for x in w]
        wrong = sum(
            float((c.double() * (x.abs().amax(1, keepdim=True) / 448) - x).square().sum())
            for c, x in zip(codes, w, strict=True)
        )
        total = sum(float(x.square().sum()) for x in w)
        assert e.weight["ptpc_fp8"] == pytest.approx(math.sqrt(wrong / total), rel=1e-3)
        assert 0.02 < e.weight["ptpc_fp8"] <= e.weight["fp8"] * 1.05 < 0.04
        assert 0.02 < e.output["ptpc_fp8"] < 0.06
    assert sum(s.kl for s in found.ranked) == pytest.approx(row(found, found.scheme).kl, rel=0.5)  # KLs add up, roughly
    assert {s.path: s.extra_bytes for s in found.ranked}["model.layers.0.self_attn.o_proj"] == 2 * 64 * 64 - (64 * 64 + 4 * 64)


def test_text_is_cut_evenly() -> None:
    ids = list(range(1000))
    text = cut(ids, 100, 300, 512)
    assert [w[0] for w in text.windows] == [0, 300, 600]
    assert all(len(w) == 100 for w in text.windows)
    assert len(cut(ids, 100, None, 512).windows) == 10
    small = cut(ids, 512, 64, 40)  # a model of 40 positions
    assert (len(small.windows[0]), small.longest) == (40, 40)
    with pytest.raises(OctavoError, match="fewer than 2 tokens"):
        cut([1], 512, None, 512)


# --- outliers that change nothing in BF16 -----------------------------------------------


def changed(model: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def weight_outliers(t: dict[str, torch.Tensor]) -> None:
    """Two rows of every query head up by 2^20 and of every key head down by as much: their product is what it was.

    A dimension and its partner are rotated together, so both are scaled. Exact, since the factor is a power of two. FP8 is
    floating: a factor of 100 costs it little, but 2^20 pushes the other rows of a matrix with one scale below its subnormals.
    """
    for layer in range(COMMON["num_hidden_layers"]):
        for name, factor in (("q_proj", 2.0**20), ("k_proj", 2.0**-20)):
            w = t[f"model.layers.{layer}.self_attn.{name}.weight"].view(-1, 16, 64)
            w[:, [3, 3 + 8]] *= factor


def activation_outliers(t: dict[str, torch.Tensor]) -> None:
    """One channel of layer 1's first norm up by 2^20 and the columns that read it down: no scheme's token scale survives."""
    t["model.layers.1.input_layernorm.weight"][7] *= 2.0**20
    for name in ("q_proj", "k_proj", "v_proj"):
        t[f"model.layers.1.self_attn.{name}.weight"][:, 7] *= 2.0**-20


@pytest.fixture(scope="module")
def rows_up(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(tiny, tmp_path_factory.mktemp("rows") / "model", weight_outliers)


@pytest.fixture(scope="module")
def channel_up(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(tiny, tmp_path_factory.mktemp("channel") / "model", activation_outliers)


def test_weight_outliers_hurt_one_scale_a_matrix_and_not_one_a_channel(tiny: Path, rows_up: Path) -> None:
    plain, hurt = both(tiny), both(rows_up)
    assert hurt.reference.perplexity == pytest.approx(plain.reference.perplexity, rel=1e-6)  # BF16 is what it was
    assert row(hurt, "ptpc_fp8").kl == pytest.approx(row(plain, "ptpc_fp8").kl, rel=1e-3)  # and so are PTPC's codes
    assert row(hurt, "fp8").kl > 5 * row(plain, "fp8").kl
    assert {s.path.rpartition(".")[2] for s in plain.ranked} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_activation_outliers_point_to_the_layer_that_they_hurt(tiny: Path, channel_up: Path) -> None:
    plain, hurt = both(tiny), both(channel_up)
    assert hurt.reference.perplexity == pytest.approx(plain.reference.perplexity, rel=1e-6)
    assert row(hurt, "ptpc_fp8").kl > 5 * row(plain, "ptpc_fp8").kl
    assert hurt.ignore == [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    kept = hurt.measured[-1]
    assert kept.variant.ignore == tuple(hurt.ignore)
    assert kept.kl < row(plain, "ptpc_fp8").kl * 1.5


# --- --auto and the file that it writes -------------------------------------------------


def test_auto_climbs_to_ptpc_and_serving_takes_its_file(rows_up: Path, tiny: Path, tmp_path: Path) -> None:
    limit = 2 * row(both(tiny), "ptpc_fp8").kl
    found = compared(rows_up, ["fp8", "ptpc_fp8"], ["auto"], budget=str(limit))
    assert found.chosen is not None
    assert found.chosen.variant == Variant("ptpc_fp8")
    assert found.chosen.kl <= limit < found.measured[0].kl
    assert "fp8 with a BF16 KV cache" in found.verdict
    file = tmp_path / "found.json"
    write_config(file, found, config(rows_up))
    args = make_parser("serve", serve.add_arguments).parse_args(with_dashes(["M", "--quantization-config", str(file)]))
    assert engine_config(args).quantization == "ptpc_fp8"
    options = dict(device="cpu", threads=1, cpu_kv_cache_gib=0.05)
    outputs = [
        LLM(rows_up, **options, **how).generate([IDS[:20]], SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)
        for how in ({"quantization_config": str(file)}, {"quantization": "ptpc_fp8"})
    ]
    assert outputs[0][0].outputs[0].token_ids == outputs[1][0].outputs[0].token_ids


def test_auto_keeps_the_layer_that_is_hurt(tiny: Path, channel_up: Path, tmp_path: Path) -> None:
    limit = 2 * row(both(tiny), "ptpc_fp8").kl
    found = compared(channel_up, ["fp8", "ptpc_fp8"], ["auto"], budget=str(limit), quantization_ignore=("*.0.mlp.down_proj",))
    assert found.chosen is not None
    assert found.chosen.kl <= limit
    assert found.chosen.variant.ignore == tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    write_config(tmp_path / "f.json", found, config(channel_up, quantization_ignore=("*.0.mlp.down_proj",)))
    llm = LLM(channel_up, device="cpu", threads=1, cpu_kv_cache_gib=0.05, quantization_config=str(tmp_path / "f.json"))
    assert llm.config.quantization_ignore == ("*.0.mlp.down_proj", *found.chosen.variant.ignore)


def made(variant: Variant, kl: float, change: float = 0.0) -> Measurement:
    return Measurement(variant, 10.0, change, 0.001, kl, kl, 1.0, 64, 100, 0, 2)


@cases(
    ("limit", "chosen"),
    [
        (0.9, Variant("fp8", "fp8_e4m3")),
        (0.75, Variant("ptpc_fp8", "fp8_e4m3")),
        (0.65, Variant("ptpc_fp8", "auto")),
        (0.5, Variant("ptpc_fp8", "auto", ("a",))),
        (0.36, Variant("ptpc_fp8", "auto", ("a", "b", "c"))),
        (0.2, Variant("bf16", "fp8_e4m3")),
        (0.05, Variant("bf16", "auto")),
    ],
)
def test_the_search_climbs_scheme_then_cache_then_layers_then_bf16(limit: float, chosen: Variant) -> None:
    ranked = [Sensitivity(name, (name,), 0.1, 10) for name in "abcd"]
    asked: list[Variant] = []

    def measured(v: Variant) -> Measurement:
        asked.append(v)
        weights = {"fp8": 0.7, "ptpc_fp8": 0.6, "bf16": 0.0}[v.scheme] - 0.1 * len(v.ignore)
        return made(v, weights + (0.1 if v.kv == "fp8_e4m3" else 0.0))

    budget = Budget(limit, relative=False)
    found = search(budget, measured, lambda scheme: ranked, ["fp8", "ptpc_fp8"], ["fp8_e4m3", "auto"])
    assert found is not None
    assert found.variant == chosen
    assert found.variant in asked  # nothing is promised that was not measured


def test_a_model_that_broke_meets_no_budget() -> None:
    broken = made(Variant("fp8", "fp8_e4m3"), math.nan, math.nan)
    assert not any(Budget.parse(text).met(broken) for text in ("50%", "10 nats"))
    good = made(Variant("ptpc_fp8", "fp8_e4m3"), 0.1)
    found = search(
        Budget(0.2, False), {m.variant: m for m in (broken, good)}.__getitem__, lambda s: [], ["fp8", "ptpc_fp8"], ["fp8_e4m3"]
    )
    assert found is good


@pytest.mark.parametrize("kvs", [["auto"], ["fp8_e4m3"], ["fp8_e4m3", "auto"]])
def test_the_search_without_a_scheme_looks_at_the_cache_alone(kvs: list[str]) -> None:
    found = search(Budget(0.2, False), lambda v: made(v, 0.1), lambda scheme: [], [], kvs)
    assert found is not None
    assert found.variant == Variant("bf16", kvs[0])


def test_the_search_admits_that_nothing_helps(tiny: Path) -> None:
    found = compared(tiny, ["fp8"], ["fp8_e5m2"], budget="0")
    assert found.chosen is None
    assert "Nothing measured is within it" in found.verdict
    assert Variant("bf16", "fp8_e5m2") in [m.variant for m in found.measured]


@pytest.mark.parametrize(("text", "limit", "relative"), [("0.3%", 0.003, True), ("0.002", 0.002, False), ("0", 0.0, False)])
def test_budgets(text: str, limit: float, relative: bool) -> None:
    assert Budget.parse(text) == Budget(pytest.approx(limit), relative)


@pytest.mark.parametrize("text", ["0.3", "1", "0.05", "5"])
def test_a_budget_that_lost_its_percent_sign_asks(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--auto", text]) == 1
    err = capsys.readouterr().err
    assert f"did you mean {text}%, a rise in perplexity? As a KL, where 0.002 is usual, it is written '{text} nats'" in err
    assert err.count("\n") == 1
    assert Budget.parse(f"{text} nats") == Budget(float(text), relative=False)


@cases("text", ["", "much", "-1", "nan", "inf", "%"])
def test_a_wrong_budget_is_a_sentence(text: str) -> None:
    with pytest.raises(OctavoError, match=r"is no budget; give a rise in perplexity such as 0.3%"):
        Budget.parse(text)


def test_calibrated_codes_are_measured_beside_plain_ones(tiny: Path, tmp_path: Path) -> None:
    """With activations in codes, and as they are; each as its checkpoint is served."""
    directory = tmp_path / "calibrated"
    windows = [IDS[at : at + WINDOW] for at in (0, WINDOW, 2 * WINDOW)]
    quantize_checkpoint(tiny, directory, QuantRules(FP8_PER_CHANNEL), windows=windows, threads=1, say=lambda line: None)
    kv = {"fp8_e4m3"}
    found = compare(config(tiny), IDS, ["ptpc_fp8", "fp8_block", "fp8_w8a16"], [*kv], window=WINDOW, calibrated=directory)
    kls = {(m.variant.scheme, bool(m.variant.calibrated)): m.kl for m in found.measured if not m.variant.ignore}
    assert kls.keys() == {
        ("ptpc_fp8", False), ("ptpc_fp8", True), ("fp8_block", False), ("fp8_w8a16", False), ("fp8_w8a16", True),
    }  # fmt: skip
    assert kls["fp8_w8a16", True] < kls["ptpc_fp8", True] < kls["ptpc_fp8", False]
    served = measure(config(directory), Variant("ptpc_fp8", "fp8_e4m3"), cut(IDS, WINDOW, None, WINDOW), reference_of(tiny))
    assert served.kl == pytest.approx(kls["ptpc_fp8", True], rel=1e-3)
    steps = [name_of(m.variant) for m in rungs(found.measured) if not m.variant.ignore]
    assert [step.partition(" with")[0] for step in steps] == [
        "ptpc_fp8", "ptpc_fp8, calibrated,", "fp8_w8a16", "fp8_w8a16, calibrated,",
    ]  # fmt: skip


def test_codes_that_no_text_made_are_not_called_calibrated(tiny: Path, tmp_path: Path) -> None:
    """Nor are those of a checkpoint that does not say how it was made."""
    for name, words in (("searched", dict(search=True)), ("other", {}), ("calibrated", dict(windows=[IDS[:WINDOW]]))):
        quantize_checkpoint(tiny, tmp_path / name, QuantRules(FP8_PER_CHANNEL), threads=1, say=lambda line: None, **words)
    (tmp_path / "other" / ORIGIN).unlink()
    found = both(tiny)
    for name, said in (("searched", "as stored"), ("other", "as stored"), ("calibrated", "calibrated")):
        m = made(Variant("ptpc_fp8", "fp8_e4m3", (), str(tmp_path / name)), 0.1)
        assert name_of(m.variant) == f"ptpc_fp8, {said}, with KV cache fp8_e4m3"
        assert loss_table.cells(found, m)[0] == f"ptpc_fp8, {said}"


def test_a_scheme_that_changes_nothing_is_no_flag(tiny: Path, tmp_path: Path) -> None:
    """Codes of a channel with activations as they are: one scheme rounds activations, others leave all as it is stored."""
    quantize_checkpoint(tiny, tmp_path / "codes", QuantRules(FP8_W8A16), threads=1, say=lambda line: None)
    found = compare(config(tmp_path / "codes"), IDS, ["fp8", "ptpc_fp8", "fp8_w8a16"], ["fp8_e4m3"], window=WINDOW)
    as_stored = {m.variant.scheme: m.weights_as_stored for m in found.measured}
    assert as_stored == {"fp8": True, "ptpc_fp8": False, "fp8_w8a16": True}
    assert any(note.startswith("--quantization fp8, fp8_w8a16 changes nothing") for note in found.notes)
    for m in found.measured:
        found.chosen = m
        assert ("--quantization" in loss_table.command(found)) is not m.weights_as_stored
        name = "the stored codes" if m.weights_as_stored else m.variant.scheme
        assert f" use {name} with KV cache fp8_e4m3" in verdict(Budget(9.0, relative=False), [m])[0]
    assert not any(m.weights_as_stored for m in both(tiny).measured)


@cases(
    "options",
    [
        dict(kv_cache_rounding="calibrated"),
        dict(calculate_kv_scales=True),
        dict(quantize_lm_head=True, quantization_ignore=("o_proj", "layers.1.*")),
        {},
    ],
    ids=str,
)
def test_the_line_serves_what_was_measured(options: dict[str, Any], tiny: Path) -> None:
    """Every flag that was given and that the chosen row has: an FP8 cache alone has scales and a rounding."""
    base, rows = config(tiny, **options), both(tiny)
    for kv in ("fp8_e4m3", "fp8_per_token_head", "auto"):
        for variant in (Variant("ptpc_fp8", kv), Variant("fp8", kv, ("down_proj",)), Variant("bf16", kv)):
            line = shlex.split(loss_table.command(replace(rows, engine=base, chosen=made(variant, 0.1))))
            found = engine_config(make_parser("serve", serve.add_arguments).parse_args(with_dashes(line[2:])))
            measured = variant.config(base)
            for name in ("model", "quantization", "kv_cache_rounding", "quantization_ignore", "quantize_lm_head"):
                assert getattr(found, name) == getattr(measured, name), (name, line)
            assert found.calculate_kv_scales == (measured.calculate_kv_scales and kv == "fp8_e4m3")


def reference_of(model: Path) -> Reference:
    text = cut(IDS, WINDOW, None, WINDOW)
    return Reference.of(open_core(config(model), REFERENCE, text), text)


def test_a_calibrated_checkpoint_that_is_none(tiny: Path, rows_up: Path, tmp_path: Path) -> None:
    for directory, sentence in ((rows_up, "is not quantized"), (MODEL_DIR, "is of another model")):
        with pytest.raises(OctavoError, match=sentence):
            compare(config(tiny), IDS, ["ptpc_fp8"], ["auto"], window=WINDOW, calibrated=directory)


def test_the_ladder_has_the_page_s_steps_in_its_order() -> None:
    """Between them those of the same bytes: calibrated, then activations as they are; the cache comes after both."""
    kvs, schemes = ("fp8_e4m3", "auto"), ("bf16", "fp8_w8a16", "fp8_block", "ptpc_fp8", "fp8")
    every = [Variant(scheme, kv, (), made) for scheme in schemes for kv in kvs for made in ("", "x")]
    steps = [m.variant for m in rungs(made(variant, 0.1) for variant in every)]
    page = [Variant("fp8", "fp8_e4m3"), PTPC, Variant("ptpc_fp8", "auto"), Variant("bf16", "fp8_e4m3")]
    assert [step for step in steps if step in page] == page
    assert steps[1:5] == [replace(PTPC, scheme=s, calibrated=c) for s in ("ptpc_fp8", "fp8_w8a16") for c in ("", "x")]
    assert steps[5:9] == [replace(step, kv="auto") for step in steps[1:5]]


def test_the_verdict_follows_the_ladder() -> None:
    budget = Budget.parse("0.5%")
    steps = [made(Variant("fp8", "fp8_e4m3"), 0.1, 0.02), made(Variant("ptpc_fp8", "fp8_e4m3"), 0.01, 0.004)]
    said, chosen = verdict(budget, steps)
    assert chosen is steps[1]
    assert said.startswith("Over the budget of 0.5% of perplexity: fp8 with KV cache fp8_e4m3 (+2.00%). Use ptpc_fp8")
    assert verdict(budget, steps[1:])[0].startswith("Accuracy held: use ptpc_fp8 with KV cache fp8_e4m3 (+0.40% of perplexity")
    assert verdict(budget, steps[:1])[1] is None


PTPC = Variant("ptpc_fp8", "fp8_e4m3")


@cases(
    ("change", "error", "doubt"),
    [
        (-0.0002, 0.0052, "(±0.52%) is wider than the budget"),  # what 1,022 predictions came to
        (0.002, 0.0030, "(±0.30%) is wider than the budget"),  # the bar is as wide to the left
        (0.004, 0.0011, "(±0.11%) reaches across the budget"),
        (0.006, 0.0011, "(±0.11%) reaches across the budget"),  # over it, and may be within
        (0.004, 0.0009, None),
        (0.02, 0.0060, None),  # over it, however wide
    ],
)
def test_a_verdict_says_when_the_text_is_too_short(change: float, error: float, doubt: str | None) -> None:
    budget, m = Budget.parse("0.5%"), replace(made(PTPC, 0.01, change), change_error=error)
    said, chosen = verdict(budget, [m], 1022)
    assert (chosen is m) == (change <= 0.005)
    assert budget.decided(m) == (doubt is None)
    assert (doubt or "too short") in said if doubt else "too short" not in said
    if doubt:  # so many tokens that the error, which falls with their root, is half of the budget, or of what it was
        more = int(said.split("--tokens ")[1].split()[0])
        assert error * math.sqrt(1022 / more) == pytest.approx((0.005 if "wider" in said else error) / 2, rel=0.05)


def test_a_verdict_on_kl_goes_by_its_own_error() -> None:
    m = replace(made(PTPC, 0.001, 0.1), kl_error=0.0012)
    assert "(±0.0012) is wider than the budget" in verdict(Budget(0.002, relative=False), [m], 100)[0]
    assert "too short" not in verdict(Budget(0.002, relative=False), [replace(m, kl_error=0.0009)], 100)[0]


def test_the_default_number_of_tokens_tells_half_a_percent() -> None:
    """By a sixteenth of them, whose error is four times as large."""
    args = make_parser("compare", add_arguments).parse_args([])
    ids = Tokenizer(str(MODEL_DIR)).encode(HELDOUT.read_text("utf-8"))
    found = compare(
        EngineConfig(cpu_kv_cache_gib=0.05), ids, ["ptpc_fp8"], ["fp8_e4m3"], window=args.window, tokens=args.tokens // 16
    )
    assert 2 * row(found, "ptpc_fp8", "fp8_e4m3").change_error / 4 < DEFAULT_BUDGET.limit


def test_few_layers_are_named_and_many_said_as_patterns() -> None:
    def layer(i: int, part: str, kl: float) -> Sensitivity:
        names = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}.get(part, (part,))
        return Sensitivity(
            f"model.layers.{i}.self_attn.{part}", tuple(f"model.layers.{i}.self_attn.{n}" for n in names), kl, 10
        )

    ranked = sorted(
        (layer(i, part, kl + i / 1000) for part, kl in (("qkv_proj", 0.1), ("o_proj", 0.3)) for i in range(30)),
        key=lambda one: -one.kl,
    )
    kept = worth_keeping(ranked)
    assert ignore_list(kept) == ("self_attn.o_proj",)
    assert (kept[0].layers, kept[0].extra_bytes, kept[0].kl) == (30, 300, pytest.approx(30 * 0.3 + 0.435))
    assert all(QuantRules(ignore=ignore_list(kept)).ignored(name) == ("o_proj" in name) for one in ranked for name in one.names)
    assert ignore_list(worth_keeping(ranked[:4])) == tuple(f"model.layers.{i}.self_attn.o_proj" for i in (29, 28))
    both_kinds = [layer(i, part, 0.1) for part in ("qkv_proj", "o_proj", "x") for i in range(30)]
    assert ignore_list(worth_keeping(both_kinds)) == tuple(f"self_attn.{n}_proj" for n in ("q", "k", "v", "o"))


@pytest.mark.parametrize("within", [False, True])
def test_it_ranks_the_layers_of_what_it_recommends(tiny: Path, monkeypatch: pytest.MonkeyPatch, within: bool) -> None:
    """Nothing is within the budget: of what lost least in the budget's unit, which is not what has the least KL."""
    changes = {"fp8": (0.02, 0.03), "ptpc_fp8": (0.03, 0.017), "fp8_block": (0.01, 0.04)}  # KL, perplexity
    asked: list[str] = []

    def measured(base: EngineConfig, variant: Variant, *_: object) -> Measurement:
        kl, change = changes[variant.scheme]
        m = made(variant, kl, change / (4 if variant.ignore and within else 1))
        return replace(m, kv_bytes_per_token=2 if variant.kv == "auto" else 1)

    def ranked(base: EngineConfig, scheme: str, *_: object) -> list[Sensitivity]:
        asked.append(scheme)
        return [Sensitivity("model.layers.1.mlp.down_proj", ("model.layers.1.mlp.down_proj",), 0.1, 10)]

    monkeypatch.setattr("octavo.tools.compare.measure.measure", measured)
    monkeypatch.setattr("octavo.tools.compare.layer_errors.sensitivities", ranked)
    found = compared(tiny, list(changes), ["fp8_e5m2", "auto"])
    assert asked == ["ptpc_fp8"]
    kept = Variant("ptpc_fp8", "auto", ("model.layers.1.mlp.down_proj",))
    assert found.measured[-1].variant == kept
    assert (found.chosen and found.chosen.variant) == (kept if within else None)


def strict(text: str) -> dict[str, Any]:
    """JSON as others read it: Python's reader alone takes NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_holds_neither_nan_nor_infinity(
    value: float, demo_line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    down = "model.layers.0.mlp.down_proj"
    broken = replace(made(Variant("fp8", "fp8_e4m3"), value, value), perplexity=value, change_error=value, kl_error=value)
    monkeypatch.setattr("octavo.tools.compare.measure.measure", lambda *_: broken)
    monkeypatch.setattr("octavo.tools.compare.layer_errors.sensitivities", lambda *_: [Sensitivity(down, (down,), value, 1)])
    assert main([*demo_line, "--scheme", "fp8", "--kv", "fp8", "--json", "--output", str(tmp_path / "r.html")]) == 0
    assert Parsed((tmp_path / "r.html").read_text("utf-8")).plots == ["bars", "memory", "layers", "kl"]
    out = capsys.readouterr().out
    found = strict(out)
    assert found["measured"][0]["kl"] is None
    assert found["measured"][0]["perplexity"] is None
    assert found["reference"]["perplexity"] > 1


@cases(
    ("text", "sentence"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"quantisation": "fp8"}', "the key 'quantisation' is not known; did you mean 'quantization'"),
        ('{"quantization_ignore": "down_proj"}', 'quantization_ignore must be a list of strings, not "down_proj"'),
        ('{"quantization_ignore": [1]}', "quantization_ignore must be a list of strings"),
        ('{"quantize_lm_head": 1}', "quantize_lm_head must be true or false, not 1"),
        ('{"quantization": "fp9"}', "--quantization 'fp9' is not known"),
        ('{"kv_cache_dtype": "int4"}', "--kv-cache-dtype 'int4' is not known"),
        ('{"quantization": "fp8"}', '--quantization ptpc_fp8 contradicts .*, which says "fp8"; give one of them'),
    ],
)
def test_a_wrong_quantization_config_is_a_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OctavoError, match=sentence):
        EngineConfig(quantization="ptpc_fp8" if "contradicts" in sentence else None, quantization_config=str(path))


def test_flags_beside_a_quantization_config(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"quantization": "ptpc_fp8", "kv_cache_dtype": "fp8_e4m3", "quantization_ignore": ["a"], "measured": {}}')
    found = EngineConfig(quantization_config=str(path), quantization="fp8_per_channel", kv_cache_dtype="fp8", seed=3)
    assert (found.quantization, found.kv_cache_dtype, found.quantization_ignore) == ("ptpc_fp8", "fp8_e4m3", ("a",))
    more = EngineConfig(quantization_config=str(path), quantization_ignore="b")
    assert more.quantization_ignore == ("b", "a")
    assert replace(more, seed=4).quantization_ignore == ("b", "a")  # reading it twice adds nothing


# --- the report and the command line ----------------------------------------------------


class Parsed(HTMLParser):
    """Rows of each table by its id, plots by their figure's id, and every address that the page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, int] = {}
        self.plots: list[str] = []
        self.fetched: list[str] = []
        self.last = self.figure = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = dict(attrs)
        if tag == "table":
            self.last = a["id"] or ""
            self.tables[self.last] = 0
        self.tables[self.last] = self.tables.get(self.last, 0) + (tag == "tr")
        if tag == "figure":
            self.figure = a["id"] or ""
        if tag == "svg":
            self.plots.append(self.figure)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "data") and tag != "use"]


@pytest.fixture
def demo_line() -> list[str]:
    return [
        "compare",
        "--tokens",
        "32",
        "--window",
        "32",
        "--max-model-len",
        "40",
        "--threads",
        "1",
        "--cpu-kv-cache-gib",
        "0.05",
    ]


def test_the_report_and_the_terminal(demo_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.html"
    assert main([*demo_line, "--scheme", "fp8", "ptpc_fp8", "--kv", "fp8", "--output", str(path)]) == 0
    out, err = capsys.readouterr()
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith(("--quant", "  octavo", "Report", "/")))
    assert "perplexity" in out
    assert "The layers that" in out
    assert "octavo serve" in out
    lines = [line for line in err.splitlines() if line.startswith("octavo: ") and "measuring" not in line]
    told = [line.split(":")[1:3] for line in lines]
    assert [where.strip() for where, _ in told] == ["BF16", "1 of 3", "2 of 3", "3 of 3"]
    assert [name.strip() for _, name in told[1:3]] == [f"{scheme} with KV cache fp8_e4m3" for scheme in ("fp8", "ptpc_fp8")]
    assert all("of perplexity, KL 0.0" in line for line in lines[1:])
    assert err.index("measuring BF16") < err.index("measuring 1 of 3")
    text = path.read_text("utf-8")
    page = Parsed(text)
    assert page.plots == ["bars", "memory", "layers", "kl"]
    figures = dict(zip(page.plots, text.split("<figure ")[1:], strict=True))
    for name in ("bars", "memory"):
        assert ">chosen" in figures[name]
        assert "budget: 0.5% of perplexity" in figures[name]
        assert figures[name].count('id="LineCollection_') >= 2  # error bars
    assert all(f">{layer}.mlp.down_proj</text>" in figures["kl"] for layer in range(6))
    assert f"on {EXACT.name}, {time.strftime('%Y-%m-%d')}" in text
    assert "<pre>octavo " in text
    assert page.tables["measurements"] == 1 + 1 + 2 + 1  # head, BF16, two schemes, and the proposed list
    assert page.tables["errors"] == 1 + 24
    assert page.tables["worst"] == 1 + 6
    assert [address for address in page.fetched if not address.startswith("#")] == []
    assert list(tmp_path.iterdir()) == [path]


def test_json_and_the_file_of_auto(demo_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q.json"
    assert main([*demo_line, "--scheme", "fp8", "--kv", "fp8", "--auto", "20%", "--save", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["kv"] == "fp8_e4m3"
    assert found["reference"]["kl"] == 0
    assert 0 < found["measured"][0]["kl"] < 0.1
    assert EngineConfig(quantization_config=str(path)).kv_cache_dtype == "fp8_e4m3"


@cases(
    ("more", "sentence"),
    [
        ("--text nowhere.txt", "--text nowhere.txt cannot be read"),
        ("--text BINARY", "is not UTF-8 text"),
        ("--scheme fp88", "--scheme 'fp88' is not known; did you mean 'fp8'"),
        ("--kv int8", "--kv 'int8' is not known"),
        ("--auto lots", "--auto 'lots' is no budget"),
        ("--save x.json", "--save names the file that --auto writes"),
        ("--output no/such/dir/r.html", "cannot be written: there is no writable directory no/such/dir"),
        ("--output .", ". is a directory"),
        ("--scheme bf16 --kv auto", "bf16 with a BF16 KV cache is what everything is compared with"),
        ("--window 1", "--window must be at least 2, not 1"),
        ("--tokens -5", "--tokens must be at least 0, not -5"),
    ],
)
def test_wrong_input_is_a_sentence(more: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert main(["compare", *more.replace("BINARY", str(tmp_path / "binary")).split()]) == 1
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_without_matplotlib_the_report_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(html_report.importlib.util, "find_spec", lambda name: None)
    assert main(["compare", "--output", str(tmp_path / "r.html")]) == 1
    assert "--output needs matplotlib for its plots, which is not installed" in capsys.readouterr().err


def test_matplotlib_is_for_the_report_alone() -> None:
    import subprocess

    code = "import sys, octavo.tools.compare.html_report, octavo.tools.compare.layer_errors; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    write = Path.write_text

    def full_disk(self: Path, text: str, encoding: str) -> int:
        write(self, text[:2], encoding)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OctavoError, match="cannot be written: No space left on device"):
        write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text() == "old"
