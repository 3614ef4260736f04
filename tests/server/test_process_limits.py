"""Starting where few files may be open."""

from __future__ import annotations

import resource
import subprocess
import sys

from cases import cases
from server.processes import free_port


def limited(*command: str, soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )


@cases("limit", [10, 12, 16, 20, 63])
def test_too_few_files_are_told_in_a_sentence(limit: int) -> None:
    done = limited("-m", "octavo.cli", "serve", "--port", str(free_port()), soft=limit, hard=limit)
    assert done.returncode == 1
    told = f"octavo: Only {limit} files may be open at once, and a server needs 64; raise it (ulimit -n).\n"
    assert (done.stdout, done.stderr) == ("", told)


def test_the_limit_is_raised_as_far_as_it_may() -> None:
    code = (
        "import resource; from octavo.server.process_limits import set_limits; set_limits(); "
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert limited("-c", code, soft=16, hard=512).stdout == "512 512\n"
