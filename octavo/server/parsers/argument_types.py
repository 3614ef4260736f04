"""Converts arguments that a model writes as plain text to JSON, by the types in the tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from octavo.text.closed_schema import referred

__all__ = ["STRING", "ArgumentTypes", "as_json"]

STRING = frozenset({"string"})
_BRANCHES = ("anyOf", "oneOf", "allOf")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"(-?\d+)\.0+", re.ASCII)
_PYTHON = {"True": "true", "False": "false", "None": "null"}  # Qwen's template prints scalars as Python does
_WORDS = {"true": "boolean", "false": "boolean", "null": "null"}
_BRACKETS = {"{": "object", "[": "array", '"': "string"}
_NAMES: dict[type, str] = {
    **{str: "string", bool: "boolean", int: "integer", float: "number"},
    **{dict: "object", list: "array", type(None): "null"},
}


class ArgumentTypes:
    """Parameter types of a request's tools. `schemas`: function name -> JSON schema of its parameters."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any] | None]):
        self._schemas = schemas
        self._properties: dict[str, list[Mapping[str, Any]]] = {}
        self._found: dict[tuple[str, str], frozenset[str]] = {}

    def knows(self, function: str) -> bool:
        """Whether the function exists."""
        return function in self._schemas

    def declares(self, function: str, key: str) -> bool:
        """Whether the function has this parameter."""
        return bool(self._listed(function, key))

    def of(self, function: str, key: str) -> frozenset[str]:
        """The JSON types of the parameter; empty if its schema does not say."""
        if (function, key) not in self._found:
            root = self._schemas.get(function)
            nodes = _nodes(self._listed(function, key), root)
            self._found[function, key] = frozenset(kind for node in nodes for kind in _kinds(node))
        return self._found[function, key]

    def _listed(self, function: str, key: str) -> list[Any]:
        if function not in self._properties:
            root = self._schemas.get(function)
            listed = [node.get("properties") for node in _nodes([root], root)]
            self._properties[function] = [one for one in listed if isinstance(one, Mapping)]
        return [one[key] for one in self._properties[function] if key in one]


def as_json(text: str, types: frozenset[str]) -> str:
    """The JSON of a value written as `text`: a value of one of `types` if it parses as one, else a string.

    Numbers, lists and objects keep their spelling, to the last digit. A value of unknown type is read as JSON.
    """
    bare = text.strip()
    bare = _PYTHON.get(bare, bare)
    kind = _kind(bare)
    if kind == "number" and "integer" in types and "number" not in types and (whole := _WHOLE.fullmatch(bare)):
        return whole[1]
    fits = kind in types or (kind == "integer" and "number" in types) or not types
    if kind is not None and ((fits and kind != "string") or (types and "string" not in types)):
        return bare
    return json.dumps(text, ensure_ascii=False)


def _kind(bare: str) -> str | None:
    """The JSON type of the text, or None if it is no JSON."""
    if bare in _WORDS:
        return _WORDS[bare]
    if bare[:1] in _BRACKETS:
        try:  # numbers stay text, because Python reads long ones slowly or refuses them
            json.loads(bare, parse_int=str, parse_float=str, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        return _BRACKETS[bare[0]]
    if number := _NUMBER.fullmatch(bare):
        return "number" if set(number[0]) & set(".eE") else "integer"
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _nodes(found: list[Any], root: Any) -> Iterator[Mapping[str, Any]]:
    """The schemas in `found` with all that they refer to and branch into, each once, even with cyclic references."""
    seen: set[int] = set()
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Mapping) or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting.append(referred(node, root))
        for key in _BRANCHES:
            if isinstance(node.get(key), list):
                waiting += node[key]


def _kinds(node: Mapping[str, Any]) -> set[str]:
    """The types that one schema names directly."""
    said = node.get("type")
    kinds = (
        {said} if isinstance(said, str) else {one for one in said if isinstance(one, str)} if isinstance(said, list) else set()
    )
    if not kinds:
        values = node["enum"] if isinstance(node.get("enum"), list) else [node["const"]] if "const" in node else []
        kinds = {_NAMES[type(value)] for value in values if type(value) in _NAMES}
        kinds |= {"object"} if "properties" in node else set()
        kinds |= {"array"} if "items" in node else set()
    return kinds | {"null"} if kinds and node.get("nullable") is True else kinds
