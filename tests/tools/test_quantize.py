"""`octavo quantize`: the bits of the online quantizer, read alike by transformers, whatever happens on the way."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import COMMON, LoadModel, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

from octavo import LLM
from octavo.cli import main
from octavo.convert import quantize_plan
from octavo.convert.output_directory import MARKER, ORIGIN
from octavo.convert.output_file import OutputFile
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant import (
    BF16,
    FP8_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    FP8_W8A16,
    QTensor,
    QuantRules,
    Scheme,
    dequantize,
    quantize,
)
from octavo.tools.quantize.quantize import quantize_checkpoint

SCHEMES = [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK, FP8_W8A16]
schemes = cases("scheme", SCHEMES, ids=lambda s: s.name)
ODD = dict(hidden_size=156, intermediate_size=300, head_dim=38)
# transformers says that a config of its own overrides the checkpoint's
dequantized = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
Q = "model.layers.1.self_attn.q_proj.weight"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor that the index names, or the one file holds."""
    index = directory / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor for file in sorted(names) for name, tensor in load_file(directory / file).items()}


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def llama(path: Path, **changes: Any) -> Path:
    """A BF16 checkpoint in several files, with outliers."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**(COMMON | changes)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.where(torch.rand_like(p) < 0.01, 10.0, 3.0))
    model.bfloat16().save_pretrained(path, max_shard_size="60KB")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def run(model: Path, out: Path, scheme: Scheme = FP8_PER_CHANNEL, **options: Any) -> list[str]:
    """What was said."""
    said: list[str] = []
    rules = QuantRules(scheme, options.pop("ignore", ()), options.pop("quantize_lm_head", False))
    quantize_checkpoint(model, out, rules, say=said.append, **options)
    return said


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def assert_sentence(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert text.endswith("."), text
    assert all(part in text for part in parts), text


# --- what is written --------------------------------------------------------------------


@schemes
@cases("changes", [{}, dict(hidden_size=156, intermediate_size=300, head_dim=38), dict(hidden_size=256)], ids=str)
@cases("chunk", [1000, 1 << 19])
def test_bits_are_those_of_the_online_quantizer(
    scheme: Scheme, changes: dict[str, Any], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_plan, "CHUNK", chunk)  # many parts a matrix, or one
    model = llama(tmp_path / "model", **changes)
    run(model, tmp_path / "out", scheme)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    for name, w in before.items():
        if not is_linear(name):
            assert torch.equal(after.pop(name), w)
            continue
        expected = quantize(w, scheme)
        assert expected.scale is not None
        scale = expected.scale[:1, 0] if scheme is FP8_PER_TENSOR else expected.scale
        assert after[name].dtype is torch.float8_e4m3fn
        assert torch.equal(after.pop(name).view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(after.pop(f"{name}_scale"), scale)
    assert not after


@dequantized
@schemes
@cases("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_reads_the_same_weights(scheme: Scheme, dtype: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "out", scheme)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=dtype,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, w in tensors_of(checkpoint).items():
        expected = dequantize(quantize(w, scheme)) if is_linear(name) else w
        assert torch.equal(theirs.get_parameter(name), expected.to(dtype)), name


@schemes
@cases("ignore", [(), ("re:.*layers.0.mlp", "o_proj")], ids=str)
def test_logits_are_the_same_online_and_offline(
    scheme: Scheme, ignore: tuple[str, ...], checkpoint: Path, tmp_path: Path, load_model: LoadModel
) -> None:
    run(checkpoint, tmp_path / "out", scheme, ignore=ignore)
    online = load_model(checkpoint, rules=QuantRules(scheme, ignore)).logits(tokens(40))
    offline = load_model(tmp_path / "out").logits(tokens(40))
    assert torch.equal(online, offline)
    assert not torch.equal(online, load_model(checkpoint).logits(tokens(40)))


def test_files_and_config(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "templates").mkdir()
    (checkpoint / "templates/tool.jinja").write_text("{{ x }}")
    (checkpoint / "original").mkdir()
    for name in ("original/consolidated.00.pth", "original/params.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
                 "other.gguf", "extra.safetensors", ".hidden", "hf_quant_config.json.partial"):  # fmt: skip
        (checkpoint / name).write_text("x")
    out = tmp_path / "new/out"
    run(checkpoint, out)
    shards = {path.name for path in checkpoint.glob("model-*.safetensors")}
    assert len(shards) > 3
    assert set(files_of(out)) == shards | {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "templates/tool.jinja",
        ORIGIN,
    }  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    before, after = (json.loads((path / "config.json").read_text()) for path in (checkpoint, out))
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["format"] == "float-quantized"
    assert quantization["ignore"] == ["lm_head"]


def test_data_are_aligned(tmp_path: Path) -> None:
    """A scale after an odd number of codes would be where no float may be."""
    model = llama(
        tmp_path / "model", hidden_size=6, intermediate_size=7, num_attention_heads=1, num_key_value_heads=1, head_dim=6
    )
    run(model, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
        assert length % 8 == 0
        assert all(e["data_offsets"][0] % sizes[e["dtype"]] == 0 for n, e in header.items() if n != "__metadata__")


@dequantized
def test_layers_left_out(checkpoint: Path, tmp_path: Path) -> None:
    run(
        checkpoint,
        tmp_path / "out",
        ignore=["model.layers.0.self_attn.k_proj", "re:.*layers.1.mlp.down"],
        quantize_lm_head=True,
    )
    after = tensors_of(tmp_path / "out")
    dense = {name.removesuffix(".weight") for name, t in after.items() if t.ndim == 2 and t.dtype is torch.bfloat16}
    stack = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}  # engines stack the three: they must be alike
    assert dense == stack | {"model.layers.1.mlp.down_proj", "model.embed_tokens"}
    assert after["lm_head.weight"].dtype is torch.float8_e4m3fn
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(quantization["ignore"]) == dense - {"model.embed_tokens"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))


def test_tied_embeddings_stay(tmp_path: Path, load_model: LoadModel) -> None:
    model = llama(tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(OctavoError) as raised:
        run(model, tmp_path / "out", quantize_lm_head=True)
    assert_sentence(raised.value, "--quantize-lm-head", "embedding matrix", "give it to octavo serve")
    assert not (tmp_path / "out").exists()
    run(model, tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    online = load_model(model, FP8_PER_CHANNEL).logits(tokens(9))
    assert torch.equal(load_model(tmp_path / "out").logits(tokens(9)), online)
    rules = QuantRules(FP8_PER_CHANNEL, quantize_lm_head=True)  # the matrix is quantized when it is loaded, from either
    quantized = load_model(model, rules=rules).logits(tokens(9))
    assert torch.equal(load_model(tmp_path / "out", rules=rules).logits(tokens(9)), quantized)
    assert not torch.equal(quantized, online)


def test_an_unknown_architecture(checkpoint: Path, tmp_path: Path) -> None:
    """Linear layers by their names; gates, embeddings, convolutions and vectors as they are."""
    config = json.loads((checkpoint / "config.json").read_text())
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "novel"}))
    linear = ["a.0.mlp.experts.3.down_proj", "a.0.attn.qkv", "a.0.indexer.wk", "a.0.kv_a_proj_with_mqa", "v.fc1"]
    dense = ["a.0.mlp.gate", "wte", "pos_embed", "a.0.indexer.weights_proj", "lm_head", "h.0.c_proj", "head.3"]
    shapes = {f"{name}.weight": (20, 30) for name in linear + dense} | {
        "v.patch.proj.weight": (4, 3, 2, 2),
        "norm.weight": (5,),
    }
    save_file({name: torch.randn(shape).half() for name, shape in shapes.items()}, checkpoint / "model.safetensors")
    said = run(checkpoint, tmp_path / "out")
    assert any("'novel'" in line for line in said)
    after = tensors_of(tmp_path / "out")
    assert {name.removesuffix(".weight") for name, t in after.items() if t.itemsize == 1} == set(linear)
    assert after["lm_head.weight"].dtype is torch.float16
    ignore = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignore) == set(dense) - {"wte", "pos_embed"}


# --- the quality of scales --------------------------------------------------------------


def errors(model: Path, out: Path) -> dict[str, float]:
    before, after = tensors_of(model), tensors_of(out)
    found = {}
    for name in filter(is_linear, before):
        w, scale = before[name].double(), after[f"{name}_scale"]
        if scale.ndim == 2 and scale.shape[1] * 128 >= w.shape[1] > 1 and scale.shape[0] != w.shape[0]:
            scale = scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
        found[name] = float((after[name].double() * scale.double() - w).norm() / w.norm())
    return found


@schemes
@cases("chunk", [5000, 1 << 19])
def test_the_search_lowers_every_layers_error(
    scheme: Scheme, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_plan, "CHUNK", chunk)
    model = llama(tmp_path / "model", **ODD, num_hidden_layers=2)
    run(model, tmp_path / "plain", scheme)
    run(model, tmp_path / "searched", scheme, search=True)
    plain, searched = errors(model, tmp_path / "plain"), errors(model, tmp_path / "searched")
    if scheme is FP8_PER_TENSOR:  # whose one scale absmax may happen to choose best
        assert all(searched[name] <= plain[name] for name in plain)
        assert sum(searched.values()) < sum(plain.values())
    else:
        assert all(searched[name] < plain[name] for name in plain), (plain, searched)


def test_the_search_is_exhaustive(tmp_path: Path) -> None:
    """Each channel's scale is the best of the sixteen, by float64's account of the errors."""
    model = llama(tmp_path / "model", num_hidden_layers=1)
    run(model, tmp_path / "out", search=True)
    w, after = tensors_of(model)["model.layers.0.mlp.up_proj.weight"], tensors_of(tmp_path / "out")
    absmax = quantize(w, FP8_PER_CHANNEL).scale
    assert absmax is not None
    tried = []
    for i in range(16):
        scale = absmax * (1 + i / 16)
        tried.append(((w.float() / scale).to(torch.float8_e4m3fn).double() * scale.double() - w.double()).square().sum(1))
    best = torch.stack(tried).argmin(0)[:, None]
    found = after["model.layers.0.mlp.up_proj.weight_scale"] / absmax
    assert ((found - 1) * 16 - best).abs().max() < 1e-3
    assert len(best.unique()) > 4


def test_verify_prints_the_errors(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(checkpoint, tmp_path / "out", check=True)
    expected = errors(checkpoint, tmp_path / "out")
    name, worst = max(expected.items(), key=lambda item: item[1])
    assert f"worst {worst:.5f}" in said[-1]
    assert f"mean of {len(expected)} layers {sum(expected.values()) / len(expected):.5f}" in said[-1]
    table = capsys.readouterr().out
    assert f"{worst:.5f}" in table
    assert name.removesuffix(".weight") in table


# --- stopped and continued --------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of work in ten files."""
    path = tmp_path_factory.mktemp("large") / "model"
    path.mkdir()
    config = COMMON | dict(model_type="llama", hidden_size=1024, intermediate_size=2048)
    (path / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for i in range(10):
        part = {f"model.layers.{i}.mlp.{n}_proj.weight": torch.randn(2048, 1024).bfloat16() for n in ("up", "gate")}
        save_file(part, path / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


# Runs the command and sends itself a signal right after the file of that number has its final name.
SIGNALLED = """
import os, signal, sys
from octavo.cli import main
from octavo.convert.output_file import OutputFile

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it
number, after = int(sys.argv[1]), int(sys.argv[2])
commit, files = OutputFile.commit, []

def counted(file):
    commit(file)
    files.append(file)
    if len(files) == after:
        os.kill(os.getpid(), number)

OutputFile.commit = counted
sys.exit(main(sys.argv[3:]))
"""


def signalled(number: signal.Signals, after: int, model: Path, out: Path) -> tuple[int, str]:
    """Exit code and stderr of a run that is sent a signal after so many files."""
    words = ["quantize", str(model), "-o", str(out), "--threads", "1", "--scale-search", "mse"]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(int(number)), str(after), *words], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


def test_a_killed_run_is_continued(large: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(large, whole, search=True)
    assert signalled(signal.SIGKILL, 3, large, out)[0] == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(done) == 3
    assert not (out / "config.json").exists()  # so nobody takes it for a checkpoint
    with pytest.raises(OctavoError):
        run(large, out)  # another command
    run(large, out, search=True)
    assert files_of(out) == files_of(whole)
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in done.items())  # not written again


def test_an_interrupted_run_leaves_no_partial_file(large: Path, tmp_path: Path) -> None:
    code, said = signalled(signal.SIGINT, 2, large, tmp_path / "out")
    assert code == 130
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("*.partial"))
    assert (tmp_path / "out" / MARKER).exists()


