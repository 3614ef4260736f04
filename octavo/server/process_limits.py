"""Limits of the server process: open files, freed memory that it keeps, and how often it looks for garbage."""

from __future__ import annotations

import gc
import resource
from contextlib import suppress

from octavo import host
from octavo.errors import OctavoError

__all__ = ["collect_rarely", "set_limits"]

FEWEST_FILES, MAX_FILES = 64, 65536  # a server and its engine need about twenty
YOUNG = 20_000  # objects more than were freed, after which the collector runs: a step of 256 requests makes over a thousand
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


def collect_rarely() -> None:
    """Has the garbage collector pass over all objects that are there now, which live as long as the server, and run less often:
    it took an eighth of a busy server's time, and what tokens and requests leave is freed without it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG)
