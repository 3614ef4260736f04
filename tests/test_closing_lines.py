"""What `make test` says last: why tests were skipped, and then pytest's own line, which machines read."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from conftest import pytest_terminal_summary

import octavo

TESTS = """
import pytest

@pytest.mark.skipif(True, reason="needs a moon")
@pytest.mark.parametrize("n", range(3))
def test_of_three(n): pass

def test_inside():
    pytest.skip("needs a sun:\\n  there is none")

def test_passes(): pass
"""


def closing_lines(place: Path, text: str) -> list[str]:
    (place / "test_some.py").write_text(text)
    root = Path(octavo.__file__).parents[1]
    path = [str(root), str(root / "tests")]
    code = f"import sys; sys.path[:0] = {path!r}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        "-q",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(place),
        str(place),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=place)
    return done.stdout.splitlines()[-2:]


def test_why_what_is_skipped_was_skipped(tmp_path: Path) -> None:
    why, last = closing_lines(tmp_path, TESTS)
    assert why == "skipped: 3 × needs a moon; 1 × needs a sun: there is none"
    assert re.fullmatch(r"1 passed, 4 skipped in [0-9.]+s", last)


def test_nothing_is_said_where_nothing_was_skipped() -> None:
    said: list[str] = []
    pytest_terminal_summary(SimpleNamespace(stats={"passed": [object()]}, write_line=said.append))  # type: ignore[arg-type]
    assert said == []


def reasons(path: Path) -> list[str]:
    """How the reason of each skip in a file begins; empty where there is none, or pytest's own."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name in (
            "pytest.mark.skipif",
            "pytest.mark.skip",
            "pytest.skip",
            "pytest.importorskip",
        ):
            reason = next((keyword.value for keyword in node.keywords if keyword.arg == "reason"), None)
            if name == "pytest.skip" and node.args:
                reason = node.args[0]
            found.append("" if reason is None else ast.unparse(reason).lstrip("f").strip("\"'"))
    return found


def test_reasons_are_whole() -> None:
    """Each says what a machine needs for the test."""
    written = {path: reasons(path) for path in Path(__file__).parent.rglob("*.py")}
    assert sum(map(len, written.values())) > 25
    assert [(path, told) for path, all_of_it in written.items() for told in all_of_it if not told.startswith("needs ")] == []
