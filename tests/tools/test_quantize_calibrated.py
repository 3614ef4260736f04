"""`octavo quantize --calibrate`: the scales and the form of plain rounding, other codes, less error, stopped or not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import LoadModel, relative_error
from models.test_mla_checkpoints import wide
from models.test_moe_quantized import in_bytes, tiny
from tools.test_quantize import assert_sentence, files_of, llama, run, schemes, small_disk, tensors_of  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

from octavo.cli import main
from octavo.convert import calibration
from octavo.convert.calibrated_layer import CalibratedLayer
from octavo.convert.key_rounding import read_key_rounding
from octavo.convert.output_directory import STASH
from octavo.convert.save_quantized import save_quantized
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.engine.calibration_text import DEFAULT, calibration_windows
from octavo.errors import OctavoError
from octavo.files import KEY_ROUNDING
from octavo.models.overrides import overridden
from octavo.platform import detect
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, QuantRules, Scheme
from octavo.quant.scheme import FP8_W8A16
from octavo.text.tokenizer import Tokenizer
from octavo.tools.quantize.quantize import quantize_checkpoint

ODD = dict(hidden_size=156, intermediate_size=300, head_dim=38)
WRITTEN = {".safetensors", ".partial", Path(KEY_ROUNDING).suffix}
LINEAR = re.compile(r"(_proj|\.w[123])\.weight$")


def windows(count: int = 12, vocab: int = 60) -> list[list[int]]:
    """Few words, so that inputs are correlated; a shorter window last."""
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (64 - 20 * (i == count - 1),), generator=g).tolist() for i in range(count)]


def calibrated(model: Path, out: Path, scheme: Scheme = FP8_PER_CHANNEL, **options: Any) -> list[str]:
    return run(model, out, scheme, windows=options.pop("windows", windows()), threads=1, **options)


def scale_names(layers: int) -> set[str]:
    """Of an FP8 cache."""
    return {f"model.layers.{layer}.self_attn.{name}" for layer in range(layers) for name in ("k_scale", "v_scale")}


def losses(said: list[str]) -> list[list[float]]:
    """Of each layer, in percent: plain and calibrated."""
    found = [re.findall(r"([\d.]+)%", line) for line in said if line.startswith("layer ")]
    return [[float(value) for value in pair] for pair in found]


@schemes
@cases("changes", [ODD, {}])
def test_less_error_in_the_form_of_plain_rounding(
    scheme: Scheme, changes: dict[str, Any], tmp_path: Path, load_model: LoadModel
) -> None:
    """Scales are others than --scale-search finds, which knows no inputs."""
    model = llama(tmp_path / "model", num_hidden_layers=2, **changes)
    run(model, tmp_path / "plain", scheme, search=True)
    said = calibrated(model, tmp_path / "out", scheme)
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() - scale_names(2) < after.keys()
    for name, plain in before.items():
        same = in_bytes(plain) == in_bytes(after[name])
        assert name.endswith("_scale") or same is not bool(LINEAR.search(name)), name
        assert (plain.dtype, plain.shape) == (after[name].dtype, after[name].shape)
    assert (tmp_path / "plain/config.json").read_text() == (tmp_path / "out/config.json").read_text()
    assert len(losses(said)) == 2
    assert all(one < 0.9 * plain for plain, one in losses(said))
    errors = {}
    for name in ("plain", "out"):
        layers = [load_model(path).logits(windows()[0]) for path in (tmp_path / name, model)]
        errors[name] = relative_error(*layers)
    assert errors["out"] < errors["plain"]


def test_losses_are_of_the_inputs_that_transformers_has(tmp_path: Path) -> None:
    """||x W^T|| of the first layer, whose inputs no rounding has changed but the activations' own."""
    model = llama(tmp_path / "model", num_hidden_layers=1)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found: dict[str, float] = {}

    def see(name: str, module: torch.nn.Linear, args: tuple[torch.Tensor]) -> None:
        found[name] = found.get(name, 0.0) + float((args[0] @ module.weight.T).square().sum())

    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda module, args, name=name: see(name, module, args))
    with torch.no_grad():
        for window in windows():
            theirs(torch.tensor([window]))
    seen: list[calibration.LayerLosses] = []
    with pytest.MonkeyPatch.context() as patch:
        put = calibration.Stash.put
        patch.setattr(calibration.Stash, "put", lambda *args: (seen.append(args[2].losses), put(*args)))
        calibrated(model, tmp_path / "out")
    stacks = {"self_attn.q_proj": ("q", "k", "v"), "self_attn.o_proj": ("o",), "mlp.gate_proj": ("gate", "up"),
              "mlp.down_proj": ("down",)}  # fmt: skip
    assert seen[0].keys() == {f"model.layers.0.{name}" for name in stacks}
    for name, parts in stacks.items():
        at = f"model.layers.0.{name.partition('.')[0]}"
        assert seen[0][f"model.layers.0.{name}"].size == pytest.approx(sum(found[f"{at}.{p}_proj"] for p in parts), rel=0.05)


