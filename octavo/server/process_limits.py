"""What the server's process may open, and may keep."""

from __future__ import annotations

import resource
from contextlib import suppress

from octavo import host
from octavo.errors import OctavoError

__all__ = ["set_limits"]

FEWEST_FILES, MOST_FILES = 64, 65536  # a server and its engine open some twenty
KEPT = 2**20  # bytes; glibc would learn from one huge request to keep that much in each thread


def set_limits() -> None:
    """Lets this process open as many files as it is allowed to, each connection being one, and keep little freed memory.

    Raises OctavoError if those files are too few for a server.
    """
    host.keep(KEPT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft < most:
        with suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft < FEWEST_FILES:
        raise OctavoError(f"Only {soft} files may be open at once, and a server needs {FEWEST_FILES}; raise it (ulimit -n).")
