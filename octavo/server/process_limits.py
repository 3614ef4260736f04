"""Limits of the server process: open files, and freed memory that it keeps."""

from __future__ import annotations

import resource
from contextlib import suppress

from octavo import host
from octavo.errors import OctavoError

__all__ = ["set_limits"]

FEWEST_FILES, MAX_FILES = 64, 65536  # a server and its engine need about twenty
KEPT = 2**20  # bytes; after one huge request glibc would keep that much in each thread


def set_limits() -> None:
    """Raises this process's limit of open files, since each connection is one, and limits the freed memory that it keeps.

    Raises OctavoError if the file limit is too low for a server.
    """
    host.keep(KEPT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft < most:
        with suppress(OSError, ValueError):  # some systems allow less than their hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft < FEWEST_FILES:
        raise OctavoError(f"Only {soft} files may be open at once, and a server needs {FEWEST_FILES}; raise it (ulimit -n).")
