"""What the hub, the network and the disk refuse, in one sentence each that says what to do; nothing is left half-done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cases import cases
from hub.hub_server import TOKEN, Hub, Repo
from huggingface_hub import constants

from octavo.cli import main
from octavo.hub import download

NAME = "an-org/a-model"
WHOLE = {"config.json": b"{}", "model.safetensors": b"w" * 100_000}
BASED = {"cardData": {"base_model": "an-org/the-base"}}


class Refusal(NamedTuple):
    """told: what the sentence says. token: of HF_TOKEN. set: changes the hub."""

    told: tuple[str, ...]
    repo: Repo | None = None
    token: str | None = None
    revision: str | None = None
    set: Callable[[Hub], Any] = lambda hub: None


def cut_for_ever(hub: Hub) -> None:
    hub.cut_after = 0


REFUSALS = {
    "missing": Refusal(
        ("There is no directory an-org/a-model here, and no model of that name on http", "log in with `hf auth login`")
    ),
    "missing, logged in": Refusal(("no model of that name", "if it is private, use a token that may read it"), token=TOKEN),
    "private": Refusal(("no model of that name", "set HF_TOKEN, if it is private"), Repo(WHOLE, private=True)),
    "gated": Refusal(("an-org/a-model is gated", "ask for it at http", "then log in with `hf auth login`, or set HF_TOKEN"),
                     Repo(WHOLE, gated=True)),
    "a wrong token": Refusal(("The hub does not know your token", "`hf auth login`"), Repo(WHOLE), token="hf_wrong"),
    "no such revision": Refusal(("has no revision 'v9'; give a branch, a tag or a whole commit",), Repo(WHOLE), revision="v9"),
    "pickles": Refusal(("an-org/a-model holds pickled weights (.bin), which can run code", "that has safetensors."),
                       Repo({"config.json": b"{}", "pytorch_model.bin": b"x"})),
    "GGUF": Refusal(("holds weights in llama.cpp's format (.gguf)", "an-org/the-base is what it was made of, says its owner."),
                    Repo({"a.Q4_K_M.gguf": b"x", "config.json": b"{}"}, extra=BASED)),
    "an adapter": Refusal(("is a LoRA adapter", "an-org/the-base is what it was made of"),
                          Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, extra=BASED)),
    "no model": Refusal(("has no config.json, so it is no checkpoint",), Repo({"README.md": b"x"})),
    "no weights": Refusal(("has no safetensors files",), Repo({"config.json": b"{}", "README.md": b"x"})),
    "an index of what is not there": Refusal(
        ("model.safetensors.index.json names b.safetensors, which the repository does not hold",),
        Repo(WHOLE | {"model.safetensors.index.json": json.dumps({"weight_map": {"x": "b.safetensors"}}).encode()}),
    ),
    "an index of what is elsewhere": Refusal(
        ("names ../x.safetensors, which the repository does not hold",),
        Repo(
            WHOLE
            | {"../x.safetensors": b"x"}
            | {"model.safetensors.index.json": json.dumps({"weight_map": {"x": "../x.safetensors"}}).encode()}
        ),
    ),
    "an index that is none": Refusal(("is not a safetensors index",), Repo(WHOLE | {"model.safetensors.index.json": b"{}"})),
    "the hub is down": Refusal(("could not serve an-org/a-model (503 Service Unavailable); start again later",), Repo(WHOLE),
                               set=lambda hub: setattr(hub, "status", 503)),
    "too many requests": Refusal(("too many requests from here (429)", "wait some minutes"), Repo(WHOLE),
                                 set=lambda hub: setattr(hub, "status", 429)),
    "no network": Refusal(("http://127.0.0.1:9 was asked for an-org/a-model, and that failed", "see to the network"),
                          set=lambda hub: setattr(constants, "ENDPOINT", "http://127.0.0.1:9")),
    "no hub": Refusal(("was asked for an-org/a-model, and that failed",), Repo(WHOLE), set=cut_for_ever),
    "offline": Refusal(("HF_HUB_OFFLINE is set, and", "does not hold all files of an-org/a-model; unset it", "`hf download"),
                       Repo(WHOLE), set=lambda hub: setattr(constants, "HF_HUB_OFFLINE", True)),
    "a commit that is none": Refusal(("does not answer as the hub does",), Repo(WHOLE, extra={"sha": "../../x"})),
}  # fmt: skip


@cases("case", REFUSALS)
def test_one_sentence_says_what_to_do(
    case: str, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusal = REFUSALS[case]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))  # all cases share the hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr("time.sleep", lambda _: None)  # of the library between tries
    hub.repos, hub.status, hub.cut_after = {} if refusal.repo is None else {NAME: refusal.repo}, None, None
    if refusal.token is not None:
        monkeypatch.setenv("HF_TOKEN", refusal.token)
    refusal.set(hub)
    revision = ["--revision", refusal.revision] if refusal.revision else []
    assert main(["quantize", NAME, *revision, "-o", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err.splitlines()
    sentence = told[-1]
    assert sentence.startswith("octavo: ")
    assert all(part in sentence for part in refusal.told), sentence
    assert sentence.endswith(".")
    assert all(line.startswith(("octavo: downloading", "Error while", "Trying")) for line in told[:-1] if case != "no hub"), (
        told
    )
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_disk_that_is_too_small_is_found_before_the_download(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.repos[NAME] = Repo(WHOLE)
    usage = shutil.disk_usage(tmp_path)._replace(free=99_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(["quantize", NAME, "-o", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert f"an-org/a-model takes 100.0 kB more in {tmp_path}/cache, where 99.0 kB are free; free some space, or give" in told
    assert not hub.sent(".safetensors")


@pytest.mark.parametrize(
    ("number", "told"),
    [(28, "is full; free some space, or give another --download-dir. What was downloaded is kept."),
     (13, "cannot be written (Permission denied); give another --download-dir, or set HF_HOME.")],
)  # fmt: skip
def test_a_disk_that_refuses(
    number: int, told: str, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.repos[NAME] = Repo(WHOLE)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(download, "http_get", refuse)
    assert main(["quantize", NAME, "-o", str(tmp_path / "out")]) == 1
    assert told in capsys.readouterr().err


def test_flags_that_name_no_model_of_the_hub(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, told in (
        (["gpt2"], "there is no model at 'gpt2'; give the path of a checkpoint directory, or a name of the hub (OWNER/NAME)."),
        (["a/b/c"], "there is no model at 'a/b/c'"),
        (["--revision", "v1"], "--revision is for a name of the hub; give that too, or leave it out."),
        ([".", "--revision", "v1"], "and . is a directory, which has no revisions; leave it out."),
        ([".", "--download-dir", "there"], "--download-dir has no effect: . is no name of the hub, so nothing is downloaded."),
    ):
        assert main(["serve", *given]) == 1
        assert told in capsys.readouterr().err