@cases("family", ["qwen3_moe", "minimax_m2", "glm4_moe", "deepseek_v32"])
def test_experts(family: str, tmp_path: Path) -> None:
    """Each by its own tokens, those that few reach too; a router stays as it is. Latent attention and its indexer, too."""
    model = wide(tmp_path / "model") if family == "deepseek_v32" else tiny(tmp_path / "model", family)
    model.bfloat16().save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "plain", search=True)
    said = calibrated(tmp_path / "model", tmp_path / "out", windows=windows(4))
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    layers = 0 if family == "deepseek_v32" else json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"]
    assert after.keys() - before.keys() == scale_names(layers)
    assert before.keys() <= after.keys()
    assert ("no KV scales written: MLA's FP8 cache takes the scales of each token as it is written" in said) == (not layers)
    changed = {name for name, w in before.items() if in_bytes(w) != in_bytes(after[name])}
    rounded = {name for name, w in before.items() if w.dtype is torch.float8_e4m3fn}
    assert {name for name in changed if not name.endswith("_scale")} == rounded
    assert sum(".experts." in name for name in changed) > 10
    assert all(one < plain for plain, one in losses(said))


class Stopped(Exception):
    pass


@cases("family", ["llama", "qwen3_moe"])
@cases("at", ["layer 1", "layer 2", "mean"])
def test_a_stopped_run_is_continued(family: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    if family == "llama":
        llama(model, num_hidden_layers=2)
    else:
        tiny(model, family, num_hidden_layers=2).bfloat16().save_pretrained(model)
    expected = calibrated(model, tmp_path / "whole", windows=windows(3))

    def stop(line: str) -> None:
        if line.startswith(at):
            raise Stopped

    out, made = tmp_path / "out", []
    rules = QuantRules(FP8_PER_CHANNEL)
    with pytest.raises(Stopped):
        quantize_checkpoint(model, out, rules, windows=windows(3), threads=1, say=stop)
    assert (out / STASH).is_dir()
    assert not (out / "config.json").exists()
    for other in ({}, {"windows": windows(4)}):
        with pytest.raises(OctavoError) as raised:
            run(model, out, **other)
        assert_sentence(raised.value, "unfinished work of another command", "'calibration'")
    init = CalibratedLayer.__init__
    monkeypatch.setattr(CalibratedLayer, "__init__", lambda self, *args: (made.append(args[2]), init(self, *args))[1])
    said = calibrated(model, out, windows=windows(3))
    assert made == ([1] if at == "layer 1" else [])
    assert files_of(out) == files_of(tmp_path / "whole")
    assert [line.replace(str(out), "") for line in said] == [line.replace(str(tmp_path / "whole"), "") for line in expected]
    with pytest.raises(OctavoError) as raised:
        run(model, out)
    assert_sentence(raised.value, "other settings", "'calibration'")


@cases(("layers", "count"), [(1, 4), (2, 100), (3, 100), (3, 4)])
def test_room_is_asked_for_what_is_written_beside_the_files(layers: int, count: int, tmp_path: Path) -> None:
    """About as much as was there at a time, of a short text and of a long one."""
    model = llama(tmp_path / "model", num_hidden_layers=layers, hidden_size=256, intermediate_size=512)
    out, held, rename = tmp_path / "out", [0], Path.replace

    def note(self: Path, to: Path) -> Path:
        held.append(sum(path.stat().st_size for path in out.rglob("*") if path.suffix in WRITTEN))
        return rename(self, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", note)
        calibrated(model, out, windows=windows(count))
    usage = shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(0.9 * max(held))))
        with pytest.raises(OctavoError) as raised:
            calibrated(model, tmp_path / "other", windows=windows(count))
    found = re.search(r"needs ([\d,]+) bytes and its disk has [\d,]+ free", str(raised.value))
    assert found is not None
    assert 0.99 < int(found[1].replace(",", "")) / max(held) < 1.1
    assert not (tmp_path / "other").exists()


