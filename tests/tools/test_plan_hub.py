"""`octavo plan` of a name of the hub: the headers by ranges, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub.conftest import hub  # noqa: F401 (a fixture)
from hub.hub_server import Hub, Repo
from huggingface_hub import constants
from tools.planner import answer, plan_of

from octavo.cli import main
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.hub.download import fetch

NAME = "an-org/a-model"
FILES = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir()}
READ = sum(len(FILES[name]) for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"))
WEIGHTS = len(FILES["model.safetensors"])
OF_THE_FILES = ("measured_by", "model", "command", "notes", "bytes_to_download")


@pytest.fixture
def demo(hub: Hub) -> Hub:  # noqa: F811
    hub.repos[NAME] = Repo(FILES)
    return hub


def rest(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in OF_THE_FILES}


def test_a_plan_reads_headers_alone(demo: Hub, tmp_path: Path) -> None:
    found = answer(NAME, "--accelerator", "h100")
    assert rest(found) == rest(answer("--accelerator", "h100"))  # as of the directory
    assert found["model"] == NAME
    assert found["measured_by"] == "its safetensors headers on the hub"
    assert found["bytes_to_download"] == WEIGHTS + READ
    assert "The command downloads 11.7 MB first. This plan read headers and config.json alone." in found["notes"]
    assert 0 < demo.sent(".safetensors") <= 100_001
    assert {request.range for request in demo.asked("GET", ".safetensors")} == {"bytes=0-100000"}
    assert demo.sent() == demo.sent(".safetensors") + len(FILES["config.json"])
    assert not (tmp_path / "cache").exists()


def test_headers_longer_than_a_first_look(demo: Hub) -> None:
    content = FILES["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": {"x": "y" * 150_000}}).encode()
    demo.repos[NAME] = Repo(FILES | {"model.safetensors": len(header).to_bytes(8, "little") + header + content[8 + length :]})
    assert rest(answer(NAME))["parameters_in_headers"] == answer()["parameters_in_headers"]
    assert demo.sent(".safetensors") == 100_001 + len(header)


def test_shards(demo: Hub) -> None:
    content = FILES["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    files = {}
    for number, names in enumerate((sorted(header)[::2], sorted(header)[1::2])):
        data, tensors = b"", {}
        for name in names:
            start, stop = header[name]["data_offsets"]
            tensors[name] = header[name] | {"data_offsets": [len(data), len(data) + stop - start]}
            data += content[8 + length + start : 8 + length + stop]
        text = json.dumps(tensors).encode()
        files[f"model-{number}.safetensors"] = len(text).to_bytes(8, "little") + text + data
    index = {name: f"model-{number}.safetensors" for number in (0, 1) for name in sorted(header)[number::2]}
    texts = {name: content for name, content in FILES.items() if not name.endswith(".safetensors")}
    named = {"model.safetensors.index.json": json.dumps({"weight_map": index}).encode()}
    demo.repos[NAME] = Repo(texts | named | files | {"pytorch_model.bin": b"x"})
    found = answer(NAME, "-q", "fp8", "--accelerator", "h100")
    assert rest(found) == rest(answer("-q", "fp8", "--accelerator", "h100"))
    assert found["bytes_to_download"] == sum(map(len, files.values())) + READ + len(named["model.safetensors.index.json"])


def test_what_the_cache_has_is_read_there(demo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(NAME, None, None, weights=True, tell=lambda *_: None, say=lambda _: None)
    demo.requests.clear()
    found = answer(NAME, "--accelerator", "h100")
    assert found["bytes_to_download"] == 0
    assert "The command downloads nothing: the cache has it. This plan read headers and config.json alone." in found["notes"]
    assert [request.path for request in demo.requests] == [f"/api/models/{NAME}"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert rest(answer(NAME, "--accelerator", "h100")) == rest(found)
    assert len(demo.requests) == 1


def test_made_up_weights_need_config_json_alone(demo: Hub) -> None:
    found = answer(NAME, "--load-format", "dummy")
    assert found["bytes_to_download"] == READ
    assert not demo.sent(".safetensors")


def test_a_known_name_asks_nobody_unless_a_revision_is_given(demo: Hub) -> None:
    name = "meta-llama/Llama-3.1-8B-Instruct"
    plan_of(name, "--accelerator", "h100")
    assert not demo.requests
    demo.repos[name] = Repo({}, {"v1": FILES})
    assert answer(name, "--revision", "v1")["parameters"] == answer()["parameters"]


def test_the_command_names_the_model_as_it_was_given(demo: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for given, told in (
        ([NAME, "--revision", "main"], f"octavo serve {NAME} --quantization ptpc_fp8 --kv-cache-dtype fp8 --revision main"),
        (["meta-llama/Llama-3.1-8B-Instruct"], "octavo serve meta-llama/Llama-3.1-8B-Instruct --quantization"),
        (["Llama-3.1-8B"], "octavo serve path/to/Llama-3.1-8B --quantization"),
    ):
        assert main(["plan", *given, "--accelerator", "h100"]) == 0
        assert told in capsys.readouterr().out


def test_refusals_name_the_model(demo: Hub) -> None:
    demo.repos[NAME] = Repo(FILES | {"model.safetensors": b"x" * 1000})
    with pytest.raises(OctavoError, match=f"asked for {NAME}, and that failed .*'model.safetensors'"):
        plan_of(NAME)
    demo.repos[NAME] = Repo({**FILES, "config.json": b"[]"})
    with pytest.raises(OctavoError, match=rf"^{NAME}/config.json is not valid JSON \(not an object\)"):
        plan_of(NAME)
    for wrong in ("an-org/other", "Llama-9"):
        with pytest.raises(OctavoError, match="check its spelling" if "/" in wrong else "no model that is known by name"):
            plan_of(wrong)


def test_a_directory_comes_before_the_hub(demo: Hub, tmp_path: Path) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / NAME)
    assert answer(NAME)["measured_by"] == "its safetensors headers"
    assert not demo.requests
