"""What the hub, the network or the disk refuse, in one sentence each that says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from octavo.errors import OctavoError

__all__ = ["NoRevision", "amount", "no_space", "not_in_cache", "refusal_of"]

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class NoRevision(OctavoError):
    """The hub has the model, and not the revision; what the cache holds under it is out of date."""


def amount(nbytes: float) -> str:
    """A size in bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def refusal_of(error: Exception, name: str, revision: str | None, cache: Path) -> OctavoError:
    """The sentence for an error of huggingface_hub or the system, met while `name` was looked up or downloaded to `cache`."""
    if isinstance(error, OctavoError):
        return error
    if isinstance(error, RevisionNotFoundError):
        page = f"{constants.ENDPOINT}/{name}"
        return NoRevision(f"{name} has no revision '{revision or 'main'}'; give a branch, a tag or a whole commit of {page}.")
    if isinstance(error, HfHubHTTPError):
        return OctavoError(_of_answer(error, name))
    if isinstance(error, OfflineModeIsEnabled):
        return not_in_cache(name, revision, cache)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return OctavoError(
            f"The disk of {cache} is full; free some space, or give another --download-dir. What was downloaded is kept."
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OctavoError(f"{cache} cannot be written ({os.strerror(number)}); give another --download-dir, or set HF_HOME.")
    cause = error.__cause__ if isinstance(error, EntryNotFoundError) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, HfHubHTTPError):
        return OctavoError(_of_answer(cause, name))
    said = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
    return OctavoError(
        f"{constants.ENDPOINT} was asked for {name}, and that failed ({said}); see to the network or HF_ENDPOINT and start "
        "again, or give the directory of a checkpoint."
    )


def _of_answer(error: HfHubHTTPError, name: str) -> str:
    page, known = f"{constants.ENDPOINT}/{name}", get_token() is not None
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        then = f"then {LOG_IN}" if not known else "with the account of your token (HF_TOKEN, or `hf auth whoami`)"
        return f"{name} is gated: its owner must grant you access; ask for it at {page}, {then}."
    if status == 401 and "Invalid credentials" in f"{error.response.headers.get('X-Error-Message')} {error.server_message}":
        return f"The hub does not know your token; set HF_TOKEN to a valid one, or log in with `hf auth login`, to read {name}."
    if isinstance(error, RepositoryNotFoundError) or status == 404 or (status == 401 and not known):
        private = f"{LOG_IN}, if it is private" if not known else "if it is private, use a token that may read it"
        return (
            f"There is no directory {name} here, and no model of that name on {constants.ENDPOINT}; check its spelling, or "
            f"{private}."
        )
    if status in (401, 403):
        return f"The hub denies access to {name} ({status}); ask for it at {page}, or {LOG_IN} with an account that has it."
    if status == 429:
        return f"The hub has had too many requests from here (429) to serve {name} now; wait some minutes, or {LOG_IN}."
    said = f"{status} {error.response.reason_phrase}".strip()
    return f"The hub could not serve {name} ({said}); start again later: what was downloaded is kept."


def not_in_cache(name: str, revision: str | None, cache: Path) -> OctavoError:
    """The sentence for a start without network of what the cache does not hold."""
    which = f"revision {revision} of {name}" if revision is not None else name
    return OctavoError(
        f"HF_HUB_OFFLINE is set, and {cache} does not hold all files of {which}; unset it, or download them with "
        f"`hf download {name}` where there is a network."
    )


def no_space(name: str, wanted: int, free: int, cache: Path) -> OctavoError:
    """The sentence for a disk that is too small, before anything is downloaded to it."""
    return OctavoError(
        f"{name} takes {amount(wanted)} more in {cache}, where {amount(free)} are free; free some space, or give another "
        "--download-dir."
    )
