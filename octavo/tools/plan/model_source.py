"""What MODEL means: a checkpoint directory, a config.json, or a known name; and its tensors, without values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import refusal
from octavo.files import check_directory, read_json
from octavo.models import read_config
from octavo.models.published import known_config, unknown_model
from octavo.quant.checks import check_format
from octavo.quant.stored_format import StoredFormat, stored_format_of
from octavo.weights.checkpoint import Checkpoint, StoredTensor

__all__ = ["Source", "find_source", "source_of_config"]


@dataclass(frozen=True)
class Source:
    """A model and how it is stored. by: what it was measured by, for a person. refused: why its format is not read."""

    name: str
    by: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    stored_format: StoredFormat | None = None
    refused: str | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def find_source(target: str, *, dummy: bool = False) -> Source:
    """`dummy`: weights are made up, of the formats that config.json names. Raises OctavoError for a path without config.json,
    and for a name that is not known."""
    path = Path(target)
    if path.is_dir():
        config = read_config(path)
        refused = refusal(lambda: check_format(config, path))
        if not dummy and any(path.glob("*.safetensors*")):
            return Source(target, "its safetensors headers", config, Checkpoint(path).tensors, refused=refused)
        return source_of_config(target, "config.json alone", config, refused)
    if path.is_file():
        if path.suffix in (".gguf", ".safetensors"):
            check_directory(path)  # says what it is
        config = read_json(path) or {}
        refused = refusal(lambda: check_format(config, path.parent))
        return source_of_config(str(path.parent), "config.json alone", config, refused)
    if (found := known_config(target)) is None:
        raise unknown_model(target)
    return source_of_config(target.rpartition("/")[2], f"the built-in numbers of {found[0]}", found[1])


def source_of_config(name: str, by: str, config: Mapping[str, Any], refused: str | None = None) -> Source:
    """The source of a model of which there is a config.json alone."""
    return Source(name, by, config, {}, None if refused else stored_format_of(config), refused)
