"""A name of the hub becomes a directory: what is fetched and what is not, again, interrupted, offline and from the cache."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub.hub_server import TOKEN, Hub, Repo, etag_of
from huggingface_hub import constants, file_download
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from server.processes import hear_ctrl_c

from octavo.errors import OctavoError
from octavo.hub import download
from octavo.hub.download import fetch
from octavo.hub.snapshots import is_hub_name

NAME = "an-org/a-model"
RANDOM = random.Random(0)
SHARDS = {f"model-0000{n}-of-00003.safetensors": RANDOM.randbytes(300_000 + n) for n in (1, 2, 3)}
INDEX = json.dumps({"weight_map": {f"tensor.{n}": name for n, name in enumerate(SHARDS)}}).encode()
TEXTS = {
    "config.json": b"{}", "generation_config.json": b'{"x": 0}', "tokenizer.json": b'{"x": 1}', "tokenizer_config.json": b"{ }",
    "tiktoken.model": b"abc", "chat_template.jinja": b"{{ x }}", "additional_chat_templates/rag.jinja": b"{{ y }}",
    "preprocessor_config.json": b"{  }", "model.safetensors.index.json": INDEX,
}  # fmt: skip
LEFT = {
    "README.md": b"#", "pytorch_model.bin": b"pickle", "pytorch_model.bin.index.json": b"{}", "modeling_own.py": b"import os",
    "original/consolidated.00.pth": b"pickle", "consolidated.safetensors": b"twice", "model.Q4_K_M.gguf": b"GGUF",
    "model-00004-of-00004.safetensors": b"of another time", "onnx/model.onnx": b"x", "vae/model.safetensors": b"x",
}  # fmt: skip
WHOLE = {**TEXTS, **SHARDS}


def get(revision: str | None = None, *, weights: bool = True, where: str | None = None, name: str = NAME) -> Path:
    return fetch(name, revision, where, weights=weights, tell=lambda *_: None, say=lambda _: None)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def repo(hub: Hub) -> Repo:
    hub.repos[NAME] = Repo(WHOLE | LEFT)
    return hub.repos[NAME]


def test_what_a_start_reads_is_fetched_and_nothing_else(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    stages: list[tuple[str, float, str]] = []
    found = fetch(NAME, None, None, weights=True, tell=lambda *stage: stages.append(stage), say=lambda _: None)
    assert contents(found) == WHOLE
    assert found.parent == tmp_path / "cache/models--an-org--a-model/snapshots"
    assert list(dict.fromkeys(stage for stage, _, _ in stages)) == [
        f"downloading config and tokenizer of {NAME}", f"downloading the weights of {NAME}"
    ]  # fmt: skip
    assert stages[-1][1:] == (1.0, "900.0 kB of 900.0 kB")
    parts = [part for stage, part, _ in stages if "weights" in stage]
    assert parts == sorted(parts)
    assert hub.sent() == sum(map(len, WHOLE.values()))


WEIGHTS = {
    "the sole file": ({"model.safetensors": b"w", "consolidated.safetensors": b"twice"}, ["model.safetensors"]),
    "the sole file beside numbered ones": ({"model.safetensors": b"w", "b.safetensors": b"x"}, ["model.safetensors"]),
    "files without an index": (
        {"a.safetensors": b"w", "b.safetensors": b"x", "adapter_model.safetensors": b"y"},
        ["a.safetensors", "b.safetensors"],
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_without_an_index(case: str, hub: Hub) -> None:
    files, wanted = WEIGHTS[case]
    hub.repos[NAME] = Repo({"config.json": b"{}", **files})
    assert sorted(contents(get())) == sorted(["config.json", *wanted])


def test_made_up_weights_need_no_files(hub: Hub, repo: Repo) -> None:
    assert contents(get(weights=False)) == TEXTS
    assert contents(get()) == WHOLE  # and what they had is no obstacle to the real ones


def test_a_second_start_asks_once_and_fetches_what_changed(hub: Hub, repo: Repo) -> None:
    first = get()
    hub.requests.clear()
    assert get() == first
    assert [request.path for request in hub.requests] == [f"/api/models/{NAME}"]
    changed = "model-00002-of-00003.safetensors"
    repo.files = WHOLE | {changed: b"w" * 1000}
    hub.requests.clear()
    second = get()
    assert second != first
    assert contents(second) == dict(repo.files)
    assert hub.sent(".safetensors") == 1000
    assert get("main") == second


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.revisions["v1"] = WHOLE | {"config.json": b'{"v": 1}'}
    found = get("v1")
    assert (found / "config.json").read_bytes() == b'{"v": 1}'
    hub.requests.clear()
    assert get(found.name) == found
    assert not hub.requests  # a commit does not change
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get("v1") == found
    assert get() == found  # the only one
    with pytest.raises(OctavoError, match=r"HF_HUB_OFFLINE is set, and .* does not hold all files of revision main of"):
        get("main")


def test_download_dir_is_a_cache(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    assert get(where=str(tmp_path / "else")).is_relative_to(tmp_path / "else/models--an-org--a-model/snapshots")
    assert not (tmp_path / "cache").exists()


def test_offline_starts_take_whole_snapshots_alone(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    found = get()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert get() == found
    (found / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(OctavoError, match=f"unset it, or download them with `hf download {NAME}`"):
        get()
    assert not hub.requests


@pytest.mark.parametrize("how", ["nobody listens", "the hub is down", "access was withdrawn"])
def test_what_was_downloaded_serves_where_the_hub_does_not(
    how: str, hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = get(), list[str]()
    if how == "nobody listens":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif how == "the hub is down":
        hub.status = 503
    else:
        repo.private = True
    assert fetch(NAME, None, None, weights=True, tell=lambda *_: None, say=said.append) == found
    assert len(said) == 1
    assert f"Going on with {found}, which was downloaded before." in said[0]


def test_a_read_only_cache_serves(hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = get()
    (tmp_path / "cache/models--an-org--a-model/refs/main").unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # whoever runs this may be root, who may write everywhere
    assert get() == found


def test_a_broken_connection_goes_on_where_it_stopped(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # of the library between two tries
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # what is written at a time
    hub.cut_after = 200_000
    assert contents(get()) == WHOLE
    assert hub.sent(".safetensors") == sum(map(len, SHARDS.values()))
    assert {request.range for request in hub.asked("GET", ".safetensors")} == {None, "bytes=200000-"}


def test_what_xet_stores_is_left_to_the_library(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own reports of progress are counted; Xet itself is not here, and is replaced."""
    hub.has_xet = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(download, "find_spec", lambda name: object())
    monkeypatch.setattr(file_download, "is_xet_available", lambda: True)
    stored = {etag_of(name, content): content for name, content in WHOLE.items()}

    def xet_get(*, incomplete_path: Path, xet_file_data: Any, expected_size: int, tqdm_class: type, **_: Any) -> None:
        with XetDownloadProgressReporter(
            reconstruction_desc="", total=expected_size, log_level=30, tqdm_class=tqdm_class
        ) as reporter:
            for part in (0.5, 1):
                reporter.update_progress(
                    SimpleNamespace(
                        total_bytes=expected_size,
                        total_bytes_completed=int(expected_size * part),
                        total_bytes_completion_rate=1.0,
                        total_transfer_bytes_completed=int(expected_size * part / 2),
                        total_transfer_bytes_completion_rate=1.0,
                    )
                )
        incomplete_path.write_bytes(stored[xet_file_data.file_hash])

    monkeypatch.setattr(file_download, "xet_get", xet_get)
    stages: list[str] = []
    found = fetch(NAME, None, None, weights=True, tell=lambda *stage: stages.append(stage[2]), say=lambda _: None)
    assert contents(found) == WHOLE
    assert stages[-1] == "900.0 kB of 900.0 kB"
    assert not hub.sent(".safetensors")


