"""Options of EngineConfig in Python: what is of another type than its field's becomes one, or is refused in a sentence."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from octavo.errors import OctavoError

__all__ = ["typed"]

_EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", tuple: "a list of strings"}
_WORDS = ("max_model_len",)  # numbers that may be a word, too


def typed(config: Any) -> dict[str, Any]:
    """The fields that take another value. Raises OctavoError for one that is of a wrong type.

    None stands for the default, as the peers have it; a dtype of torch's for its name; a number may be text.
    """
    out: dict[str, Any] = {}
    kinds = typing.get_type_hints(type(config))
    for field in fields(config):
        value, kind = getattr(config, field.name), kinds[field.name]
        parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if value is None and type(None) not in parts:
            out[field.name] = field.default
        elif value is not None and not _fits(value, parts):
            out[field.name] = _read(field.name, value, parts)
    return out


def _fits(value: Any, parts: tuple[Any, ...]) -> bool:
    for part in parts:
        base = typing.get_origin(part) or part
        if base is Mapping and isinstance(value, Mapping):
            return True
        if base is float and isinstance(value, int) and not isinstance(value, bool):
            return True
        if base is tuple and isinstance(value, (str, list, tuple, set)):
            return True
        if isinstance(base, type) and isinstance(value, base) and isinstance(value, bool) == (base is bool):
            return True
    return False


def _read(name: str, value: Any, parts: tuple[Any, ...]) -> Any:
    bases = [typing.get_origin(part) or part for part in parts if part is not type(None)]
    if str in bases and type(value).__name__ in ("dtype", "PosixPath"):  # torch's, and a directory
        return str(value).removeprefix("torch.")
    if name in _WORDS and value == "auto":
        return value
    number = next((base for base in bases if base in (int, float)), None)
    if number is not None and isinstance(value, str):
        try:
            return number(value)
        except ValueError:
            pass
    if number is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if tuple in bases and isinstance(value, int) and not isinstance(value, bool):
        return (str(value),)
    wanted = " or ".join(_EXPECTED.get(base, "an object") for base in bases)
    raise OctavoError(f"--{name.replace('_', '-')} must be {wanted}, not {value!r}.")
