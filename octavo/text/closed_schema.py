"""Closes the objects of JSON schemas: they may have only the properties that they list, unless the schema says otherwise.

JSON Schema leaves such objects open. Clients that send a class's schema mean a closed one, vLLM reads it so, and a small model
that may add properties never ends. Schemas with `additionalProperties` or `unevaluatedProperties` are left unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["closed", "referred"]

_ONE = ("items", "contains", "additionalProperties", "propertyNames")  # keywords whose value is one schema
_LISTED = ("prefixItems", "items")
_DEFINED = ("$defs", "definitions")
_NAMED = ("properties", "patternProperties", "dependentSchemas", *_DEFINED)
_BRANCHES = ("anyOf", "oneOf")
_SAID = ("additionalProperties", "unevaluatedProperties")
MOST = 1 << 18  # schemas and names in a closed schema: copies of what is referred to may double at each reference


def closed(schema: Any) -> Any:
    """A copy of `schema` with all of its objects closed. Raises ValueError where that would be too large, and for a reference
    that leads to itself."""
    _check_references(schema)
    return _Closer(schema).close(schema)


def referred(node: Mapping[str, Any], root: Any) -> Mapping[str, Any] | None:
    """The target of the reference `node` within the schema `root`; None if `node` is no reference."""
    where = node.get("$ref")
    if not isinstance(where, str) or not where.startswith("#"):
        return None
    found = root
    for step in where[1:].split("/")[1:]:
        if isinstance(found, list):
            found = found[int(step)] if re.fullmatch("[0-9]{1,9}", step) and int(step) < len(found) else None
        else:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _check_references(root: Any) -> None:
    """Raises ValueError for a reference that is used and says of a value nothing but, in the end, itself."""
    waiting, seen = [root], {}
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping) and id(node) not in seen:
            seen[id(node)] = node
            waiting += [referred(node, root), *_schemas_in(node)]
    above: set[int] = set()  # of what is looked at, which all must hold for the same value
    done: set[int] = set()
    for start in seen.values():
        path = [(start, _same_value(start, root))]
        above.add(id(start))
        while path:
            node, rest = path[-1]
            if not rest:
                path.pop()
                above.remove(id(node))
                done.add(id(node))
            elif isinstance(part := rest.pop(), Mapping) and id(part) not in done:
                if id(part) in above:
                    where = next(one["$ref"] for one, _ in reversed(path) if "$ref" in one)
                    raise ValueError(f"its reference '{where}' leads back to itself alone; put it into a property or items")
                above.add(id(part))
                path.append((part, _same_value(part, root)))


def _schemas_in(node: Mapping[str, Any]) -> list[Any]:
    """The schemas within `node`, but for those that something must refer to."""
    named = [node[key] for key in _NAMED if key not in _DEFINED and isinstance(node.get(key), Mapping)]
    listed = [one for key in ("allOf", *_BRANCHES, *_LISTED) for one in _list(node, key)]
    return [*(node.get(key) for key in _ONE), *listed, *(one for values in named for one in values.values())]


def _same_value(node: Mapping[str, Any], root: Any) -> list[Any]:
    """The schemas that a value of `node` must fit, too."""
    only = [branches[0] for key in _BRANCHES if len(branches := _list(node, key)) == 1]
    return [referred(node, root), *_list(node, "allOf"), *only]


class _Closer:
    def __init__(self, root: Any):
        self._root, self._left = root, MOST

    def close(self, node: Any, names: frozenset[str] = frozenset(), leave: bool = False) -> Any:
        """Closes `node`, except for the properties `names` that its context lists. `leave`: its own object stays open."""
        self._left -= 1 + len(names)
        if self._left < 0:
            raise ValueError(f"with its references written out it has over {MOST} values; make it smaller")
        if not isinstance(node, Mapping):
            return node
        if names and (target := self._target(node)) is not None:  # the target, closed in place, would refuse `names`
            node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
        out = self._children(node)
        says = any(key in node for key in _SAID)
        listed = _names(node)
        parts = [part for part in _list(node, "allOf") if isinstance(part, Mapping)]
        if len(parts) > 1:
            return self._all_of(out, node, parts, names, leave or says)
        for part in parts:
            out["allOf"] = [self.close(part, names | listed, leave or says)]
        branched = [key for key in _BRANCHES if _list(node, key)]
        for key in branched:
            out[key] = [self.close(branch, names | listed, leave or says) for branch in node[key]]
        if leave or says or parts or branched or not (names or "properties" in node):
            return out
        return _shut(out, names | listed)

    def _all_of(self, out: dict[str, Any], node: Any, parts: list[Any], names: frozenset[str], leave: bool) -> dict[str, Any]:
        """Parts that were closed one by one would exclude each other. They stay open, and the containing object is closed."""
        found = [self._target(part) or part for part in parts]
        out["allOf"] = [self.close(part, leave=True) for part in found]
        lists = any("properties" in part for part in (*found, node))
        # properties in a part's own branches and references are not collected, so such an object stays open
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
    """The properties that an object lists, and those that it requires without listing them."""
    listed = node.get("properties")
    if not isinstance(listed, Mapping):
        return frozenset()
    return frozenset(listed) | frozenset(name for name in _list(node, "required") if isinstance(name, str))


def _shut(node: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    listed = node.get("properties")
    listed = listed if isinstance(listed, Mapping) else {}
    more = {name: True for name in sorted(names) if name not in listed}
    return {**node, "properties": {**listed, **more}, "additionalProperties": False}
