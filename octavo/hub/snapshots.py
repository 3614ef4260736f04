"""Which names are the hub's, which files of a repository a model needs, and what of them the hub's cache holds.

The cache's layout is that of huggingface_hub (https://huggingface.co/docs/huggingface_hub/guides/manage-cache):
models--OWNER--NAME/snapshots/COMMIT holds links to models--OWNER--NAME/blobs, and models--OWNER--NAME/refs/REVISION the commit
of a branch or tag. Nothing here asks the network, or imports the library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from octavo.errors import OctavoError
from octavo.files import INDEX, KEY_ROUNDING, read_json, read_text

__all__ = ["complete_snapshot", "folder_of", "is_hub_name", "shards", "snapshot_of", "text_files", "weight_files"]

_HUB_NAME = re.compile(r"(?=.{3,96}$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What is read of a checkpoint beside its weights. Anything else, such as code, pickles and weights of other formats, is left.
_TEXTS = (
    "config.json", "generation_config.json", "hf_quant_config.json", INDEX, KEY_ROUNDING,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "tiktoken.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_OTHER_LAYOUTS = ("consolidated*", "adapter_*")  # Mistral's own layout of the same weights, and LoRA adapters


def is_hub_name(model: str) -> bool:
    """Whether `model` is OWNER/NAME and nothing on disk: a directory of that name comes first."""
    named = _HUB_NAME.fullmatch(model) is not None and "--" not in model and ".." not in model
    return named and not os.path.exists(model)


def folder_of(cache: Path, name: str) -> Path:
    """The folder of a model in a cache."""
    return cache / f"models--{name.replace('/', '--')}"


def text_files(names: Collection[str]) -> list[str]:
    """Those of a repository's files that are read beside the weights."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in _TEXTS)]


def weight_files(names: Collection[str], index: Path | None) -> list[str]:
    """Those of a repository's files that hold the weights: what its index names, or the sole file, or all at the top.

    Raises OctavoError for an index that names what is not there.
    """
    if index is not None:
        named = shards(index)
        if absent := [name for name in named if name not in names]:
            raise OctavoError(
                f"{INDEX} names {absent[0]}, which the repository does not hold; tell its owner, or take another."
            )
        return named
    if "model.safetensors" in names:
        return ["model.safetensors"]
    at_top = [name for name in sorted(names) if name.endswith(".safetensors") and "/" not in name]
    return [name for name in at_top if not any(fnmatch(name, pattern) for pattern in _OTHER_LAYOUTS)]


def shards(index: Path) -> list[str]:
    """The files that a safetensors index names."""
    try:
        named = sorted(set((read_json(index) or {})["weight_map"].values()))
        if all(isinstance(name, str) for name in named):
            return named
        raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise OctavoError(f"{index} is not a safetensors index; download it again.") from None


def complete_snapshot(folder: Path, revision: str | None, weights: bool) -> Path | None:
    """The snapshot of a revision (default: main) in a model's folder of the cache, if a start finds all it needs there.

    weights: whether they are needed too. A download brings them last.
    """
    found = _snapshot(folder, revision)
    if found is None or not (found / "config.json").exists():
        return None
    if weights:
        index = found / INDEX
        files = weight_files(shards(index), index) if index.exists() else weight_files(_names(found), None)
        missing = [name for name in files if not (found / name).exists()]
        numbered = [match[1] for name in files if (match := re.search(r"-of-(\d+)\.safetensors$", name))]
        if missing or not files or (numbered and int(numbered[0]) > len(files)):
            return None
    return found


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def snapshot_of(model: str, revision: str | None = None) -> str:
    """The snapshot to read where `model` is a model's folder in the hub's cache (models--org--name); else `model` unchanged.

    Raises OctavoError where the snapshot is ambiguous, and for a revision of what has none, which vLLM would ignore.
    """
    folder = Path(model)
    snapshots = folder / "snapshots"
    if not model or not os.path.isdir(snapshots) or (folder / "config.json").exists():
        if model and revision is not None and os.path.exists(folder) and not _is_revision(folder, revision):
            raise OctavoError(
                f"--revision {revision} is for a name of the hub, or a model's folder in the hub's cache, and {model} is a "
                "directory, which has no revisions; leave it out."
            )
        return model
    if (found := _snapshot(folder, revision)) is not None:
        return str(found)
    there = _names(snapshots)
    wanted = "main" if revision is None else revision
    listed = f"it has {', '.join(sorted(there))}" if there else "it has none; was the download interrupted?"
    raise OctavoError(f"{model} is a model in the hub's cache, and which of its snapshots is '{wanted}' is not said: {listed}.")


def _snapshot(folder: Path, revision: str | None) -> Path | None:
    """The snapshot of a branch, tag or commit; without one main's, or the only one. It may lack files."""
    snapshots = folder / "snapshots"
    there = sorted(path.name for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    wanted = "main" if revision is None else revision
    for name in (wanted, _commit_of(folder, wanted)):
        if name in there:
            return snapshots / name
    return snapshots / there[0] if revision is None and len(there) == 1 else None


def _commit_of(folder: Path, revision: str) -> str:
    """The commit that a branch or tag names in a model's folder of the hub's cache; empty where it is not known."""
    return (read_text(folder / "refs" / revision) or "").strip() if revision else ""


def _is_revision(directory: Path, revision: str) -> bool:
    """Whether a directory is the snapshot of this name, or of the commit that the name stands for."""
    snapshot = Path(os.path.abspath(directory))
    named = snapshot.parent.name == "snapshots"
    return named and snapshot.name in (revision, _commit_of(snapshot.parents[1], revision))
