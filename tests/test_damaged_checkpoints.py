"""Checkpoints that are damaged, or odd on purpose: one sentence each, no traceback, and no waiting."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import cases

from octavo.config import EngineConfig
from octavo.demo import MODEL_DIR
from octavo.engine.core import EngineCore
from octavo.errors import OctavoError
from octavo.text.chat_template import render_chat
from octavo.text.tokenizer import load_tokenizer
from octavo.weights.checkpoint import INDEX, Checkpoint

SECONDS = 60
WEIGHTS = "model.safetensors"
DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A test that waits fails; each of its cases has the whole time."""

    def late(*_: object) -> None:
        raise TimeoutError(f"nothing in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    directory = tmp_path / "model"
    shutil.copytree(MODEL_DIR, directory)
    return directory


def load(directory: Path) -> None:
    """What a start reads."""
    load_tokenizer(directory)
    EngineCore(EngineConfig(model=str(directory), max_model_len=64, threads=1, cpu_kv_cache_gib=0.01, enforce_eager=True))


def refused(directory: Path, load: Callable[[Path], Any] = load) -> str:
    signal.alarm(SECONDS)
    with pytest.raises(OctavoError) as error:
        load(directory)
    sentence = str(error.value)
    assert sentence.endswith((".", "?")), sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    return sentence


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def test_the_model_that_is_not_damaged_is_loaded(model: Path) -> None:
    load(model)


@cases("name", ["/etc/passwd", "../model.safetensors", "a/../../model.safetensors", "", ".", "a\0b"])
def test_an_index_names_no_file_outside(model: Path, name: str) -> None:
    shutil.copy(model / WEIGHTS, model.parent / WEIGHTS)  # a path that led out would find it
    named = str(model.parent / WEIGHTS) if name == "/etc/passwd" else name
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": named}}))
    assert "which is not in the checkpoint's directory" in refused(model, Checkpoint)


def test_an_index_may_name_a_link_and_a_folder(model: Path) -> None:
    """As the directories of Hugging Face's cache do."""
    (model.parent / "blobs").mkdir()
    (model / "part").mkdir()
    shutil.move(model / WEIGHTS, model.parent / "blobs" / "a")
    (model / "part" / WEIGHTS).symlink_to("../../blobs/a")
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": f"part/{WEIGHTS}"}}))
    assert "model.norm.weight" in Checkpoint(model).tensors


@cases("weight_map", [[], 5, {"a": 5}, {"a": None, "b": "x"}, {"a": []}, None, "text"], ids=str)
def test_an_index_that_is_none(model: Path, weight_map: Any) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "is not a safetensors index" in refused(model, Checkpoint)


READ = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "hf_quant_config.json",
    WEIGHTS,
    INDEX,
]


def emptied(model: Path, name: str) -> Path:
    """The path, with nothing there and a folder to be in."""
    (path := model / name).parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    return path


@cases("name", READ)
def test_a_pipe_in_place_of_a_file(model: Path, name: str) -> None:
    os.mkfifo(emptied(model, name))
    assert f"{name} is a pipe, not a file" in refused(model)


@cases("name", READ)
def test_a_directory_in_place_of_a_file(model: Path, name: str) -> None:
    emptied(model, name).mkdir()
    assert f"{name} is a directory, not a file" in refused(model)


@cases("name", READ)
def test_a_link_in_a_circle(model: Path, name: str) -> None:
    (path := emptied(model, name)).symlink_to(path.name)
    if name in (WEIGHTS, "tokenizer.json"):
        return  # exists() says no: the same as without the file
    assert f"{name} cannot be read" in refused(model)


@cases("name", [name for name in READ if name.endswith(".json")])
@cases("content", [DEEP, '{"a":' * 50_000, "", "{", "[]", "5", "\xff", '{"a": "\0'], ids=lambda text: text[:4])
def test_json_that_is_none(model: Path, name: str, content: str) -> None:
    emptied(model, name).write_bytes(content.encode("latin-1"))
    assert f"{name} " in refused(model)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_that_is_not_utf8(model: Path, name: str) -> None:
    emptied(model, name).write_bytes("{{ 'caf\xe9' }}".encode("latin-1"))
    assert f"{name} is not UTF-8 text (byte 7: " in refused(model)


@cases(
    "template",
    [5, {}, True, [5], ["x"], [None], [{"name": "x"}], [{"template": "x"}], [{"name": 5, "template": "x"}],
     [{"name": "default", "template": ["x"]}], [[]]],
    ids=str,
)  # fmt: skip
@cases("name", ["tokenizer_config.json", "chat_template.json"])
def test_odd_chat_templates(model: Path, name: str, template: Any) -> None:
    edit(model / name, chat_template=template)
    assert "chat_template must be a text or a list of objects with a name and a template" in refused(model, load_tokenizer)


