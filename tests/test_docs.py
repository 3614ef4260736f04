"""The pages name files, symbols, headings and make targets; all of them exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from octavo.version import __version__

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("octavo/ops/*/*.md")]
NAMED = re.compile(r"`((?:octavo|tests|bench|docs|scripts)/[\w./-]*)(?:::([\w.]+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@cache
def symbols(path: Path) -> set[str]:
    """What a Python file defines, methods as Class.method."""

    def defined(nodes: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in nodes:
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    yield prefix + node.name
                    if isinstance(node, ast.ClassDef):
                        yield from defined(node.body, f"{prefix}{node.name}.")
                case ast.Assign() | ast.AnnAssign():
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        yield from (prefix + n.id for n in ast.walk(target) if isinstance(n, ast.Name))

    return set(defined(ast.parse(path.read_text()).body))


def has(path: Path, symbol: str) -> bool:
    if path.suffix == ".py":
        return symbol in symbols(path)
    return re.search(rf"\b{re.escape(symbol)}\b", path.read_text()) is not None


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    lines = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def missing(page: Path, text: str) -> Iterator[str]:
    for path, symbol in NAMED.findall(text):
        if not (ROOT / path).exists():
            yield f"{page.relative_to(ROOT)}: no file {path}"
        elif symbol and not has(ROOT / path, symbol):
            yield f"{page.relative_to(ROOT)}: {path} has no {symbol}"
    for path, anchor in LINK.findall(FENCED.sub("", text)):
        target = page.parent / path if path else page
        if not target.exists():
            yield f"{page.relative_to(ROOT)}: links to {path}, which is not there"
        elif anchor and anchor not in headings(target):
            yield f"{page.relative_to(ROOT)}: {path or page.name} has no heading #{anchor}"
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for path in re.findall(r"(?<![\w/])(?:tests|scripts|docs)/[\w./-]+", block):
            if not (ROOT / path).exists():
                yield f"{page.relative_to(ROOT)}: a command names {path}, which is not there"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    yield from (
        f"{page.relative_to(ROOT)}: no target make {name}"
        for name in re.findall(r"`make ([\w-]+)", text)
        if name not in targets
    )


def test_what_pages_name_exists() -> None:
    found = [line for page in PAGES for line in missing(page, page.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_what_does_not_exist_is_found() -> None:
    text = "`octavo/gone.py` `octavo/kvcache.py::Gone` `octavo/kvcache.py::Field.gone` `make gone`"
    text += " [a](gone.md) [b](docs/models.md#gone)\n```sh\npytest tests/gone.py tests/ops\n```\n"
    fine = (
        "`octavo/kvcache.py::Field.nbytes` `octavo/ops/hopper/csrc/ptx.cuh::narrow` [a](docs/models.md#packed-int4) `make test`"
    )
    assert len(list(missing(ROOT / "README.md", f"{text} {fine}"))) == 7


def test_a_fresh_reader_of_the_architecture_finds_by_name() -> None:
    """Where a decode step's KV write, a stop string, and the file format of a scale live."""
    page = (ROOT / "docs/architecture.md").read_text()
    for name in (
        "octavo/ops/triton/rope.py::rope_write_kv",
        "octavo/ops/hopper/csrc/decode_attention.cuh::store_key",
        "octavo/text/detokenizer.py::Detokenizer",
        "octavo/quant/formats.py",
    ):
        assert f"`{name}`" in page
    steps = re.search(r"## The life of a request\n(.*?)\n## ", page, re.DOTALL)
    assert steps is not None
    numbered = re.split(r"^\d\. ", steps[1], flags=re.MULTILINE)[1:]
    assert len(numbered) == 8
    assert all("::" in step for step in numbered), "each step names a file and what is in it"


def test_the_changelog_begins_with_this_version_and_its_date() -> None:
    first = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == "Unreleased" or re.fullmatch(rf"{re.escape(__version__)} \(\d{{4}}-\d\d-\d\d\)", first[1])
