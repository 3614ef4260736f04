"""What people give in place of a checkpoint directory, or in it: a sentence for each, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import socket
import time
from pathlib import Path

import pytest
from cases import cases
from server.processes import Server

from octavo.cli import engine_config, main, make_parser
from octavo.config import EngineConfig
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.files import check_directory
from octavo.frontend.llm import LLM
from octavo.hub.snapshots import snapshot_of
from octavo.messages import SamplingParams
from octavo.models import read_config
from octavo.server import serve
from octavo.weights.checkpoint import Checkpoint

ADAPTER = json.dumps({"base_model_name_or_path": "an-org/a-model"})
KINDS = {
    "a LoRA adapter": ({"adapter_config.json": ADAPTER, "adapter_model.safetensors": ""}, "LoRA adapter of an-org/a-model"),
    "a LoRA adapter with its model's config.json": ({"adapter_config.json": ADAPTER, "config.json": "{}"}, "LoRA adapter of"),
    "a LoRA adapter of nobody": ({"adapter_config.json": "{}"}, "is a LoRA adapter, which"),
    "GGUF": ({"a-model.Q4_K_M.gguf": ""}, r"llama\.cpp's format \(\.gguf\)"),
    "a pickle": ({"pytorch_model.bin": "", "training_args.bin": ""}, r"pickled weights \(\.bin\)"),
    "another pickle": ({"consolidated.00.pth": ""}, r"pickled weights \(\.pth\)"),
    "the settings of a training": ({"training_args.bin": ""}, r"has no config\.json"),
    "a hub's cache": (
        {"models--org--name/refs/main": "abc"},
        "cache, of several models; give one of them, such as .*org--name",
    ),
    "a file of GGUF": ({"model": ""}, "is a file of weights in llama"),
}


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path := directory / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@cases("kind", KINDS)
def test_what_is_no_checkpoint_is_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, told = KINDS[kind]
    given = write(tmp_path / "given", files)
    if kind == "a file of GGUF":
        (given := tmp_path / "model.gguf").write_bytes(b"GGUF")
    for look in (check_directory, read_config, LLM):
        with pytest.raises(OctavoError, match=told) as raised:
            look(given)
        assert str(raised.value).endswith(".")
    for command in ("serve", "plan", "quantize"):
        began = time.monotonic()
        assert main([command, str(given), *(("--output", str(tmp_path / "out")) if command == "quantize" else ())]) == 1
        assert str(raised.value) in capsys.readouterr().err
        assert time.monotonic() - began < 2  # no engine was started


def test_weights_that_are_not_safetensors_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": "{}", "pytorch_model-00001-of-00002.bin": ""})
    with pytest.raises(OctavoError, match=r"no \.safetensors files, and holds pickled weights \(\.bin\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pointer_of_git_is_no_file(name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model)
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(OctavoError, match="is a pointer of Git LFS, not the file itself; run git lfs pull"):
        LLM(model, cpu_kv_cache_gib=0.01, threads=1)


def cached(tmp_path: Path, *revisions: str, main: str = "") -> Path:
    folder = tmp_path / "models--org--name"
    for revision in revisions:
        (folder / "snapshots" / revision).mkdir(parents=True)
    return write(folder, {"refs/main": main} if main else {})


def config_of(*arguments: str) -> EngineConfig:
    return engine_config(make_parser("serve", serve.add_arguments).parse_args(arguments))


def test_a_models_folder_in_the_hub_s_cache_is_its_snapshot(tmp_path: Path) -> None:
    folder = cached(tmp_path, "abc", "def", main="def")
    assert snapshot_of(str(folder)) == str(folder / "snapshots" / "def")
    assert config_of(str(folder)).model == str(folder / "snapshots" / "def")
    assert config_of("--model", str(folder), "--revision", "abc").model == str(folder / "snapshots" / "abc")
    assert snapshot_of(str(MODEL_DIR)) == str(MODEL_DIR)
    with pytest.raises(OctavoError, match="which of its snapshots is 'v2' is not said: it has abc, def"):
        config_of(str(folder), "--revision", "v2")


def test_a_revision_of_what_has_none_is_refused(tmp_path: Path) -> None:
    """A snapshot has its own name, and those that stand for it."""
    folder = cached(tmp_path, "abc", "def", main="def")
    snapshot = str(folder / "snapshots" / "def")
    for revision in ("def", "main"):
        assert config_of(snapshot, "--revision", revision).model == snapshot
    for model, revision in ((snapshot, "abc"), (snapshot, "v2"), (str(MODEL_DIR), "main")):
        with pytest.raises(OctavoError, match=f"--revision {revision} is for a name of the hub, .* and {model} is a directory"):
            config_of(model, "--revision", revision)
        with pytest.raises(OctavoError, match="has no revisions; leave it out"):
            LLM(model, revision=revision)
    for demo in (lambda: config_of("--revision", "main"), lambda: LLM(revision="main")):
        with pytest.raises(OctavoError, match="revision is for a name of the hub; give that too"):
            demo()
    with pytest.raises(OctavoError, match="which of its snapshots is '' is not said"):
        snapshot_of(str(folder), "")


def test_a_snapshot_that_is_the_only_one_or_none(tmp_path: Path) -> None:
    one = cached(tmp_path / "one", "abc")
    assert snapshot_of(str(one)) == str(one / "snapshots" / "abc")
    two = cached(tmp_path / "two", "abc", "def")
    with pytest.raises(OctavoError, match="it has abc, def"):
        snapshot_of(str(two))
    (none := cached(tmp_path / "none", "abc")).joinpath("snapshots", "abc").rmdir()
    with pytest.raises(OctavoError, match="it has none; was the download interrupted"):
        snapshot_of(str(none))


def test_a_model_in_the_hub_s_cache_is_loaded(tmp_path: Path) -> None:
    folder = cached(tmp_path, main="abc")
    (folder / "snapshots").mkdir()
    (folder / "blobs").mkdir()
    (folder / "snapshots" / "abc").symlink_to(MODEL_DIR)
    llm = LLM(folder, cpu_kv_cache_gib=0.01, threads=1)
    assert llm.config.model == str(folder / "snapshots" / "abc")
    assert llm.encode("def f")


SYNTAX = "{% if x %}"


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"chat_template.jinja": SYNTAX}, "default"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "{{ x | nofilter }}"})}, "default"),
        ({"tokenizer_config.json": json.dumps({"chat_template": [{"name": "rag", "template": SYNTAX}]})}, "rag"),
        ({"additional_chat_templates/tool_use.jinja": SYNTAX}, "tool_use"),
    ],
)
def test_a_template_is_checked_before_loading(
    files: dict[str, str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model, ignore=shutil.ignore_patterns("chat_template*"))
    write(model, files)

    def start(*_: object) -> None:
        raise OctavoError("All was checked.")

    monkeypatch.setattr(serve, "bind", lambda *_: socket.socket())
    monkeypatch.setattr(serve, "serve", start)
    assert main(["serve", str(model)]) == 1
    told = capsys.readouterr().err
    assert f"chat template '{name}': The chat template is not valid jinja (line 1: " in told
    assert "give another with --chat-template" in told
    assert main(["serve", str(model), "--chat-template", "{{ messages }}"]) == 1  # in place of it
    assert "All was checked." in capsys.readouterr().err


def test_flags_are_checked_before_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "template").write_text(SYNTAX)
    (tmp_path / "latin").write_bytes(b"\xe9")
    for given, told in (
        (SYNTAX, "--chat-template: The chat template is not valid jinja (line 1: "),
        (str(tmp_path / "template"), "--chat-template: The chat template is not valid jinja (line 1: "),
        (str(tmp_path / "latin"), "latin is not UTF-8 text"),
        (str(tmp_path), "is no file; give a file, or the template itself"),
        (str(tmp_path / "nowhere"), "there is no such file"),
    ):
        assert main(["serve", "--chat-template", given]) == 1
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--uvicorn-log-level", "nosuch"])
    assert "invalid choice: 'nosuch' (choose from 'critical', 'error', 'warning'" in capsys.readouterr().err


def test_levels_of_the_log_are_uvicorn_s() -> None:
    from uvicorn.config import LOG_LEVELS

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    for level in LOG_LEVELS:
        assert parser.parse_args(["--uvicorn-log-level", level.upper()]).uvicorn_log_level == level


@pytest.fixture
def without_tokenizer(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    (model / "tokenizer.model").write_bytes(b"")
    return model


def test_a_server_without_a_tokenizer_says_so_and_serves_ids(without_tokenizer: Path) -> None:
    import httpx

    server = Server(str(without_tokenizer), "--threads", "1", "--cpu-kv-cache-gib", "0.01")
    try:
        log = "".join(server.log)
        sentence = "has no tokenizer.json, so only prompts of token ids are served"
        assert sentence in log
        assert "make one of its tokenizer.model with transformers" in log
        assert log.index(sentence) < log.index("octavo: loading")
        ids = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=ids).json()["choices"][0]
        llm = LLM(str(MODEL_DIR), cpu_kv_cache_gib=0.01, threads=1)
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        assert answer["token_ids"] == llm.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0].token_ids
        shown = httpx.post(f"{server.url}/v1/completions", json={**ids, "logprobs": 0}).json()["choices"][0]["logprobs"]
        assert shown["tokens"] == [f"token_id:{token}" for token in answer["token_ids"]]
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/completions", {"prompt": [5], "stop": "a"}),
            ("/v1/completions", {"prompt": [5], "guided_choice": ["a"]}),
            ("/v1/completions", {"prompt": [5], "bad_words": ["a"]}),
            ("/v1/completions", {"prompt": [5], "echo": True}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/tokenize", {"prompt": "text"}),
            ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/detokenize", {"tokens": [5]}),
        ):
            response = httpx.post(server.url + path, json=body)
            assert response.status_code == 400, (path, body, response.text)
            assert "tokenizer" in response.json()["error"]["message"], (path, body, response.text)
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        server.stop()


def test_llm_without_a_tokenizer_says_so(without_tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "octavo"):
        llm = LLM(str(without_tokenizer), cpu_kv_cache_gib=0.01, threads=1)
    assert "has no tokenizer.json, so only prompts of token ids are served" in caplog.text
    assert (
        len(llm.generate([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids) == 3
    )