@cases(
    "template",
    ["{{ " + "(" * 20_000, "{% if x %}" * 3000 + "{% endif %}" * 3000, "{{ " + "-" * 50_000 + "1 }}",
     "{{ " + "9" * 5000 + " }}", "{% for a in b %}" * 60 + "{% endfor %}" * 60],
    ids=lambda text: text[:16],
)  # fmt: skip
def test_templates_that_do_not_compile(template: str) -> None:
    assert "chat template" in refused(Path(), lambda _: render_chat(template, [], {}))


@cases("eos", [{}, "2", [{}], [2, "3"], True, 1.5], ids=str)
@cases("name", ["generation_config.json", "config.json"])
def test_odd_eos_token_ids(model: Path, name: str, eos: Any) -> None:
    edit(model / "generation_config.json", eos_token_id=None)
    edit(model / name, eos_token_id=eos)
    assert f"{name}: eos_token_id must be a token id or a list of them" in refused(model)


@cases("layers", [10**7, 2**63, 10**30, 5000, 100])
def test_more_layers_than_there_are(model: Path, layers: int) -> None:
    edit(model / "config.json", num_hidden_layers=layers)
    assert (f"num_hidden_layers is {layers}, which no model has" if layers > 4096 else "layers.") in refused(model)


NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@cases("name", [*NUMBERS, "max_position_embeddings"])
@cases("value", [2**63, 10**30, 2**31 + 1])
def test_sizes_beyond_any_model(model: Path, name: str, value: int) -> None:
    edit(model / "config.json", **{name: value})
    assert f"{name} is {value}, which no model has" in refused(model)


@cases("value", [10**40, 10**400, 1e300, -1e-5, 0, float("inf"), float("nan")], ids=str)
def test_numbers_that_no_kernel_takes(model: Path, value: float) -> None:
    edit(model / "config.json", rms_norm_eps=value)
    assert "rms_norm_eps must be a positive number" in refused(model)


def test_a_config_without_a_model_type(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["model_type"]
    (model / "config.json").write_text(json.dumps(config))
    assert "has no model_type" in refused(model)


@cases("key", ["ignore", "modules_to_not_convert", "exclude", "exclude_modules", "targets"])
@cases("listed", [5, 1.5, "lm_head", {"a": 1}, [5], [None], [["lm_head"]], [{"a": None}]], ids=str)
def test_lists_of_modules_that_are_none(model: Path, key: str, listed: Any) -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights} | ({key: listed} if key == "targets" else {})
    method = "fbgemm_fp8" if key == "modules_to_not_convert" else "compressed-tensors"
    described = {"quant_method": method, "config_groups": {"a": group}} | ({} if key == "targets" else {key: listed})
    edit(model / "config.json", quantization_config=described)
    assert f"the quantization_config of '{method}' has a field of the wrong type" in refused(model)


def without_roots_rights() -> None:
    """In a new process: files that its user may not read are not read, though it be root (CAP_DAC_OVERRIDE and _READ_SEARCH
    leave the bounding set)."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def test_weights_that_may_not_be_read_or_are_not_there(model: Path) -> None:
    (model / WEIGHTS).chmod(0)
    program = f"from octavo.weights.checkpoint import Checkpoint; from pathlib import Path; Checkpoint(Path({str(model)!r}))"
    read = [sys.executable, "-c", program]
    told = subprocess.run(read, capture_output=True, text=True, timeout=SECONDS, preexec_fn=without_roots_rights)
    assert told.stderr.splitlines()[-1].endswith(f"{WEIGHTS} cannot be read: Permission denied.")
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to("../gone")
    assert f"{WEIGHTS} links to a file that is not there; download it" in refused(model, Checkpoint)
    (model / WEIGHTS).unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": WEIGHTS}}))
    assert f"{WEIGHTS} is missing, but the checkpoint's index names it" in refused(model, Checkpoint)


SERVE = [sys.executable, "-m", "octavo.cli", "serve", "--host", "127.0.0.1", "--port", "0", "--threads", "1"]


@pytest.mark.parametrize("mib", [400, 1000])
def test_too_little_address_space(mib: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))

    told = subprocess.run(SERVE, capture_output=True, text=True, timeout=SECONDS, preexec_fn=limit)
    assert told.returncode == 1
    assert "Traceback" not in told.stderr
    assert told.stderr.splitlines()[-1].startswith("octavo: There is too little memory (")
    assert "ulimit -v" in told.stderr