def test_a_restarted_machine_starts_over(checkpoint: Path, tmp_path: Path) -> None:
    """What was named just before a power cut may be empty on the disk."""
    out = tmp_path / "out"
    run(checkpoint, tmp_path / "whole")
    half_done(checkpoint, out)
    notes = json.loads((out / MARKER).read_text())
    (out / MARKER).write_text(json.dumps(notes | {"boot": "another"}) + "\n")
    first = sorted(out.glob("*.safetensors"))[0]
    data = first.read_bytes()
    first.write_bytes(data[:-10] + bytes(10))
    run(checkpoint, out)
    assert files_of(out) == files_of(tmp_path / "whole")


def half_done(model: Path, out: Path) -> None:
    """Stops as the last file is begun."""
    last = sorted(model.glob("*.safetensors"))[-1].name
    opened = OutputFile.open

    def stop(file: OutputFile) -> None:
        if file.path.name == last:
            raise KeyboardInterrupt
        opened(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFile, "open", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, out)


def test_changed_sources_are_not_continued(checkpoint: Path, tmp_path: Path) -> None:
    half_done(checkpoint, tmp_path / "out")
    first = sorted(checkpoint.glob("*.safetensors"))[0]
    os.utime(first, ns=(0, 0))
    with pytest.raises(OctavoError) as raised:
        run(checkpoint, tmp_path / "out")
    assert_sentence(raised.value, "unfinished work of another command", "'files'")