def test_what_a_stopped_calibration_left_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = llama(tmp_path / "model", num_hidden_layers=2), tmp_path / "out"

    def stop(line: str) -> None:
        if line.startswith("layer 2"):
            raise Stopped

    with pytest.raises(Stopped):
        quantize_checkpoint(model, out, QuantRules(FP8_PER_CHANNEL), windows=windows(3), threads=1, say=stop)
    held, usage = sum(path.stat().st_size for path in (out / STASH).iterdir()), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(OctavoError, match=f"its disk has {held:,} free"):
        calibrated(model, out, windows=windows(3))


def test_a_disk_that_fills_up_while_layers_are_calibrated(
    tmp_path: Path,
    small_disk: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = llama(tmp_path / "model", num_hidden_layers=2), small_disk / "out"
    with pytest.raises(OctavoError) as raised:
        calibrated(model, out, windows=windows(100))  # what the second layer reads takes 1.6 MB
    assert_sentence(raised.value, "needs 1,", "its disk has 1,048,576 free")
    assert not out.exists()
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1 << 40))  # it fills up as we write
    with pytest.raises(OctavoError) as raised:
        calibrated(model, out, windows=windows(100))
    assert_sentence(raised.value, "the disk is full", "state-0001.safetensors needs 1,6", "continues")
    monkeypatch.undo()
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    calibrated(model, out, windows=windows(100))
    calibrated(model, tmp_path / "whole", windows=windows(100))
    assert files_of(out) == files_of(tmp_path / "whole")


def test_what_is_stored_in_codes_and_what_no_text_reads_stay_plain(tmp_path: Path) -> None:
    """What is told counts the others."""
    model = llama(tmp_path / "model", num_hidden_layers=1)
    run(model, tmp_path / "codes", FP8_BLOCK, ignore=["down_proj"])
    run(tmp_path / "codes", tmp_path / "plain", FP8_BLOCK, quantize_lm_head=True)
    said = calibrated(tmp_path / "codes", tmp_path / "out", FP8_BLOCK, quantize_lm_head=True)
    assert "1 matrices are rounded plainly, as no text reads them: lm_head" in said
    assert f"1 of 8 matrices calibrated by {sum(map(len, windows())):,} tokens" in said
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    changed = [name for name in before if in_bytes(before[name]) != in_bytes(after[name])]
    assert {name.partition("mlp.")[2].partition(".")[0] for name in changed} == {"down_proj"}
    rules, config = QuantRules(FP8_BLOCK), json.loads((tmp_path / "codes/config.json").read_text())
    told = save_quantized(
        tmp_path / "codes", config, tmp_path / "saved", rules, detect("cpu"), 1, windows=windows()
    )  # fmt: skip
    assert "saved, 1 of 7 matrices calibrated by" in told


