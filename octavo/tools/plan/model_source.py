"""What MODEL means: a checkpoint directory, a config.json, a known name or one of the hub; and its tensors, without values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from octavo.errors import refusal
from octavo.files import check_directory, read_json
from octavo.hub.snapshots import is_hub_name
from octavo.models import read_config
from octavo.models.published import known_config, unknown_model
from octavo.quant.checks import check_format
from octavo.quant.stored_format import StoredFormat, stored_format_of
from octavo.weights.checkpoint import Checkpoint, StoredTensor

__all__ = ["Source", "find_source", "source_of_config"]


@dataclass(frozen=True)
class Source:
    """A model and how it is stored. by: what it was measured by, for a person. stored_format: of tensors that
    config.json announces; described: what it says of those that are there. refused: why its format is not read.

    on_hub: its name there, if it was given by that. download: bytes that a start would download of it, where that is known.
    """

    name: str
    by: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    stored_format: StoredFormat | None = None
    described: StoredFormat | None = None
    refused: str | None = None
    on_hub: str | None = None
    download: int | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def find_source(target: str, *, dummy: bool = False, revision: str | None = None, download_dir: str | None = None) -> Source:
    """`dummy`: weights are made up, of the formats that config.json names. Raises OctavoError for a path without config.json,
    and for a name that is not known here or, where it is OWNER/NAME, on the hub.

    The hub is asked for what is not known here, and for a `revision`, which the numbers that are known have none of.
    """
    path = Path(target)
    if path.is_dir():
        config = read_config(path)
        refused = refusal(lambda: check_format(config, path))
        if not dummy and any(path.glob("*.safetensors*")):
            described = None if refused else stored_format_of(config, path)
            tensors = Checkpoint(path).tensors
            return Source(target, "its safetensors headers", config, tensors, refused=refused, described=described)
        return source_of_config(target, "config.json alone", config, refused)
    if path.is_file():
        if path.suffix in (".gguf", ".safetensors"):
            check_directory(path)  # says what it is
        config = read_json(path) or {}
        refused = refusal(lambda: check_format(config, path.parent))
        return source_of_config(str(path.parent), "config.json alone", config, refused)
    found, on_hub = known_config(target), is_hub_name(target)
    if on_hub and (found is None or revision is not None):
        from octavo.tools.plan.hub_source import hub_directory

        with hub_directory(target, revision, download_dir, weights=not dummy) as (directory, download):
            read = find_source(str(directory), dummy=dummy)
        return replace(read, name=target, by=f"{read.by} on the hub", on_hub=target, download=download)
    if found is None:
        raise unknown_model(target)
    source = source_of_config(target.rpartition("/")[2], f"the built-in numbers of {found[0]}", found[1])
    return replace(source, on_hub=target) if on_hub else source


def source_of_config(name: str, by: str, config: Mapping[str, Any], refused: str | None = None) -> Source:
    """The source of a model of which there is a config.json alone."""
    return Source(name, by, config, {}, None if refused else stored_format_of(config), refused=refused)
