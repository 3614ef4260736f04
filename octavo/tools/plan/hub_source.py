"""A model of the hub for `octavo plan`: config.json and the headers of its safetensors files, and nothing else of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download

from octavo.errors import OctavoError
from octavo.files import INDEX
from octavo.frontend.loading_bar import LoadingBar
from octavo.hub.download import find_repository, in_threads
from octavo.hub.refusals import refusal_of
from octavo.hub.repository import CALLER, Repository
from octavo.hub.snapshots import complete_snapshot
from octavo.server.console import say

__all__ = ["hub_directory"]

CONFIGS = ("config.json", "hf_quant_config.json")  # what a plan reads beside the headers
HEADERS_AT_A_TIME = 8


@contextmanager
def hub_directory(name: str, revision: str | None, download_dir: str | None, *, weights: bool) -> Iterator[tuple[Path, int]]:
    """A directory with what a plan reads of a model, and the bytes that a start would download.

    Its safetensors files are as long as the hub's and hold no values: each is a header before a hole. Where the cache has the
    model, it is the cache's. weights: whether the headers are wanted. Raises OctavoError for all that the hub refuses.
    """
    found = find_repository(name, revision, download_dir, weights=weights, say=say)
    if isinstance(found, Path):
        yield found, 0
        return
    found.check(weights)
    if (local := complete_snapshot(found.folder, found.commit, weights)) is not None:
        yield local, found.to_download(found.texts())
        return
    with TemporaryDirectory(prefix="octavo-plan-") as temporary:
        directory = Path(temporary)
        try:
            wanted = _read(found, directory, weights)
        except Exception as error:
            raise refusal_of(error, name, revision, found.cache) from error
        try:
            yield directory, found.to_download([*found.texts(), *wanted])
        except OctavoError as error:
            raise OctavoError(str(error).replace(temporary, name)) from error


def _read(repo: Repository, directory: Path, weights: bool) -> list[str]:
    """Puts the files of a plan into `directory`. The names of those that hold the weights."""
    for name in (*CONFIGS, *((INDEX,) if weights else ())):
        if name in repo.files:
            hf_hub_download(repo.name, name, revision=repo.commit, local_dir=directory, tqdm_class=_NoBar, **CALLER)
    if not weights:
        return []
    names, api, read = repo.weights(directory / INDEX if INDEX in repo.files else None), HfApi(**CALLER), list[str]()

    def header(name: str) -> None:
        found = api.parse_safetensors_file_metadata(repo.name, name, revision=repo.commit)
        tensors = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in found.tensors.items()
        }
        text = json.dumps(tensors).encode()
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with open(directory / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + max((info.data_offsets[1] for info in found.tensors.values()), default=0))
        read.append(name)

    with closing(LoadingBar()) as bar:

        def show() -> None:
            bar.update(f"reading the headers of {repo.name}", len(read) / len(names), f"{len(read)} of {len(names)} files")

        in_threads(names, header, HEADERS_AT_A_TIME, show)
    return names


class _NoBar:
    """In place of tqdm, for files of a few kilobytes."""

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        """Shows nothing."""
