"""Objects that list their properties are closed, wherever they stand in a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cases import cases
from llguidance import LLMatcher, LLTokenizer

from octavo.demo import MODEL_DIR
from octavo.errors import InvalidRequest
from octavo.messages import StructuredOutput
from octavo.text.closed_schema import closed
from octavo.text.llguidance_grammar import serialize

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return LLTokenizer(json.dumps(json.loads((MODEL_DIR / "tokenizer.json").read_text())), n_vocab=4096, eos_token=[0])


def allows(tokenizer: Any, schema: Any, text: str) -> bool:
    """Whether a model that is held to `schema` may write `text` and end."""
    matcher = LLMatcher(tokenizer, serialize(StructuredOutput("json_schema", json.dumps(schema))), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


CASES: list[tuple[Any, list[str], list[str]]] = [
    (A, ['{"a": 1}'], ['{"a": 1, "b": 2}', "{}"]),
    (A | {"strict": True}, ['{"a": 1}'], ['{"a": 1, "b": 2}']),
    ({"properties": {"a": {"type": "integer"}}, "type": "object"}, ["{}", '{"a": 1}'], ['{"b": 1}']),
    ({"type": "object", "properties": {}}, ["{}"], ['{"b": 1}']),
    ({"type": "array", "items": A}, ['[{"a": 1}]'], ['[{"a": 1, "b": 2}]']),
    ({"type": "array", "prefixItems": [A], "items": False}, ['[{"a": 1}]'], ['[{"a": 1, "b": 2}]']),
    ({"anyOf": [A, {"type": "null"}]}, ['{"a": 1}', "null"], ['{"a": 1, "b": 2}']),
    ({"oneOf": [A, {"type": "null"}]}, ['{"a": 1}', "null"], ['{"a": 1, "b": 2}']),
    ({"$defs": {"A": A}, "$ref": "#/$defs/A"}, ['{"a": 1}'], ['{"a": 1, "b": 2}']),
    ({"$defs": {"A": A}, "allOf": [{"$ref": "#/$defs/A"}]}, ['{"a": 1}'], ['{"a": 1, "b": 2}']),
    (
        {"type": "object", "properties": {"in": {"$ref": "#/definitions/A"}}, "definitions": {"A": A}},
        ['{"in": {"a": 1}}'],
        ['{"in": {"a": 1, "b": 2}}', '{"in": {"a": 1}, "b": 1}'],
    ),
    ({"allOf": [A, B]}, ['{"a": 1, "b": 2}'], ['{"a": 1, "b": 2, "c": 3}', '{"a": 1}']),
    ({"$defs": {"A": A, "B": B}, "allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}, ['{"a": 1, "b": 2}'], ['{"a": 1}']),
    (A | {"anyOf": [B, {"properties": {"c": True}, "required": ["c"]}]}, ['{"a": 1, "b": 2}'], ['{"a": 1, "b": 2, "d": 1}']),
    (A | {"required": ["a", "z"]}, ['{"a": 1, "z": 2}'], ['{"a": 1, "z": 2, "b": 1}']),
    (A | {"patternProperties": {"^x": {"type": "integer"}}}, ['{"a": 1, "x": 2}'], ['{"a": 1, "b": 2}']),
    # what says otherwise stays as it is
    (A | {"additionalProperties": True}, ['{"a": 1, "b": 2}'], ["{}"]),
    (A | {"additionalProperties": {"type": "integer"}}, ['{"a": 1, "b": 2}'], ['{"a": 1, "b": "x"}']),
    ({"type": "object", "additionalProperties": A}, ['{"x": {"a": 1}}'], ['{"x": {"a": 1, "b": 2}}']),
    ({"type": "object"}, ['{"b": 1}'], ["[]"]),
    ({"const": A}, [json.dumps(A)], ["{}"]),
    ({"enum": [{"properties": {"a": 1}}]}, ['{"properties": {"a": 1}}'], ["{}"]),
]


@cases(("schema", "allowed", "refused"), CASES, ids=lambda value: json.dumps(value)[:60])
def test_objects_are_closed(tokenizer: Any, schema: Any, allowed: list[str], refused: list[str]) -> None:
    before = json.dumps(schema)
    for text in allowed:
        assert allows(tokenizer, schema, text), text
    for text in refused:
        assert not allows(tokenizer, schema, text), text
    assert json.dumps(schema) == before


def test_a_schema_that_refers_to_itself(tokenizer: Any) -> None:
    node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/N"}}, "required": ["v"]}
    schema = {"$defs": {"N": node}, "$ref": "#/$defs/N"}
    assert allows(tokenizer, schema, '{"v": 1, "next": {"v": 2}}')
    assert not allows(tokenizer, schema, '{"v": 1, "next": {"v": 2, "w": 3}}')


def to(*path: str) -> dict[str, str]:
    return {"$ref": "/".join(("#", *path))}


ALONE: dict[str, Any] = {
    "#": to(),
    "#/$defs/b": {**to("$defs", "b"), "$defs": {"a": to("$defs", "b"), "b": to("$defs", "c"), "c": to("$defs", "a")}},
    "#/properties/a": {"properties": {"a": to("properties", "a")}},
    "#/allOf/0": {"items": {"allOf": [to()]}, "allOf": [to("allOf", "0"), {"type": "string"}]},
}


@cases("where", [*ALONE, "#, beside", "#, branched"])
def test_a_reference_that_leads_to_itself_alone_is_refused(where: str) -> None:
    more = {"#, beside": {**to(), "type": "string"}, "#, branched": {"anyOf": [{"allOf": [{"type": "string"}, to()]}]}}
    with pytest.raises(InvalidRequest) as caught:
        serialize(StructuredOutput("json_schema", json.dumps((ALONE | more)[where]), "guided_json"))
    told = f"its reference '{where.partition(',')[0]}' leads back to itself alone; put it into a property or items."
    assert str(caught.value) == f"guided_json cannot be followed: {told}"


@cases(("schema", "text"), [
    ({"anyOf": [to(), {"type": "null"}]}, "null"),
    ({"type": "array", "items": to()}, "[[],[]]"),
    ({"type": "object", "additionalProperties": to()}, '{"a": {"b": {}}}'),
    ({"type": "string", "$defs": {"unused": to("$defs", "unused")}}, '"a"'),
    ({"properties": {"$ref": {"type": "integer"}}, "type": "object"}, '{"$ref": 1}'),
    ({"allOf": [to("$defs", "a"), to("$defs", "a")], "$defs": {"a": A}}, '{"a": 1}'),
    ({"const": to()}, '{"$ref": "#"}'),
])  # fmt: skip
def test_other_references_are_followed(tokenizer: Any, schema: Any, text: str) -> None:
    assert allows(tokenizer, schema, text)


def test_a_long_chain_of_references_is_followed(tokenizer: Any) -> None:
    """None of which is read by a call within a call."""
    chain = {str(n): to("$defs", str(n + 1)) for n in range(3000)} | {"3000": {"type": "null"}}
    closed({**to("$defs", "0"), "$defs": chain})
    with pytest.raises(ValueError, match="leads back to itself alone"):
        closed({**to("$defs", "0"), "$defs": {**chain, "3000": to("$defs", "7")}})


def test_white_space_is_bounded(tokenizer: Any) -> None:
    assert allows(tokenizer, A, '{\n        "a": 1\n}')
    for text in ('{\n\n"a": 1}', '{"a":' + " " * 40 + "1}", '{\n "a": 1\n\n}', '{"a": 1}\n\n\n\n'):
        assert not allows(tokenizer, A, text), text


def test_what_is_no_schema_is_left() -> None:
    assert [closed(value) for value in (True, [], "x", {"properties": 3})][:3] == [True, [], "x"]