def test_two_at_once(checkpoint: Path, tmp_path: Path) -> None:
    half_done(checkpoint, tmp_path / "out")
    with open(tmp_path / "out" / MARKER) as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        with pytest.raises(OctavoError) as raised:
            run(checkpoint, tmp_path / "out")
    assert_sentence(raised.value, "another process is writing", str(tmp_path / "out"))
    run(checkpoint, tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(large: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = small_disk / "out"
    with pytest.raises(OctavoError) as raised:
        run(large, out)
    assert_sentence(raised.value, "needs 42,", "free 41,")  # before anything is written
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1 << 40))  # it fills up as we write
    with pytest.raises(OctavoError) as raised:
        run(large, out)
    assert_sentence(raised.value, "the disk is full", "model-2.safetensors needs 4,2", "continues")
    assert {path.name for path in out.iterdir()} == {MARKER, "model-0.safetensors", "model-1.safetensors"}
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    run(large, out)
    run(large, tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")


def test_files_beside_the_weights_that_cannot_be_copied(
    checkpoint: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence is of the file that is at fault, and the same command continues."""
    out, beside = tmp_path / "out", checkpoint / "notes.txt"
    os.mkfifo(beside)
    with pytest.raises(OctavoError, match=r"notes\.txt is no file, so it cannot be copied"):
        run(checkpoint, out)
    beside.unlink()
    beside.symlink_to(tmp_path / "gone")
    with pytest.raises(OctavoError, match=f"{beside} cannot be read: No such file"):
        run(checkpoint, out)
    beside.unlink()
    run(checkpoint, out)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1 << 40))
    beside.write_bytes(bytes(1 << 20))
    with pytest.raises(OctavoError) as raised:
        run(checkpoint, small_disk / "out")
    assert_sentence(raised.value, "the disk is full", "out/notes.txt needs 1,048,576 bytes", "continues")
    beside.unlink()
    run(checkpoint, small_disk / "out")
    assert files_of(small_disk / "out") == files_of(out)


# --- what cannot be done ----------------------------------------------------------------


def damaged(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        file = sorted(path.glob(name))[1]
        data = change(file.read_bytes())
        file.unlink() if data is None else file.write_bytes(data)

    return damage


def nan(path: Path) -> None:
    file = next(
        path / f for n, f in json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].items() if n == Q
    )
    tensors = load_file(file)
    tensors[Q][3, 4] = float("nan")
    save_file(tensors, file)


def experts(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[0]
    tensors = load_file(file) | {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 6, 5)}
    save_file(tensors, file)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.mlp.experts.gate_up_proj"] = file.name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def quantized_as(**config: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        found = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(found | {"quantization_config": config}))

    return change


FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, Any], list[str]]] = {
    "a missing shard": (damaged("model-*", lambda data: None), {}, ["model-00002-of-", "is missing"]),
    "a cut shard": (damaged("model-*", lambda data: data[:-9]), {}, ["model-00002-of-", "truncated or corrupt"]),
    "a garbled shard": (damaged("model-*", lambda data: b"\xff" * 9 + data), {}, ["model-00002-of-", "corrupt"]),
    "NaN": (nan, {}, [Q, ".safetensors", "NaN"]),
    "stacked experts": (experts, {}, ["experts.gate_up_proj", "4 experts", "--quantization-ignore"]),
    "an unused pattern": (lambda path: None, dict(ignore=["down_porj"]), ["'down_porj'", "matches no layer"]),
    "AWQ": (quantized_as(quant_method="awq", bits=4), {}, ["'awq'", "compressed-tensors"]),
    "no linear layers": (lambda path: None, dict(ignore=["*"]), ["no linear layer"]),
}  # fmt: skip


@cases("name", FAULTS)
def test_faults_are_said_and_leave_nothing(name: str, checkpoint: Path, tmp_path: Path) -> None:
    damage, options, parts = FAULTS[name]
    damage(checkpoint)
    with pytest.raises(OctavoError) as raised:
        run(checkpoint, tmp_path / "out", **options)
    assert_sentence(raised.value, *parts)
    assert not list((tmp_path / "out").glob("*.partial"))
    assert not (tmp_path / "out/config.json").exists()


def test_stacked_experts_may_be_left_out(checkpoint: Path, tmp_path: Path) -> None:
    experts(checkpoint)
    run(checkpoint, tmp_path / "out", ignore=["*.experts.*"])
    assert tensors_of(tmp_path / "out")["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 6, 5)


@pytest.mark.parametrize("what", ["a checkpoint", "a file of someone's", "a plain file", "the model itself"])
def test_existing_output_is_not_touched(what: str, checkpoint: Path, tmp_path: Path) -> None:
    out = checkpoint if what == "the model itself" else tmp_path / "out"
    if what == "a checkpoint":
        run(checkpoint, out, ignore=["lm_head"])  # with other settings than those it is to be written with
    elif what == "a file of someone's":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    elif what == "a plain file":
        out.write_text("mine")
    before = files_of(out) if out.is_dir() else out.read_bytes()
    with pytest.raises(OctavoError) as raised:
        run(checkpoint, out)
    assert_sentence(raised.value, str(out))
    assert (files_of(out) if out.is_dir() else out.read_bytes()) == before
    if what == "a plain file":
        with pytest.raises(OctavoError) as raised:
            run(checkpoint, out / "x")
        assert_sentence(raised.value, f"{out} is a file, so there can be no {out}/x; give -o a new directory.")
    empty = tmp_path / "empty"
    empty.mkdir()
    run(checkpoint, empty)


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["quantize", str(checkpoint), "-o", out, "--scheme", "fp8_per_block", "--quantization-ignore", "lm_head"]) == 0
    said = capsys.readouterr()
    assert "21 matrices to fp8_block" in said.out
    assert "GB/s" in said.err
    assert main(["quantize", str(checkpoint), "-o", out]) == 1
    assert main(["quantize", str(checkpoint), "-o", f"{out}2", "--scheme", "fp9"]) == 1
    assert main(["quantize", str(checkpoint), "-o", f"{out}2", "--scheme", "bf16"]) == 1
    assert main(["quantize", str(tmp_path / "nowhere"), "-o", f"{out}2"]) == 1
    assert [line.startswith("octavo: ") for line in capsys.readouterr().err.splitlines()] == [True] * 4
    assert not Path(f"{out}2").exists()


# --- quantized before -------------------------------------------------------------------


def stored(model: Path, scheme: Scheme, path: Path, name: str = "weight_scale") -> Path:
    """The model with matrices of `scheme` whose scales are a little larger than Octavo's, as other tools' are."""
    shutil.copytree(model, path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for full in list(filter(is_linear, tensors)):
            q = quantize(tensors[full] * 1.1, scheme)
            assert q.scale is not None
            tensors |= {full: q.data, full.replace("weight", name): q.scale[0] if scheme is FP8_PER_TENSOR else q.scale}
            tensors[full.replace("weight", "input_scale")] = torch.tensor(0.5)
        save_file(tensors, file)
    (path / "model.safetensors.index.json").unlink()
    everything = {name: file.name for file in path.glob("*.safetensors") for name in load_file(file)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": everything}))
    return path


@cases("asked", SCHEMES, ids=lambda s: s.name)
@cases("have", SCHEMES, ids=lambda s: s.name)
def test_stored_codes_are_kept_or_converted(have: Scheme, asked: Scheme, tmp_path: Path) -> None:
    model = llama(tmp_path / "model", **ODD)
    before = stored(model, have, tmp_path / "stored", "weight_scale_inv" if have is FP8_BLOCK else "weight_scale")
    said = run(before, tmp_path / "out", asked)
    old, new = tensors_of(before), tensors_of(tmp_path / "out")
    assert not any(name.endswith(("_inv", "input_scale")) for name in new)
    for name in filter(is_linear, old):
        scale = old[f"{name}_scale_inv" if have is FP8_BLOCK else f"{name}_scale"]
        if have.weight is asked.weight:
            assert torch.equal(new[name].view(torch.uint8), old[name].view(torch.uint8))
            assert torch.equal(new[f"{name}_scale"], scale)
        else:
            wide = scale.expand(old[name].shape[0], 1) if have is FP8_PER_TENSOR else scale
            expected = quantize(dequantize(QTensor(old[name], wide, have, tuple(old[name].shape))), asked)  # type: ignore[arg-type]
            assert torch.equal(new[name].view(torch.uint8), expected.data.view(torch.uint8))
    assert any(("kept bit for bit" if have.weight is asked.weight else "rounded a second time") in line for line in said)


def test_weight_only_is_said_and_read(checkpoint: Path, tmp_path: Path, load_model: LoadModel) -> None:
    """config.json alone says that activations stay; asked for, they stay too for codes whose checkpoint says otherwise."""
    for scheme in (FP8_W8A16, FP8_PER_CHANNEL, FP8_PER_TENSOR):
        run(checkpoint, tmp_path / scheme.name, scheme)
    weight_only, by_channel = (tensors_of(tmp_path / name) for name in ("fp8_w8a16", "ptpc_fp8"))
    assert {n: t.view(torch.uint8).tolist() for n, t in weight_only.items()} == {
        n: t.view(torch.uint8).tolist() for n, t in by_channel.items()
    }
    group = json.loads((tmp_path / "fp8_w8a16/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"] is None
    assert (group["weights"]["strategy"], group["weights"]["type"], group["weights"]["num_bits"]) == ("channel", "float", 8)
    logits = {
        (name, rules.name): load_model(tmp_path / name, rules).logits(tokens(40))
        for name in ("fp8_w8a16", "ptpc_fp8", "fp8")
        for rules in (BF16, FP8_W8A16, FP8_PER_CHANNEL)
    }
    assert torch.equal(logits["fp8_w8a16", "bf16"], logits["ptpc_fp8", "fp8_w8a16"])
    assert torch.equal(logits["ptpc_fp8", "bf16"], logits["fp8_w8a16", "ptpc_fp8"])
    assert not torch.equal(logits["fp8_w8a16", "bf16"], logits["ptpc_fp8", "bf16"])
    assert not torch.equal(logits["fp8", "bf16"], logits["fp8", "fp8_w8a16"])


def test_ignored_layers_become_bf16(checkpoint: Path, tmp_path: Path) -> None:
    before = stored(checkpoint, FP8_PER_CHANNEL, tmp_path / "stored")
    run(before, tmp_path / "out", ignore=["down_proj"])
    old, new = tensors_of(before), tensors_of(tmp_path / "out")
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(new[name], (old[name].float() * old[f"{name}_scale"]).bfloat16())
    assert f"{name}_scale" not in new


def test_the_device_decides_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints hold e4m3fn, also where the device computes in e4m3fnuz."""
    fnuz = Platform(torch.device("cpu"), "gfx942", fp8_dtype=torch.float8_e4m3fnuz)
    monkeypatch.setattr("octavo.tools.quantize.quantize.detect", lambda device: fnuz)
    run(checkpoint, tmp_path / "out")
    monkeypatch.undo()
    run(checkpoint, tmp_path / "again")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_two_schemes_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["quantize", str(MODEL_DIR), "-o", out, "--scheme", "fp8", "--quantization", "ptpc_fp8"]) == 1
    assert "Two schemes were given, fp8 and ptpc_fp8; give one of them." in capsys.readouterr().err


def test_a_flag_over_a_quantized_checkpoint_is_said_to_leave_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(MODEL_DIR), "-o", str(out), "--scheme", "fp8"]) == 0
    report = LLM(out, quantization="ptpc_fp8", device="cpu", threads=1).info.report
    assert "note: layers stored as fp8 keep their codes; ptpc_fp8 is for those in BF16" in report


