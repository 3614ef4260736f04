"""Structured output: OpenAI's and vLLM's request fields, converted to one grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from octavo.errors import InvalidRequest
from octavo.messages import MAX_GRAMMAR, GrammarKind, StructuredOutput
from octavo.server.protocol import Function, GenerationRequest, Tool

__all__ = ["arguments_of", "calls_of", "calls_schema", "structured_output"]

_ANY_OBJECT = {"type": "object"}
_VALUES = ("const", "enum", "default", "examples")  # schema keywords whose values are not schemas
# Calls are written on one line, as in the families' training data. A weak model would fill pages with white space.
_SPACING = {"x-guidance": {"whitespace_pattern": " ?"}}


def structured_output(request: GenerationRequest) -> StructuredOutput | None:
    """The grammar that `request` asks for. Raises InvalidRequest if it asks for several, or for an empty choice."""
    asked = [found for found in (_response_format(request), *_extras(request)) if found is not None]
    if len(asked) > 1:
        raise InvalidRequest(f"Only one structured output can be asked for; this request has {len(asked)}.", asked[1][0])
    if not asked:
        return None
    param, kind, grammar = asked[0]
    return StructuredOutput(kind, grammar, param)


def arguments_of(function: Function) -> StructuredOutput:
    """A grammar for the arguments of a call of `function`."""
    return StructuredOutput("json_schema", _dumped("tools", {**(function.parameters or _ANY_OBJECT), **_SPACING}), "tools")


def calls_of(tools: Sequence[Tool], at_most_one: bool) -> StructuredOutput:
    """A grammar for one or more calls of these tools."""
    _check_size("tools", [tool.function.parameters for tool in tools])
    return StructuredOutput("json_schema", _dumped("tools", {**calls_schema(tools, at_most_one), **_SPACING}), "tools")


def calls_schema(tools: Sequence[Tool], at_most_one: bool) -> dict[str, Any]:
    """The schema of `[{"name": ..., "parameters": {...}}, ...]`: one or more calls of these tools."""
    definitions: dict[str, Any] = {}
    items = []
    for number, tool in enumerate(tools):
        parameters = tool.function.parameters or _ANY_OBJECT
        place = f"#/$defs/{number}"
        moved = _moved(parameters, place)
        if moved != parameters:  # its references are relative to its root, so it is moved below $defs
            definitions[str(number)], parameters = moved, {"$ref": place}
        properties = {"name": {"const": tool.function.name}, "parameters": parameters}
        items.append(
            {"type": "object", "properties": properties, "required": ["name", "parameters"], "additionalProperties": False}
        )
    limit = {"maxItems": 1} if at_most_one else {}
    shared = {"$defs": definitions} if definitions else {}
    return {"type": "array", "minItems": 1, **limit, "items": {"anyOf": items}, **shared}


def _moved(schema: Any, place: str) -> Any:
    """`schema` with references to its root replaced by references to `place`."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: value if key in _VALUES else _moved(value, place) for key, value in schema.items()}
    where = schema.get("$ref")
    if isinstance(where, str) and (where == "#" or where.startswith("#/")):
        moved["$ref"] = place + where[1:]
    return moved


def _response_format(request: GenerationRequest) -> tuple[str, GrammarKind, str] | None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return "response_format", "json_object", ""
    if wanted.json_schema is None:
        raise InvalidRequest("response_format of type json_schema needs its json_schema.", "response_format")
    return "response_format", "json_schema", _dumped("response_format", wanted.json_schema.schema_)


def _extras(request: GenerationRequest) -> list[tuple[str, GrammarKind, str] | None]:
    new = request.structured_outputs
    return [
        _json("guided_json", request.guided_json),
        _json("structured_outputs.json", new.json_),
        ("structured_outputs.json_object", "json_object", "") if new.json_object else None,
        _text("guided_regex", "regex", request.guided_regex),
        _text("structured_outputs.regex", "regex", new.regex),
        _text("guided_grammar", "lark", request.guided_grammar),
        _text("structured_outputs.grammar", "lark", new.grammar),
        _choice("guided_choice", request.guided_choice),
        _choice("structured_outputs.choice", new.choice),
    ]


def _json(param: str, schema: dict[str, Any] | str | bool | None) -> tuple[str, GrammarKind, str] | None:
    if schema is None:
        return None
    return param, "json_schema", schema if isinstance(schema, str) else _dumped(param, schema)


def _text(param: str, kind: GrammarKind, grammar: str | None) -> tuple[str, GrammarKind, str] | None:
    return None if grammar is None else (param, kind, grammar)


def _choice(param: str, choices: list[str] | None) -> tuple[str, GrammarKind, str] | None:
    if choices is None:
        return None
    if not choices or not all(choices):
        raise InvalidRequest(f"{param} needs one or more strings that are not empty.", param)
    if sum(map(len, choices)) + 5 * len(choices) > MAX_GRAMMAR:  # including the quotes and bars of the terminal below
        raise _too_large(param)
    # one terminal, which is an automaton: as alternatives of a rule, each choice would be a parser item
    listed = json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False, separators=(" | ", ":"))[1:-1]
    listed = listed.replace("\x7f", r"\u007f")  # the grammar's reader does not accept this character
    return param, "lark", f"start: CHOICE\nCHOICE: {listed}"


def _dumped(param: str, schema: dict[str, Any] | bool) -> str:
    _check_size(param, schema)
    return json.dumps(schema)


def _check_size(param: str, schema: Any) -> None:
    """Raises InvalidRequest for a large schema, before walking all of it."""
    left, parts = MAX_GRAMMAR, [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            left -= 7 * len(part)  # a pair is `"": 1, ` at least
            parts += part.values() if left >= 0 else ()
        elif isinstance(part, list):
            left -= 3 * len(part)
            parts += part if left >= 0 else ()
        elif isinstance(part, str):
            left -= len(part)
        if left < 0:
            raise _too_large(param)


def _too_large(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} has over {MAX_GRAMMAR} characters as a grammar, the most that is served; make it smaller.", param
    )
