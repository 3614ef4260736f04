"""What MODEL means: a checkpoint directory, a config.json, or a known name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.models import read_config
from octavo.models.published import known_config, unknown_model
from octavo.tools.plan.headers import read_headers
from octavo.tools.plan.shapes import Model, model_of
from octavo.tools.plan.stored_formats import Stored, from_config, from_headers

__all__ = ["Source", "find_source"]


@dataclass(frozen=True)
class Source:
    """A model and how it is stored. by: what it was measured by, for a person."""

    name: str
    by: str
    config: Mapping[str, Any]
    model: Model
    stored: Stored
    on_disk: bool = False


def find_source(target: str) -> Source:
    """Raises OctavoError for a path without a config.json, or a name that is not known."""
    path = Path(target)
    if path.is_dir():
        config = read_config(path)
        model, tensors = model_of(config), read_headers(path)
        if tensors:
            return Source(target, "its safetensors headers", config, model, from_headers(model, tensors), on_disk=True)
        return Source(target, "config.json alone", config, model, from_config(model, config))
    if path.is_file():
        config = _read(path)
        model = model_of(config)
        return Source(str(path.parent), "config.json alone", config, model, from_config(model, config))
    if (found := known_config(target)) is None:
        raise unknown_model(target)
    model = model_of(found[1])
    name = target.rpartition("/")[2]
    return Source(name, f"the built-in numbers of {found[0]}", found[1], model, from_config(model, found[1]))


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        raise OctavoError(f"{path} is not a config.json ({error}); give one, or the directory that holds it.") from None
    return config