def test_the_same_command_again_finds_its_work_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, line = tmp_path / "out", ["quantize", str(MODEL_DIR), "-o", str(tmp_path / "out")]
    assert main(line) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert main(line) == 0
    assert f"{out} is finished already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main([*line, "--scheme", "fp8"]) == 1
    assert "with other settings" in capsys.readouterr().err


@cases("scheme", [FP8_BLOCK, FP8_PER_CHANNEL], ids=lambda s: s.name)
def test_tiles_that_do_not_divide_name_who_fails(scheme: Scheme, tmp_path: Path) -> None:
    """transformers does: the proposal is a scheme that it runs."""
    model = llama(tmp_path / "model", hidden_size=128, head_dim=32, intermediate_size=160)
    said = " ".join(run(model, tmp_path / "out", scheme))
    told = "do not divide into 128x128 tiles: transformers fails in its first forward pass, most vLLMs at load"
    assert (told in said, "; take ptpc_fp8 for these: model.layers.*" in said) == (scheme is FP8_BLOCK,) * 2
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if scheme is FP8_BLOCK:
        with pytest.raises(RuntimeError, match=r"\[2, 128\] don't multiply up to the size of dim 2 \(160\)"):
            reference(torch.tensor([tokens(8)]))
    else:
        assert reference(torch.tensor([tokens(8)])).logits.isfinite().all()