def start(hub: Hub, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A download in a process of its own, which takes the hub from its environment and writes 50 kB at a time."""
    code = (
        "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 50_000\n"
        "from octavo.hub.download import fetch\n"
        f"fetch({NAME!r}, None, None, weights=True, tell=lambda *_: None, say=print)"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL, preexec_fn=hear_ctrl_c)


def wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_an_interrupted_download_goes_on(number: signal.Signals, hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.stall_after = 220_000
    blobs = tmp_path / "cache/models--an-org--a-model/blobs"
    process = start(hub, tmp_path)
    parts = f"{'?' * 64}.incomplete"  # of weights
    wait_for(process, lambda: len(list(blobs.glob(parts))) == len(SHARDS))
    wait_for(process, lambda: all(path.stat().st_size >= 200_000 for path in blobs.glob(parts)))
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) != 0
    assert time.monotonic() - began < 5  # nobody waits for the end of a file
    there = {path.stem: path.stat().st_size for path in blobs.glob(parts)}
    assert len(there) == len(SHARDS)
    hub.stall_after = None
    hub.requests.clear()
    assert contents(get()) == WHOLE
    whole = sum(map(len, SHARDS.values()))
    assert hub.sent(".safetensors") == whole - sum(there.values())
    assert not list(blobs.glob("*.incomplete"))


def left_over(tmp_path: Path, hub: Hub, content: bytes) -> Path:
    """What an interrupted download of the first shard left."""
    name, whole = next(iter(SHARDS.items()))
    blobs = tmp_path / "cache/models--an-org--a-model/blobs"
    blobs.mkdir(parents=True)
    (part := blobs / f"{etag_of(name, whole)}.incomplete").write_bytes(content)
    return part


def test_a_part_that_is_not_the_file_s_is_found_out(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    part = left_over(tmp_path, hub, bytes(1000))
    with pytest.raises(OctavoError, match=r"model-00001-of-00003.safetensors of an-org/a-model was damaged .* start again"):
        get()
    assert not part.exists()
    assert contents(get()) == WHOLE


PARTS = {"all of it": lambda whole: whole, "more than all": lambda whole: whole + b"x", "none": lambda whole: b""}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_any_length_go_on(case: str, hub: Hub, repo: Repo, tmp_path: Path) -> None:
    left_over(tmp_path, hub, PARTS[case](next(iter(SHARDS.values()))))
    assert contents(get()) == WHOLE


def test_a_server_that_takes_no_ranges_sends_all(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.takes_ranges = False
    left_over(tmp_path, hub, next(iter(SHARDS.values()))[:1000])
    assert contents(get()) == WHOLE


def test_what_killed_downloads_left_is_removed_in_the_end(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    part = left_over(tmp_path, hub, b"")
    old, live = part.with_name("0" * 64 + ".1234abcd.incomplete"), part.with_name("1" * 64 + ".incomplete")
    old.write_bytes(b"x")
    live.write_bytes(b"x")
    os.utime(old, (0, 0))
    get()
    assert not old.exists()
    assert live.exists()


def test_two_starts_at_once_share_a_download(hub: Hub, repo: Repo) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get())) for _ in range(2)]
    hub.bytes_a_second = 1_500_000
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert contents(found[0]) == WHOLE
    assert hub.sent(".safetensors") == sum(map(len, SHARDS.values()))


def test_a_token_goes_to_the_hub_and_to_no_other_host(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.gated = repo.private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert contents(get()) == WHOLE
    elsewhere = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert elsewhere
    assert all(request.authorization is None for request in elsewhere)
    assert all(request.authorization == f"Bearer {TOKEN}" for request in hub.requests if request not in elsewhere)


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "an-org/here").mkdir(parents=True)
    for name in (NAME, "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-0.6B", "a_b/c.d-e_f"):
        assert is_hub_name(name), name
    for other in (
        "an-org/here", "gpt2", "a/b/c", "./a/b", "../a", "/a/b", "~/a", "a/", "/a", "a/b--c", "a/..", "a b/c", "a/b:8000",
        "http://a/b", "", "-a/b", "a/" + "b" * 100, "é/a",
    ):  # fmt: skip
        assert not is_hub_name(other), other
