"""Shows what the tests catch: applies one small defect at a time to a copy of the tree and runs the tests that should see it.

    python scripts/mutants.py                              # every table of scripts/mutants/
    python scripts/mutants.py ops --only "causal|head"     # one table, and of it the mutants whose names match
    python scripts/mutants.py ops --tests-of v0.1.0        # the tests as another commit has them

A table is a TOML file of [[mutant]] entries: `name` says what is wrong, `file` where; `old`, which occurs there once, becomes
`new`; `tests` are arguments of pytest. The working tree is only read. The exit status is the number of mutants that survived
or could not be tried, 99 at most.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLES = Path(__file__).resolve().with_suffix("")
SECONDS = 1800  # for the tests of one mutant: one that never ends is caught


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: list[str]


def read(table: Path) -> list[Mutant]:
    return [Mutant(**entry) for entry in tomllib.loads(table.read_text())["mutant"]]


def copy_tree(to: Path, tests_of: str | None) -> None:
    """What git knows or would add, and the compiled kernels; tests/ of another commit if one is given."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in [*filter(None, listed.stdout.decode().split("\0")), *map(str, ROOT.glob("octavo/ops/cpu/kernels-*.so"))]:
        source, relative = ROOT / name, Path(name).relative_to(ROOT) if name.startswith("/") else Path(name)
        if not source.exists() or (tests_of is not None and relative.parts[0] == "tests"):
            continue
        (to / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, to / relative)
    if tests_of is not None:
        packed = subprocess.run(["git", "archive", tests_of, "tests"], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(to, filter="data")


def run(tests: list[str], tree: Path) -> tuple[int, str]:
    """pytest's exit status (1: a test failed; -1: time ran out) and the first line that says what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return -1, "it took too long"
    failed = re.search(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    return done.returncode, failed[1][:160] if failed else done.stdout.strip()[-300:]


def try_one(mutant: Mutant, tree: Path) -> bool:
    """Whether it is caught; prints which test did it."""
    file = tree / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        print(f"stale     {mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.file}", flush=True)
        return False
    kept = {path: path.read_bytes() for path in (tree / "octavo/ops/cpu").glob("kernels-*.so")}
    file.write_text(text.replace(mutant.old, mutant.new))
    start = time.monotonic()
    try:
        status, told = run(mutant.tests, tree)
    finally:
        file.write_text(text)
        for path, library in kept.items():  # building another one has removed it
            path.write_bytes(library)
    verdict = {1: "caught", -1: "caught", 0: "SURVIVED"}.get(status, "broken")
    print(f"{verdict:9} {mutant.name} ({time.monotonic() - start:.0f} s)" + f": {told}" * (status != 0), flush=True)
    return verdict == "caught"


def main() -> int:
    known = {path.stem: path for path in sorted(TABLES.glob("*.toml"))}
    parser = argparse.ArgumentParser(description="Which small defects the tests catch.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(known)}; all of them by default")
    parser.add_argument("--only", default="", metavar="REGEX", help="mutants whose names match")
    parser.add_argument("--tests-of", metavar="COMMIT", help="take tests/ from this commit")
    given = parser.parse_args()
    if unknown := set(given.tables) - set(known):
        parser.error(f"no table is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    mutants = [m for name in given.tables or known for m in read(known[name]) if re.search(given.only, m.name)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        tree = Path(directory)
        copy_tree(tree, given.tests_of)
        caught = sum(try_one(mutant, tree) for mutant in mutants)
    print(f"{caught} of {len(mutants)} caught")
    return min(len(mutants) - caught, 99)


if __name__ == "__main__":
    sys.exit(main())