def test_the_model_is_calibrated_as_it_will_be_served(tmp_path: Path) -> None:
    """With --hf-overrides codes are those of a config.json that says so; the output's is the model's, for the next start."""
    model = llama(tmp_path / "model", num_hidden_layers=2)
    other = llama(tmp_path / "other", num_hidden_layers=2)
    theta = {"rope_theta": 20.0}
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(overridden(config, theta)))
    calibrated(other, tmp_path / "expected")
    calibrated(model, tmp_path / "plain")
    calibrated(model, tmp_path / "found", overrides=theta)
    told = "quantized weights saved in"
    assert save_quantized(
        model, config, tmp_path / "saved", QuantRules(FP8_PER_CHANNEL), detect("cpu"), 1, None, windows(), theta
    ).startswith(told)
    expected = in_bytes_of(tmp_path / "expected")
    assert in_bytes_of(tmp_path / "plain") != expected
    for name in ("found", "saved"):
        assert in_bytes_of(tmp_path / name) == expected
        assert (tmp_path / name / "config.json").read_text() == (tmp_path / "plain/config.json").read_text()
        with pytest.raises(OctavoError) as raised:
            calibrated(model, tmp_path / name, overrides={"rope_theta": 30.0})
        assert_sentence(raised.value, "other settings", "'hf_overrides'" if name == "found" else "differs")
    with pytest.raises(OctavoError, match="--hf-overrides: nothing changes nothing"):
        calibrated(model, tmp_path / "wrong", overrides={"nothing": 1})
    assert not (tmp_path / "wrong").exists()


def in_bytes_of(directory: Path) -> dict[str, Any]:
    return {name: in_bytes(tensor) for name, tensor in tensors_of(directory).items()}


@cases("asked", [FP8_PER_CHANNEL, FP8_W8A16])
@cases("have", [FP8_PER_CHANNEL, FP8_W8A16])
def test_codes_that_are_kept_are_not_calibrated(have: Scheme, asked: Scheme, tmp_path: Path) -> None:
    """What was stored has its own name, and one that differs in activations alone is told so."""
    model, codes, out = tmp_path / "model", tmp_path / "codes", tmp_path / "out"
    run(llama(model, num_hidden_layers=1), codes, have)
    flags: dict[str, dict[str, Any]] = {"--calibrate": dict(windows=windows()), "--scale-search mse": dict(search=True)}
    for flag, options in flags.items():
        for head in (False, True):
            if head and flag != "--calibrate":
                continue
            with pytest.raises(OctavoError) as raised:
                run(codes, out, asked, quantize_lm_head=head, **options)
            assert_sentence(raised.value, f"{flag}: {codes} has FP8 codes already ({have.name})", "BF16 checkpoint")
    config = json.loads((codes / "config.json").read_text())
    with pytest.raises(OctavoError) as raised:
        save_quantized(codes, config, out, QuantRules(asked), detect("cpu"), 1, windows=windows())
    assert_sentence(raised.value, f"--calibrate: {codes} has FP8 codes already ({have.name})")
    assert not out.exists()
    told = next(line for line in run(codes, out, asked) if "bit for bit" in line)
    assert told.startswith(f"7 matrices are stored in {have.name} already; their codes are kept bit for bit")
    assert told.endswith(f"(input_activations in config.json) becomes {asked.name}'s") is (have is not asked)


# --- the command ------------------------------------------------------------------------


