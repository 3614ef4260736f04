"""How many files this process may open: each connection is one."""

from __future__ import annotations

import resource
from contextlib import suppress

from octavo.errors import OctavoError

__all__ = ["raise_file_limit"]

FEWEST_FILES, MOST_FILES = 64, 65536  # a server and its engine open some twenty


def raise_file_limit() -> None:
    """Lets this process open as many files as it is allowed to. Raises OctavoError if those are too few for a server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft < most:
        with suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft < FEWEST_FILES:
        raise OctavoError(f"Only {soft} files may be open at once, and a server needs {FEWEST_FILES}; raise it (ulimit -n).")
