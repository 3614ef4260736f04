"""Tools as Kimi's own tokenizer hands them to its chat template: the keys of their JSON in order and, from K2.5 on, written as
TypeScript, for templates that read `tools_ts_str`.

Kimi's checkpoints have programs for that (tokenization_kimi.py, tool_declaration_ts.py of moonshotai/Kimi-K2.5), which are not
run here. What they cannot write as TypeScript a template prints as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["as_kimi_has_them", "as_typescript", "is_kimis_template"]

STEP = "  "  # of indentation
LIMITS = {
    **dict.fromkeys(("integer", "number"), ("maximum", "minimum")),
    **{"string": ("maxLength", "minLength", "pattern"), "array": ("maxItems", "minItems")},
}
OF_UNIONS = {
    **{name: name for name in ("string", "number", "boolean", "null")},
    **{"integer": "number", "object": "{}", "array": "Array<any>"},
}
VALUES: Mapping[str, type | tuple[type, ...]] = {"string": str, "number": (int, float), "integer": int, "boolean": bool}


def is_kimis_template(template: str) -> bool:
    """By a token that no other family has."""
    return "<|im_middle|>" in template


def as_kimi_has_them(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The same tools; of each object in them the keys in the order of their characters."""
    try:
        return [_in_order(tool) for tool in tools]
    except RecursionError:  # which rendering says, too
        return [*tools]


def _in_order(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(entry) for entry in value] if isinstance(value, list) else value


def as_typescript(tools: Sequence[Mapping[str, Any]]) -> str | None:
    """The functions among `tools`, whose keys are in order; None where a schema has what TypeScript is not written of."""
    try:
        written = [_function(tool["function"]) for tool in tools if tool.get("type") == "function" and tool.get("function")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    body = "".join(f"{one}\n" for one in written)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{body}}}\n" if written else ""


@dataclass
class _Names:
    """What a function's schemas may refer to: its definitions, and itself."""

    definitions: dict[str, Any] = field(default_factory=dict)
    names_itself: bool = False

    def of(self, reference: str) -> str:
        if reference == "#":
            self.names_itself = True
            return "parameters"
        name = reference.rpartition("/")[2]
        if not reference.startswith("#/$defs/") or name not in self.definitions:
            raise ValueError(reference)
        return name


def _function(function: Mapping[str, Any]) -> str:
    names, schema = _Names(), function.get("parameters") or {}
    parameters = _object(schema, "", names)
    said = []
    if names.names_itself:
        fields = ",\n".join(_fields(schema, STEP, names, required_first=False))
        said.append(f"interface parameters {{\n{fields}\n}}" if fields else "interface parameters {}")
        parameters = "parameters"
    for name, own in dict(names.definitions).items():
        shown = _type(own, "", names)
        about = own.get("description")
        said += [*([_comment(about, "")] if about else []), f"interface {name} {shown}"]
    if function.get("description"):
        said.append(_comment(function["description"], ""))
    return "\n".join([*said, f"type {function.get('name', 'function')} = (_: {parameters}) => any;"])


def _type(schema: Any, indent: str, names: _Names) -> str:
    """A schema as a type, whose further lines are indented. Raises ValueError and the like for what is none."""
    if isinstance(schema, bool) or not schema:
        return "null" if schema is False else "any"
    if "$ref" in schema:
        return names.of(schema["$ref"])
    if "anyOf" in schema:
        return " | ".join(_type(one, indent, names) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(_values(schema))
    kind = schema["type"]
    if isinstance(kind, list):
        return " | ".join(OF_UNIONS[one] for one in kind)
    if kind == "object":
        return _object(schema, indent, names)
    if kind == "array":
        items, inner = schema.get("items") or {}, indent + STEP
        about = _about(items, inner)
        if not about:
            return f"Array<{_type(items, indent, names)}>"
        return f"Array<\n{about}{inner}{_type(items, inner, names)}\n{indent}>"
    return "number" if kind == "integer" else str(kind)


def _object(schema: Mapping[str, Any], indent: str, names: _Names) -> str:
    names.definitions |= schema.get("$defs") or {}
    inner, others = indent + STEP, schema.get("additionalProperties")
    lines = [*_fields(schema, inner, names, required_first=True)]
    if others is not None:
        kind = "never" if others is False else "any" if others is True else _type(others, inner, names)
        lines.append(f"{inner}[k: string]: {kind}")
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"


def _fields(schema: Mapping[str, Any], indent: str, names: _Names, *, required_first: bool) -> Iterator[str]:
    """The properties of an object, each with what is said of it above it."""
    properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
    for name in sorted(properties, key=lambda name: (name not in required, name)) if required_first else properties:
        own = properties[name]
        default = own.get("default") if isinstance(own, Mapping) else None
        about = _about(own, indent)
        if default is not None:
            shown = repr(default) if isinstance(default, (int, float)) else json.dumps(default, ensure_ascii=False)
            about += f"{indent}// Default: {shown}\n"
        yield f"{about}{indent}{name}{'' if name in required else '?'}: {_type(own, indent, names)}"


def _about(schema: Any, indent: str) -> str:
    """Comments: the description, and the limits that a type has no words for."""
    if not isinstance(schema, Mapping):
        return ""
    lines = [_comment(schema["description"], indent)] if schema.get("description") else []
    kind = schema.get("type")
    plain = isinstance(kind, str) and not schema.keys() & {"$ref", "anyOf", "enum"}
    if limits := [f"{name}: {schema[name]}" for name in (LIMITS.get(str(kind), ()) if plain else ()) if name in schema]:
        lines.append(f"{indent}// {', '.join(limits)}")
    return "".join(f"{line}\n" for line in lines)


def _comment(text: str, indent: str) -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in text.split("\n"))


def _values(schema: Mapping[str, Any]) -> Iterator[str]:
    """Raises ValueError for a value that is not of the type that is declared beside it."""
    kind = schema.get("type")
    if isinstance(kind, list):
        others = [one for one in kind if one != "null"]
        if len(kind) > 1 and (len(kind) > 2 or len(others) == 2):
            raise ValueError(kind)
        kind = (others or kind)[0]
    for value in schema["enum"]:
        if value is not None and not isinstance(value, VALUES.get(str(kind), object)):
            raise ValueError(value)
        yield f'"{value}"' if isinstance(value, str) else str(value)
