"""--save-quantized: one start writes the codes, later ones read the same; and what a start says of loading."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from octavo import LLM, SamplingParams
from octavo.cli import main
from octavo.config import EngineConfig
from octavo.convert import save_quantized
from octavo.convert.output_file import OutputFile
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.distributed import TensorParallel
from octavo.engine import loading
from octavo.engine.calibration_text import calibration_windows
from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant import SCHEMES, QuantRules, dequantize, quantize
from octavo.tools.quantize.quantize import quantize_checkpoint
from octavo.weights import SafetensorsSource
from octavo.weights.meta import MetaSource

SCHEME_NAMES = ["fp8", "ptpc_fp8", "fp8_block"]
PROMPTS = ["def read(self", "import os\n\n\ndef "]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


def start(model: Path, scheme: str | None = "ptpc_fp8", out: Path | None = None, device: str = "cpu", **options: Any) -> LLM:
    options |= {} if out is None else {"save_quantized": str(out)}
    return LLM(model, quantization=scheme, device=device, threads=1, max_num_seqs=4, cpu_kv_cache_gib=0.1, **options)


def said(llm: LLM, text: str) -> bool:
    return any(text in line for line in llm.info.report)


def logprobs(llm: LLM) -> list[Any]:
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=2, ignore_eos=True)
    return [one.outputs[0].logprobs for one in llm.generate(PROMPTS, params, use_tqdm=False)]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo model in three files."""
    path = tmp_path / "model"
    shutil.copytree(MODEL_DIR, path)
    tensors = tensors_of(path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    parts = {f"model-{i}.safetensors": {name: tensors[name] for name in sorted(tensors)[i::3]} for i in range(3)}
    for file_name, part in parts.items():
        save_file(part, path / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, part in parts.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def no_writing(patch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("nothing is to be written")

    patch.setattr(save_quantized, "write_files", fail)


@devices
@cases("scheme", SCHEME_NAMES)
def test_later_starts_read_what_the_first_wrote(
    scheme: str, device: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "saved"
    expected = logprobs(start(model, scheme, device=device))
    first = start(model, scheme, out, device=device)
    assert said(first, f"quantized weights saved in {out}")
    before, after = tensors_of(model), tensors_of(out)
    scales = [name for name in after if name.endswith("_proj.weight_scale")]
    assert len(scales) == sum(name.endswith("_proj.weight") for name in before) > 0
    for name in scales:
        online = quantize(before[name.removesuffix("_scale")], SCHEMES[scheme])
        assert online.scale is not None
        assert torch.equal(after[name.removesuffix("_scale")].view(torch.uint8), online.data.view(torch.uint8))
        assert torch.equal(after[name].flatten(), (online.scale[:1] if scheme == "fp8" else online.scale).flatten())
    no_writing(monkeypatch)
    again = start(model, scheme, out, device=device)
    assert said(again, f"weights taken from {out}")
    alone = start(out, None, device=device)  # its tokenizer came along
    for llm in (first, again, alone):
        assert logprobs(llm) == expected
        assert llm.info.report[1:4] == first.info.report[1:4]


def test_the_first_start_calibrates(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As octavo quantize does; later starts read it, with the flag or without, and one that asks for other codes is refused."""
    text = tmp_path / "text.txt"
    text.write_text(HELDOUT.read_text("utf-8")[:40_000])
    monkeypatch.setattr(loading, "TOKENS", 1024)
    out = tmp_path / "saved"
    first = start(model, out=out, calibrate=str(text))
    assert said(first, f"quantized weights saved in {out}, 42 of 42 matrices calibrated by 1,024 tokens")
    quantize_checkpoint(
        model, tmp_path / "tool", QuantRules(SCHEMES["ptpc_fp8"]), threads=1, say=lambda line: None,
        windows=calibration_windows(model, str(text), 1024),
    )  # fmt: skip
    found, expected = tensors_of(out), tensors_of(tmp_path / "tool")
    assert found.keys() == expected.keys()
    assert all(torch.equal(t.view(torch.uint8), expected[name].view(torch.uint8)) for name, t in found.items())
    no_writing(monkeypatch)
    again = start(model, out=out, calibrate=str(text))
    assert said(again, f"weights taken from {out}")
    assert logprobs(again) == logprobs(first) == logprobs(start(out, None))
    with pytest.raises(OctavoError, match=r"calibration"):
        start(model, out=out)
    with pytest.raises(OctavoError, match=r"'hf_overrides' differs"):
        start(model, out=out, calibrate=str(text), hf_overrides={"rope_theta": 9.0})


def test_a_tied_head_stays_bf16_where_it_is_saved(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model's: each start quantizes it anew, and the directory is the one that is written without the flag."""
    out = tmp_path / "saved"
    expected = logprobs(start(model, quantize_lm_head=True))
    first = start(model, out=out, quantize_lm_head=True)
    assert said(first, "the embeddings, which are the head too, stay BF16 there and are quantized at each start")
    embedding = "model.embed_tokens.weight"
    assert torch.equal(tensors_of(out)[embedding], tensors_of(model)[embedding])
    no_writing(monkeypatch)
    again = start(model, out=out, quantize_lm_head=True)
    alone = start(out, None, quantize_lm_head=True)  # in the scheme that the checkpoint has
    for llm in (first, again, alone):
        assert said(llm, "embedding  ptpc_fp8        1.05 M      1.0 MiB")
        assert said(llm, "weights: 5.6 MiB stored, 50.7% of BF16's 11.0 MiB")
        assert not said(llm, "lm_head ")
        assert logprobs(llm) == expected
    config = EngineConfig(model=str(out), quantize_lm_head=True)  # an image's kernels are those of the same scheme
    announced = MetaSource(SafetensorsSource(out).checkpoint.tensors)
    on = Platform(torch.device("cpu"), "reference")
    rehearsed = loading.make_loader(announced, loading.rules_of(config), config, on, torch.bfloat16, TensorParallel())
    assert rehearsed.rules.scheme_for(["lm_head"], is_head=True) is SCHEMES["ptpc_fp8"]
    plain = start(model, out=out)
    assert said(plain, f"weights taken from {out}")
    assert logprobs(plain) != expected


@pytest.mark.parametrize("options", [dict(), dict(scheme="bf16"), dict(load_format="dummy")], ids=str)
def test_a_quantized_head_needs_a_scheme(options: dict[str, Any], model: Path) -> None:
    options = dict(scheme=None) | options
    with pytest.raises(
        OctavoError, match=r"^quantize_lm_head=True needs a scheme, and the checkpoint has none of its own; add .*\.$"
    ):
        start(model, quantize_lm_head=True, **options)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_transformers_reads_it(scheme: str, model: Path, tmp_path: Path) -> None:
    start(model, scheme, tmp_path / "saved")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", quantization_config=CompressedTensorsConfig(dequantize=True), output_loading_info=True,
        dtype=torch.float32,
    )  # fmt: skip
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, w in tensors_of(model).items():
        expected = dequantize(quantize(w, SCHEMES[scheme])) if name.endswith("_proj.weight") else w
        assert torch.equal(theirs.get_parameter(name), expected.float()), name


@pytest.mark.parametrize("files", [0, 1, 2, 3])
def test_a_broken_off_save_is_not_taken_for_whole(
    files: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, commit, done = tmp_path / "saved", OutputFile.commit, []

    def stop(file: OutputFile) -> None:
        if len(done) == files:
            raise KeyboardInterrupt
        commit(file)
        done.append(file)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "commit", stop)
        patch.setattr(save_quantized.OutputDirectory, "_sync", stop)  # all weights, and no config.json yet
        with pytest.raises(KeyboardInterrupt):
            start(model, out=out)
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.partial"))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(times) == files
    llm = start(model, out=out)
    assert said(llm, "quantized weights saved")
    assert all((out / name).stat().st_mtime_ns == ns for name, ns in times.items())  # continued, not begun anew
    assert logprobs(llm) == logprobs(start(model))


def test_a_disk_that_takes_no_file_gets_one_sentence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have bytes left and no inodes."""
    opened = os.open

    def full(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".safetensors.partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OctavoError, match=r"^the disk is full: .*model.*\.safetensors needs [\d,]+ bytes"):
        start(model, out=tmp_path / "saved")


def other_weights(model: Path, out: Path) -> None:
    file = sorted(model.glob("*.safetensors"))[0]
    save_file({name: -t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})


def no_origin(model: Path, out: Path) -> None:
    shutil.rmtree(out)
    shutil.copytree(MODEL_DIR, out)


def a_file(model: Path, out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("mine")


def notes(model: Path, out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def cut(model: Path, out: Path) -> None:
    file = sorted(out.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-5])


FAULTS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "another scheme": (None, dict(scheme="fp8"), ["'scheme' differs", "another directory"]),
    "another choice of layers": (None, dict(quantization_ignore=("down_proj",)), ["'ignore' differs"]),
    "other weights": (other_weights, {}, ["'files' differs"]),
    "somebody's checkpoint": (no_origin, {}, ["not made of"]),
    "a file": (a_file, {}, ["is a file"]),
    "somebody's files": (notes, {}, ["is not empty"]),
    "a cut file": (cut, {}, ["model-1.safetensors is missing or cut short", "remove"]),
}


@cases("name", FAULTS)
def test_a_directory_of_something_else_is_refused_and_left(name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "saved"
    start(model, out=out)
    change, options, parts = FAULTS[name]
    if change:
        change(model, out)
    before = {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()}
    with pytest.raises(OctavoError) as raised:
        start(model, out=out, **options)
    text = str(raised.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert all(part in text for part in [str(out), *parts]), text
    assert {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()} == before


def test_what_has_nothing_to_save_is_refused(model: Path, tmp_path: Path) -> None:
    for options in (dict(), dict(quantization="bf16"), dict(quantization="fp8", load_format="dummy")):
        with pytest.raises(OctavoError, match="--save-quantized"):
            EngineConfig(model=str(model), save_quantized=str(tmp_path / "out"), **options)  # type: ignore[arg-type]
    start(model, "fp8", tmp_path / "saved")
    with pytest.raises(OctavoError, match=r"stores model\.layers.* as fp8 already, whose codes a start keeps"):
        start(tmp_path / "saved", "ptpc_fp8", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_octavo_quantize_wrote_serves_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(model), "-o", str(out), "--scheme", "fp8_block"]) == 0
    no_writing(monkeypatch)
    assert said(start(model, "fp8_block", out), f"weights taken from {out}")


def test_threads_are_as_before(model: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    LLM(model, quantization="fp8", device="cpu", threads=2, save_quantized=str(tmp_path / "out"), cpu_kv_cache_gib=0.1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_the_report_says_how_fast_loading_was(model: Path) -> None:
    nbytes = sum(t.nbytes for t in tensors_of(model).values())
    lines = start(model).info.report
    found = [m for line in lines if (m := re.fullmatch(r"note: loaded in ([\d.]+) s: ([\d.,]+) MB at ([\d.]+) GB/s", line))]
    assert len(found) == 1
    assert float(found[0][2].replace(",", "")) == pytest.approx(nbytes / 1e6, abs=0.06)
    assert not any("peak while loading" in line for line in lines)  # a CPU's is not known
    assert said(start(model, load_format="dummy"), "random weights made in")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("options", [dict(), dict(load_format="dummy")], ids=str)
def test_the_peak_on_an_accelerator_is_the_model_and_little_more(options: dict[str, Any], model: Path) -> None:
    lines = start(model, device="cuda", **options).info.report
    pattern = r"note: peak while loading ([\d.]+) (\w+) \(model ([\d.]+) (\w+) \+ ([\d.]+) (\w+)\)"
    found = [m for line in lines if (m := re.fullmatch(pattern, line))]
    assert len(found) == 1
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    peak, finished, more = (float(found[0][i]) * units[found[0][i + 1]] for i in (1, 3, 5))
    assert peak == pytest.approx(finished + more, rel=0.05)
    assert more < finished