def test_the_command_on_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], load_model: LoadModel) -> None:
    """Nearer to BF16 than plain rounding, on a text that it was not calibrated by."""
    out = tmp_path / "out"
    words = ["quantize", str(MODEL_DIR), "-o", str(out), "--calibrate", "--calibration-tokens", "4096", "--device", "cpu"]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(losses(said)) == 6
    assert re.fullmatch(r"mean output error .* [\d.]+% rounded plainly, [\d.]+% calibrated", said[-4])
    assert said[-3] == "42 of 42 matrices calibrated by 4,096 tokens"
    assert said[-2].startswith("KV scales of each layer, which --kv-cache-dtype fp8 uses: keys 0.")
    text = HELDOUT.read_text("utf-8")
    lines = {line for line in text.splitlines() if len(line) > 60}
    assert not lines & set(DEFAULT.read_text("utf-8").splitlines())
    ids = Tokenizer(MODEL_DIR).encode(text)[1000:1150]
    exact = load_model(MODEL_DIR).logits(ids).log_softmax(-1)
    kl = [
        float((exact.exp() * (exact - load_model(*given).logits(ids).log_softmax(-1))).sum(-1).mean())
        for given in ((out,), (MODEL_DIR, FP8_PER_CHANNEL))
    ]
    assert kl[0] < kl[1]
    assert [tuple(influence.shape) for influence, _ in read_key_rounding(out, range(6))] == [(2, 64, 64)] * 6


FAULTS = {
    "tokens alone": (["--calibration-tokens", "4096"], ("--calibration-tokens", "--calibrate")),
    "overrides alone": (["--hf-overrides.rope_theta", "9"], ("--hf-overrides is for --calibrate",)),
    "few tokens": (["--calibrate", "--calibration-tokens", "100"], ("--calibration-tokens 100", "512")),
    "no file": (["--calibrate", "nothing.txt"], ("nothing.txt cannot be read",)),
    "the model in its place": (["--calibrate", str(MODEL_DIR)], ("is a directory", "stands before --calibrate")),
    "no text": (["--calibrate", str(MODEL_DIR / "model.safetensors")], ("is not UTF-8 text",)),
    "short": (["--calibrate", str(MODEL_DIR / "generation_config.json")], ("fewer than one window of 512",)),
}


@cases("fault", FAULTS)
def test_faults_are_said(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, parts = FAULTS[fault]
    assert main(["quantize", str(MODEL_DIR), "-o", str(tmp_path / "out"), *words]) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert all(part in error for part in parts), error
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_short_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C, too, and what the command does then."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(HELDOUT.read_text("utf-8")[:4000])
    found = sum(map(len, calibration_windows(MODEL_DIR, str(text), 1 << 20)))

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    words = ["quantize", str(MODEL_DIR), "-o", str(out), "--calibrate", str(text), "--device", "cpu"]
    for tokens in ("2000", None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "CalibratedLayer", lambda *args: stop(args[2]))
            assert main([*words, *(["--calibration-tokens", str(found + 1)] if tokens else [])]) == 130
        told = capsys.readouterr()
        asked = "" if tokens else f"note: the text has {found:,} tokens in whole windows of 512, fewer than 32,768"
        assert [line for line in told.out.splitlines() if line.startswith("note: the text")] == [asked] * bool(asked)
        assert told.err == f"octavo: stopped; nothing is left in {out}\n"
        assert not out.exists()
    layer = CalibratedLayer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibratedLayer, "__init__", lambda self, *args: stop(1) if args[2] else layer(self, *args))
        assert main(words) == 130
    assert capsys.readouterr().err == "octavo: stopped; the same command continues\n"


def test_an_architecture_that_is_not_served(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    path = model / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"novel"'))
    with pytest.raises(OctavoError) as raised:
        calibrated(model, tmp_path / "out")
    assert_sentence(raised.value, "'novel'")
    assert not (tmp_path / "out").exists()


def test_windows_are_from_all_over_the_text() -> None:
    found = calibration_windows(MODEL_DIR, str(HELDOUT), 2048)
    every = calibration_windows(MODEL_DIR, str(HELDOUT), 1 << 20)
    assert [len(window) for window in found] == [512] * 4
    assert [every.index(window) for window in found] == [i * len(every) // 4 for i in range(4)]
