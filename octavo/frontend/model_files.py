"""The directory of the model that a configuration or a reload names."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.files import check_directory
from octavo.frontend.loading_bar import LoadingBar, say
from octavo.hub.snapshots import is_hub_name, snapshot_of

__all__ = ["checkpoint_to_load", "with_files"]


def with_files(config: EngineConfig) -> EngineConfig:
    """The configuration with a directory in place of a name of the hub, which is downloaded first where the cache lacks it.

    Raises OctavoError, one sentence, for what cannot be had. What is no name of the hub stays as it is.
    """
    if not is_hub_name(config.model):
        if config.download_dir is not None:
            say(f"octavo: --download-dir has no effect: {config.model} is no name of the hub, so nothing is downloaded.")
        return config
    from octavo.hub.download import fetch  # takes a quarter of a second, and a start from a directory needs none of it

    with closing(LoadingBar()) as bar:
        found = fetch(
            config.model,
            config.revision,
            config.download_dir,
            weights=config.load_format != "dummy",
            tell=bar.update,
            say=say,
        )
    return replace(config, model=str(found))


def checkpoint_to_load(given: str) -> str:
    """The checkpoint directory that a path names. Raises OctavoError for what is none."""
    if "\0" in given or not given:
        raise OctavoError("The path of a checkpoint directory is missing or holds a zero byte; give the path of one.")
    if is_hub_name(given):
        raise OctavoError(f"A reload takes a directory, and {given} is a name of the hub; download it, and send its path.")
    directory = snapshot_of(given)
    check_directory(Path(directory))
    return directory
