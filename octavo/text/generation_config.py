"""A checkpoint's generation settings: its end-of-sequence tokens and its recommended sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from octavo import files
from octavo.errors import InvalidRequest, OctavoError
from octavo.messages import SamplingParams

__all__ = ["Generation", "read_json"]

# Field of generation_config.json -> field of SamplingParams, its types, and their description.
_RECOMMENDED: dict[str, tuple[str, tuple[type, ...], str]] = {
    "temperature": ("temperature", (int, float), "a number"),
    "top_p": ("top_p", (int, float), "a number"),
    "top_k": ("top_k", (int,), "an integer"),
    "min_p": ("min_p", (int, float), "a number"),
    "repetition_penalty": ("repetition_penalty", (int, float), "a number"),
    "max_new_tokens": ("max_tokens", (int,), "an integer"),
}


class Generation(NamedTuple):
    """Where a model says which tokens end its texts and how to sample by default.

    model: its directory, whose config.json is read where `settings` says nothing. settings: the directory of
    generation_config.json. recommended: whether sampling follows that file. overrides: values of it that are given instead.
    """

    model: Path
    settings: Path
    recommended: bool = True
    overrides: Mapping[str, Any] = {}

    @classmethod
    def of(cls, directory: str | Path) -> Self:
        """What a checkpoint says itself."""
        return cls(Path(directory), Path(directory))

    def eos_token_ids(self) -> frozenset[int]:
        """The end-of-sequence token ids. Raises OctavoError for values that are no ids."""
        for path in (self.settings / "generation_config.json", self.model / "config.json"):
            config = read_json(path)
            text_config = config.get("text_config")
            ids = config.get("eos_token_id")
            if ids is None and isinstance(text_config, dict):
                ids = text_config.get("eos_token_id")
            if ids is not None:
                listed = ids if isinstance(ids, list) else [ids]
                if not all(type(one) is int and one >= 0 for one in listed):
                    raise OctavoError(f"{path}: eos_token_id must be a token id or a list of them, not {_short(ids)}.")
                return frozenset(listed)
        return frozenset()

    def sampling(self) -> dict[str, Any]:
        """The default sampling parameters, by SamplingParams' names. Raises OctavoError for invalid ones, because every request
        that does not override them would fail, and for overrides that nothing reads.
        """
        option = "--override-generation-config"
        if unknown := [name for name in self.overrides if name not in _RECOMMENDED]:
            raise OctavoError(f"{option}: {unknown[0]} is no sampling parameter; it takes {', '.join(_RECOMMENDED)}.")
        path = self.settings / "generation_config.json"
        return {**(_read(str(path), read_json(path)) if self.recommended else {}), **_read(option, self.overrides)}


def _read(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (ours, kinds, description) in _RECOMMENDED.items():
        value = config.get(name)
        if value is None:
            continue
        if type(value) not in kinds:
            raise OctavoError(f"{where}: {name} must be {description}, not {_short(value)}.")
        try:
            SamplingParams(**{ours: value})
        except InvalidRequest as error:
            raise OctavoError(f"{where}: {str(error).replace(ours, name, 1)}") from error
        found[ours] = value
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if it does not exist. Raises OctavoError for anything else."""
    return files.read_json(path) or {}
