"""Every command of the pages for users is run, on a small model: what a page says is done or refused is done or refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from server.processes import Server

from octavo.demo import HELDOUT, MODEL_DIR
from octavo.hub.snapshots import is_hub_name
from octavo.models import MODEL_TYPES

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/accuracy.md", "docs/memory.md", "docs/fp8-quantization.md"]
OCTAVO = [sys.executable, "-m", "octavo.cli"]
# Less than a person would measure.
FEWER = {"compare": ["--tokens", "600"], "compare --output": ["--scheme", "fp8", "--kv", "fp8"], "bench": ["--repeats", "1"]}


class Block(NamedTuple):
    """Commands of a page that follow one another, a line each."""

    page: str
    lines: list[str]


def blocks(language: str) -> Iterator[Block]:
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
            yield Block(
                page, [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
            )


SHELL = list(blocks("sh"))


def run(words: list[str], place: Path, code: int = 0, given: str = "") -> str:
    """What a command prints."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "COLUMNS": "160"}
    done = subprocess.run(words, cwd=place, env=env, input=given, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, as one that was made for long contexts."""
    directory = tmp_path_factory.mktemp("readme") / "model"
    shutil.copytree(MODEL_DIR, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131072}))
    return directory


class Person:
    """Who types the commands of one block, in one directory. A server that was started stays until the next one is."""

    def __init__(self, page: str, place: Path, model: Path):
        self.page, self.place, self.model = page, place, model
        self.server: Server | None = None

    def words(self, command: str) -> list[str]:
        """Of a command line, with the small model for any other, of this machine or the hub, and a text for FILE."""
        known = {"MODEL": str(self.model), "FILE": str(HELDOUT)}
        given = shlex.split(command, comments=True)
        return [str(self.model) if word.startswith("./") or is_hub_name(word) else known.get(word, word) for word in given]

    def type(self, command: str) -> None:
        for part in command.split(" && "):
            name, *rest = self.words(part)
            getattr(self, f"_{name}")(*rest)

    def _make(self, target: str) -> None:
        """Not made: that would be a test in a test. What would be run is read, and `make demo`'s server is started."""
        lines = run(["make", "-n", "-C", str(ROOT), target], self.place).splitlines()
        commands = [shlex.split(line.removeprefix("exec ")) for line in lines]
        if target == "demo":
            (serve,) = [words for words in commands if words[0].endswith("/octavo")]
            self._octavo(*serve[1:])
            assert self.server is not None
            self.server.wait_for("A first completion")
            self.server.wait_for("curl http://localhost:")
        else:
            assert any(words[1:3] == ["-m", "pytest"] for words in commands)

    def _pip(self, *words: str) -> None:
        """As far as it needs no network: the package's own metadata are made."""
        options = ["--dry-run", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--ignore-installed"]
        assert "Would install octavo-" in run([sys.executable, "-m", "pip", *words, *options], ROOT)

    def _docker(self, command: str, *words: str) -> None:
        """What follows the image's name goes to its entry point, `octavo serve`; there is no container here."""
        image = next(place for place, word in enumerate(words) if word.startswith("octavo:"))
        assert (ROOT / "docker" / f"{words[image].removeprefix('octavo:')}.Dockerfile").exists()
        assert command == "run"
        self._serve(*words[image + 1 :])

    def _curl(self, *words: str) -> None:
        if shutil.which("curl") is None:
            pytest.skip("needs curl")
        assert self.server is not None
        told = run(["curl", "-sS", *(word.replace("localhost:8000", self.server.url) for word in words)], self.place)
        assert json.loads(told)["choices"][0]["text"]

    def _octavo(self, command: str, *words: str) -> None:
        if command == "serve":
            self._serve(*words)
        elif command == "chat":
            served = self.server or Server()
            try:
                assert run([*OCTAVO, "chat", *words, served.url], self.place, given="Hello\n")
            finally:
                served.stop()
        else:
            fewer = [*FEWER.get(command, []), *(FEWER["compare --output"] if "--output" in words else [])]
            assert run([*OCTAVO, command, *words, *fewer], self.place)

    def _serve(self, *words: str) -> None:
        self.leave()
        files = {str(path.relative_to(self.place)): str(path) for path in self.place.rglob("*")}
        given = [files.get(word, word) for word in words]
        if "--tensor-parallel-size" in words:
            given = self._over_ranks(given)
        self.server = Server(*given)

    def _over_ranks(self, words: list[str]) -> list[str]:
        """With a model of eight heads; over two ranks alone, which is quicker."""
        config = json.loads((self.model / "config.json").read_text())
        wide = self.place / "wide"
        shutil.copytree(self.model, wide)
        heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=32)  # the same matrices
        (wide / "config.json").write_text(json.dumps(config | heads))
        return [{"8": "2", str(self.model): str(wide)}.get(word, word) for word in words]

    def leave(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}: {' '.join(block.lines[0].split()[:3])}")
def test_the_commands_of_the_pages(block: Block, model: Path, tmp_path: Path) -> None:
    person = Person(block.page, tmp_path, model)
    try:
        for line in block.lines:
            person.type(line)
    finally:
        person.leave()


def test_the_python_of_the_pages(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("python")
    exec("\n".join(block.lines).replace("path/to/checkpoint", str(model)), {})
    assert capsys.readouterr().out.strip()


def test_each_architecture_that_is_served_has_its_row() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(MODEL_TYPES) <= set(re.findall(r"`(\w+)`", " ".join(rows)))
