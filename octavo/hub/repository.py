"""A model's repository on the hub at one commit: its files, and what of them is in the cache."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants

from octavo.errors import OctavoError
from octavo.files import weight_format
from octavo.hub.refusals import no_space, refusal_of
from octavo.hub.snapshots import folder_of, text_files, weight_files
from octavo.version import __version__

__all__ = ["CALLER", "Repository", "StoredFile", "cache_of", "look_up"]

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
CALLER: Any = {"library_name": "octavo", "library_version": __version__}


def cache_of(download_dir: str | None) -> Path:
    """The cache that models are downloaded into: --download-dir, or the library's (HF_HUB_CACHE, HF_HOME)."""
    return Path(download_dir or constants.HF_HUB_CACHE).expanduser().absolute()


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a repository. nbytes: its size. etag: of its content, which names its blob in the cache; None if not told."""

    nbytes: int
    etag: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at a commit. based_on: the model that its owner says it was made of."""

    name: str
    commit: str
    files: Mapping[str, StoredFile]
    cache: Path
    based_on: str | None = None

    @property
    def folder(self) -> Path:
        return folder_of(self.cache, self.name)

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit

    def texts(self) -> list[str]:
        """The files that are read beside the weights."""
        return text_files(self.files)

    def weights(self, index: Path | None) -> list[str]:
        """The files that hold the weights; `index`: where model.safetensors.index.json is, if the repository has one."""
        return weight_files(self.files, index)

    def check(self, weights: bool) -> None:
        """Raises OctavoError for a repository that is no safetensors checkpoint, and names what it holds instead."""
        there, instead = self.files, f"; {self.based_on} is what it was made of, says its owner" if self.based_on else ""
        if "config.json" in there and (not weights or any(name.endswith(".safetensors") for name in there)):
            return
        if "adapter_config.json" in there and "config.json" not in there:
            raise OctavoError(
                f"{self.name} is a LoRA adapter, which Octavo does not serve; merge it into its model (merge_and_unload of the "
                f"library peft), save that and give its directory{instead}."
            )
        held = next((found for name in sorted(there) if (found := weight_format(Path(name).suffix))), None)
        if held is not None:
            raise OctavoError(f"{self.name} holds {held}; take a repository of the model that has safetensors{instead}.")
        lacks = "safetensors files" if "config.json" in there else "config.json"
        raise OctavoError(
            f"{self.name} has no {lacks}, so it is no checkpoint that Octavo reads; take one of transformers' form{instead}."
        )

    def blob(self, name: str) -> Path | None:
        """Where the cache keeps a file's content, whether or not it is there yet; None if the hub did not tell its etag."""
        etag = self.files[name].etag
        return self.folder / "blobs" / etag if etag is not None and _HASH.fullmatch(etag) else None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that the snapshot lacks."""
        return [name for name in names if not (self.snapshot / name).exists()]

    def to_download(self, names: Iterable[str]) -> int:
        """The bytes of those whose content is not in the cache."""
        absent = (name for name in self.missing(names) if (blob := self.blob(name)) is None or not blob.exists())
        return sum(self.files[name].nbytes for name in absent)

    def check_space(self, names: Iterable[str]) -> None:
        """Raises OctavoError if the disk cannot hold what is still to be downloaded of these."""
        names = list(names)
        partial = sum(_size(blob.with_name(f"{blob.name}.incomplete")) for name in names if (blob := self.blob(name)))
        wanted = self.to_download(names) - partial
        place = next(path for path in (self.cache, *self.cache.parents) if path.exists())
        if wanted > (free := shutil.disk_usage(place).free):
            raise no_space(self.name, wanted, free, self.cache)

    def keep_revision(self, revision: str | None) -> None:
        """Notes in the cache which commit a branch or tag was, for starts without network. A read-only cache stays as it is."""
        target = self.folder / "refs" / (revision or constants.DEFAULT_REVISION)
        with suppress(OSError):
            if revision == self.commit or (target.exists() and target.read_text().strip() == self.commit):
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            partial.write_text(self.commit)
            os.replace(partial, target)


def look_up(name: str, revision: str | None, cache: Path) -> Repository:
    """Asks the hub for a repository at a revision (default: main). Raises OctavoError for all that it refuses."""
    try:
        info = HfApi(**CALLER).model_info(name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the library raises its own errors, those of its HTTP client and the system's
        raise refusal_of(error, name, revision, cache) from error
    if info.sha is None or not _HASH.fullmatch(info.sha):
        raise OctavoError(
            f"{constants.ENDPOINT} does not answer as the hub does: it names no commit of {name}; see to HF_ENDPOINT."
        )
    files = {
        file.rfilename: StoredFile(file.size or 0, file.lfs.sha256 if file.lfs is not None else file.blob_id)
        for file in info.siblings or ()
        if ".." not in PurePosixPath(file.rfilename).parts and not file.rfilename.startswith("/")
    }
    base = getattr(info.card_data, "base_model", None)
    based_on = base[0] if isinstance(base, list) and base else base
    return Repository(name, info.sha, files, cache, based_on if isinstance(based_on, str) else None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
