"""Compiles the C kernels: `python build.py DIRECTORY`. Runs at installation, and again if the sources have changed.

Needs only Python and a C compiler, so an installer can run it before Octavo can be imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["build", "library_name"]

SOURCES = Path(__file__).parent / "csrc"
# No -march: each function declares its target instruction set, and the library dispatches when it is loaded.
FLAGS = ["-O2", "-std=gnu11", "-shared", "-fPIC", "-pthread"]
COMPILERS = ("cc", "gcc", "clang")


def library_name() -> str:
    """The library's file name, with a hash of the sources and flags, so that a stale library is never loaded."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def build(directory: Path, flags: list[str] = FLAGS) -> str | None:
    """Compile into `directory`. Returns None, or the reason why it failed."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return f"no C compiler ({', '.join(COMPILERS)}) was found"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(".so", dir=directory)
    except OSError as error:
        return f"{directory} cannot be written ({error.strerror})"
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *flags, str(SOURCES / "kernels.c"), "-o", temporary, "-lm"], capture_output=True, text=True
        )
        if done.returncode:
            return f"{compiler} refused the kernels ({(done.stderr.strip().splitlines() or ['no message'])[0]})"
        os.chmod(temporary, 0o755)
        os.replace(temporary, directory / library_name())
    finally:
        Path(temporary).unlink(missing_ok=True)
    for old in set(directory.glob("kernels-*.so")) - {directory / library_name()}:
        old.unlink(missing_ok=True)  # a process that has it open keeps it
    return None


if __name__ == "__main__":
    reason = build(Path(sys.argv[1]))
    print(f"CPU kernels: {reason or 'built'}", file=sys.stderr)
    sys.exit(reason is not None)
