"""A name of the hub -> the directory of its snapshot, downloaded by huggingface_hub where the cache lacks it.

The texts come first, then the weights, so a snapshot with weights is whole. A file in the cache is not fetched again; one
that was interrupted goes on where it stopped if it comes by plain HTTP, and begins anew if it comes from Xet.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

from octavo.errors import OctavoError
from octavo.files import INDEX
from octavo.hub.refusals import NoRevision, amount, not_in_cache, refusal_of
from octavo.hub.repository import CALLER, Repository, cache_of, look_up
from octavo.hub.snapshots import complete_snapshot, folder_of

__all__ = ["fetch", "find_repository", "in_threads"]

TEXTS_AT_A_TIME, WEIGHTS_AT_A_TIME = 8, 4  # an interruption costs at most as many unfinished files
STALE_SECONDS = 300.0

Tell = Callable[[str, float, str], None]  # what is done, the finished part of it from 0 to 1, and how much that is
Say = Callable[[str], None]


def fetch(name: str, revision: str | None, download_dir: str | None, *, weights: bool, tell: Tell, say: Say) -> Path:
    """The directory of a model's snapshot, with all that a start reads. weights: whether they are needed.

    Raises OctavoError, one sentence, for all that the hub, the network and the disk refuse.
    """
    found = find_repository(name, revision, download_dir, weights=weights, say=say)
    if isinstance(found, Path):
        return found
    found.check(weights)
    _download(found, revision, "config and tokenizer", found.missing(found.texts()), TEXTS_AT_A_TIME, tell)
    if weights:
        names = found.weights(found.snapshot / INDEX if INDEX in found.files else None)
        found.check_space(names)
        _download(found, revision, "the weights", found.missing(names), WEIGHTS_AT_A_TIME, tell)
    found.keep_revision(revision)
    _sweep(found.folder / "blobs")
    return found.snapshot


def find_repository(name: str, revision: str | None, download_dir: str | None, *, weights: bool, say: Say) -> Repository | Path:
    """What the hub has now under a name; or the snapshot in the cache, where the hub is not asked or cannot be.

    It is not asked for a commit that the cache holds whole, nor when HF_HUB_OFFLINE is set.
    """
    cache = cache_of(download_dir)
    local = complete_snapshot(folder_of(cache, name), revision, weights)
    if local is not None and revision == local.name:
        return local
    if constants.is_offline_mode():
        if local is None:
            raise not_in_cache(name, revision, cache)
        return local
    try:
        return look_up(name, revision, cache)
    except NoRevision:
        raise
    except OctavoError as refused:
        if local is None:
            raise
        say(f"octavo: {refused} Going on with {local}, which was downloaded before.")
        return local


class _Stopped(Exception):
    """Ends a thread whose download nobody waits for any more."""


class _Progress:
    """Counts the bytes of several threads. `total`: all that are awaited."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    def add(self, nbytes: int | float | None) -> None:
        """Counts bytes; raises _Stopped once `stopped` is set."""
        if self.stopped.is_set():
            raise _Stopped
        with self._lock:
            self.done += int(nbytes or 0)

    def bar(self) -> type:
        """What huggingface_hub takes in place of tqdm's class; each of its bars counts here."""
        add = self.add

        class Bar:
            def __init__(self, *_: Any, initial: int = 0, **__: Any):
                add(initial)

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, n: int | float | None = 1) -> None:
                add(n)

            def _ignore(self, *_: Any, **__: Any) -> None:
                pass

            # What Xet transfers is told apart from what it writes, and only the latter adds up to the files' sizes.
            update_transfer = set_postfix_str = set_transfer_postfix_str = refresh = close = _ignore

        return Bar


def _download(repo: Repository, revision: str | None, what: str, names: Sequence[str], at_a_time: int, tell: Tell) -> None:
    """Downloads files into the cache."""
    if not names:
        return
    progress = _Progress(repo.to_download(names))
    bar = progress.bar()

    def show() -> None:
        part = min(1.0, progress.done / progress.total) if progress.total else 0.0
        tell(f"downloading {what} of {repo.name}", part, f"{amount(progress.done)} of {amount(progress.total)}")

    try:
        in_threads(names, lambda name: _fetch_file(repo, name, bar), at_a_time, show, progress.stopped)
    except Exception as error:
        raise refusal_of(error, repo.name, revision, repo.cache) from error


def in_threads(
    names: Sequence[str],
    work: Callable[[str], None],
    at_a_time: int,
    show: Callable[[], None],
    stopped: threading.Event | None = None,
) -> None:
    """Does `work` for all names in threads, and calls `show` meanwhile. Raises the first error, and at once: neither it nor
    Ctrl-C waits for the other threads, which get no more work. `stopped` is set at the end, whatever that is."""
    jobs, ended = queue.SimpleQueue[str](), queue.SimpleQueue[BaseException | None]()
    stopped = stopped or threading.Event()
    for name in names:
        jobs.put(name)

    def run() -> None:
        while not stopped.is_set():
            try:
                name = jobs.get_nowait()
            except queue.Empty:
                return
            try:
                work(name)
                ended.put(None)
            except BaseException as error:
                ended.put(error)
                return

    for _ in range(min(at_a_time, len(names))):
        threading.Thread(target=run, daemon=True).start()
    try:
        left = len(names)
        while left:
            show()
            try:
                error = ended.get(timeout=0.1)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            left -= 1
        show()
    finally:
        stopped.set()


def _fetch_file(repo: Repository, name: str, bar: type) -> None:
    """Puts a file into the cache's snapshot."""
    if name.endswith(".safetensors"):
        _resume(repo, name, bar)
    hf_hub_download(repo.name, name, revision=repo.commit, cache_dir=repo.cache, tqdm_class=bar, **CALLER)


def _resume(repo: Repository, name: str, bar: type) -> None:
    """Downloads a file's content to its blob, from where an earlier try stopped; hf_hub_download then links to it.

    That function always begins anew. Files that Xet stores, and what has no SHA-256 to be checked by, are left to it.
    """
    url, headers = hf_hub_url(repo.name, name, revision=repo.commit), build_hf_headers(**CALLER)
    found = get_hf_file_metadata(url, headers=headers)
    if found.etag is None or not re.fullmatch("[0-9a-f]{64}", found.etag) or (found.xet_file_data and _has_xet()):
        return
    blob, lock = repo.folder / "blobs" / found.etag, repo.cache / ".locks" / repo.folder.name / f"{found.etag}.lock"
    partial = blob.with_name(f"{blob.name}.incomplete")
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with open(partial, "ab") as file:
            if found.size is not None and file.tell() > found.size:
                file.seek(0)
                file.truncate()
            there = file.tell()
            if there and there == found.size:
                bar(initial=there)
            http_get(url, file, resume_size=there, headers=headers, expected_size=found.size, tqdm_class=bar)
        if there and _sha256(partial) != found.etag:
            partial.unlink()
            raise OctavoError(f"{name} of {repo.name} was damaged when its download went on; start again to fetch it anew.")
        os.replace(partial, blob)


def _has_xet() -> bool:
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep(blobs: Path) -> None:
    """Removes parts of files that killed downloads left and nothing will go on with; live ones were written to just now."""
    for path in blobs.glob("*.incomplete"):
        with suppress(OSError):  # another start has ended with it meanwhile, or another user owns it
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
