"""JSON schemas whose objects are closed: they hold the properties that they list, unless the schema says otherwise.

JSON Schema leaves such objects open. Clients that send the schema of a class mean a closed one, vLLM reads it so, and a small
model that may add properties never ends. What says `additionalProperties` or `unevaluatedProperties` is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["closed", "referred"]

_ONE = ("items", "contains", "additionalProperties", "propertyNames")  # keywords whose value is a schema
_LISTED = ("prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_BRANCHES = ("anyOf", "oneOf")
_SAID = ("additionalProperties", "unevaluatedProperties")


def closed(schema: Any) -> Any:
    """`schema` with its objects closed, wherever in it they are; it is not changed itself."""
    return _Closer(schema).close(schema)


def referred(node: Mapping[str, Any], root: Any) -> Mapping[str, Any] | None:
    """What a reference within the schema `root` names, if `node` is one."""
    where = node.get("$ref")
    if not isinstance(where, str) or not where.startswith("#"):
        return None
    found = root
    for step in where[1:].split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


class _Closer:
    def __init__(self, root: Any):
        self._root = root

    def close(self, node: Any, names: frozenset[str] = frozenset(), leave: bool = False) -> Any:
        """`node`, closed but for `names`, which what stands around it lists. `leave`: its own object stays open."""
        if not isinstance(node, Mapping):
            return node
        if names and (target := self._target(node)) is not None:  # closed where it stands, it would refuse `names`
            node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
        out = self._children(node)
        says = any(key in node for key in _SAID)
        own = _names(node)
        parts = [part for part in _list(node, "allOf") if isinstance(part, Mapping)]
        if len(parts) > 1:
            return self._all_of(out, node, parts, names, leave or says)
        for part in parts:
            out["allOf"] = [self.close(part, names | own, leave or says)]
        branched = [key for key in _BRANCHES if _list(node, key)]
        for key in branched:
            out[key] = [self.close(branch, names | own, leave or says) for branch in node[key]]
        if leave or says or parts or branched or not (names or "properties" in node):
            return out
        return _shut(out, names | own)

    def _all_of(self, out: dict[str, Any], node: Any, parts: list[Any], names: frozenset[str], leave: bool) -> dict[str, Any]:
        """Parts that are closed one by one would exclude each other: they stay open, and what holds them is closed."""
        found = [self._target(part) or part for part in parts]
        out["allOf"] = [self.close(part, leave=True) for part in found]
        lists = any("properties" in part for part in (*found, node))
        # what a part lists by branches and references of its own is not gathered: such an object stays open
        hides = any(key in part for part in found for key in (*_SAID, *_BRANCHES, "allOf", "$ref"))
        if leave or hides or not lists or any(_list(node, key) for key in _BRANCHES):
            return out
        return _shut(out, names.union(*map(_names, (*found, node))))

    def _children(self, node: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(node)
        for key in _ONE:
            if isinstance(node.get(key), Mapping):
                out[key] = self.close(node[key])
        for key in _LISTED:
            if isinstance(node.get(key), list):
                out[key] = [self.close(one) for one in node[key]]
        for key in _NAMED:
            if isinstance(node.get(key), Mapping):
                out[key] = {name: self.close(one) for name, one in node[key].items()}
        return out

    def _target(self, node: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return referred(node, self._root)


def _list(node: Mapping[str, Any], key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []


def _names(node: Mapping[str, Any]) -> frozenset[str]:
    """The properties that an object may have to have: those it lists, and those it requires without listing them."""
    listed = node.get("properties")
    if not isinstance(listed, Mapping):
        return frozenset()
    return frozenset(listed) | frozenset(name for name in _list(node, "required") if isinstance(name, str))


def _shut(node: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    listed = node.get("properties")
    listed = listed if isinstance(listed, Mapping) else {}
    more = {name: True for name in sorted(names) if name not in listed}
    return {**node, "properties": {**listed, **more}, "additionalProperties": False}
