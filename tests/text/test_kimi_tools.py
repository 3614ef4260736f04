"""Tools as Kimi's tokenizer hands them to a template: what its own program (tool_declaration_ts.py) makes of the same tools."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.text.chat_prompt import render_conversation
from octavo.text.kimi_tools import as_kimi_has_them, as_typescript


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more, "parameters": {"type": "object", **parameters}}}


SEARCH = tool(
    "search", description="Looks for files.\n\nIn one folder.",
    parameters={
        "required": ["query", "where"],
        "properties": {
            "query": {"type": "string", "description": "What to find", "minLength": 1, "pattern": "^\\w+$"},
            "where": {
                "type": "object", "description": "The folder", "required": ["path"], "additionalProperties": False,
                "properties": {
                    "path": {"type": "string"}, "depth": {"type": "integer", "minimum": 1, "maximum": 9, "default": 3},
                },
            },
            "kinds": {
                "type": "array", "minItems": 1, "items": {"enum": ["file", "link"], "type": "string", "description": "A kind"},
            },
            "sizes": {"type": "array", "items": {"type": "number"}},
            "sort": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": "näme"},
            "hidden": {"type": ["boolean", "null"]},
            "more": {"type": "object", "additionalProperties": {"type": "integer"}},
            "any": {},
        },
    },
)  # fmt: skip
LEAF = {"type": "object", "description": "At an end.", "properties": {"name": {"type": "string"}}, "required": ["name"]}
GRAFT = tool("graft", {"properties": {"under": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/Leaf"}}, "$defs": {"Leaf": LEAF}})
WRITTEN = r"""# Tools

## functions
namespace functions {
// Looks for files.

// In one folder.
type search = (_: {
  // What to find
  // minLength: 1, pattern: ^\w+$
  query: string,
  // The folder
  where: {
    path: string,
    // maximum: 9, minimum: 1
    // Default: 3
    depth?: number,
    [k: string]: never
  },
  any?: any,
  hidden?: boolean | null,
  // minItems: 1
  kinds?: Array<
    // A kind
    "file" | "link"
  >,
  more?: {
    [k: string]: number
  },
  sizes?: Array<number>,
  // Default: "näme"
  sort?: string | null
}) => any;
interface parameters {
  leaf?: Leaf,
  under?: parameters
}
// At an end.
interface Leaf {
  name: string
}
type graft = (_: parameters) => any;
}
"""
DEEP: dict[str, Any] = {}
for _ in range(2000):
    DEEP = {"type": "array", "items": DEEP}


def test_what_kimis_program_writes() -> None:
    """The text is what the published program printed of these tools."""
    assert as_typescript(as_kimi_has_them([SEARCH, GRAFT])) == WRITTEN
    assert as_typescript([tool("f", {})]) == "# Tools\n\n## functions\nnamespace functions {\ntype f = (_: {}) => any;\n}\n"


@pytest.mark.parametrize(
    "schema",
    [
        {"weird": 1},
        {"$ref": "#/$defs/Nowhere"},
        {"type": ["odd"]},
        {"enum": [1], "type": "string"},
        {"enum": ["a"], "type": []},
        DEEP,
    ],
    ids=["no type", "no definition", "an odd union", "a value of another type", "a value of no type", "too deep"],
)
def test_what_it_cannot_write_stays_json(schema: dict[str, Any]) -> None:
    tools = as_kimi_has_them([tool("f", {"properties": {"x": schema}})])
    assert as_typescript(tools) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("{% if tools_ts_str %}{{ tools_ts_str }}{% else %}{{ tools | tojson }}{% endif %}", WRITTEN),
        ("{{ tools | tojson(separators=(',', ':')) }}", '[{"function":{"description":"Looks for files.\\n\\nIn one folder.",'),
    ],
)
def test_templates_get_what_they_read(shown: str, expected: str) -> None:
    """The keys' order is Kimi's alone."""
    found = render_conversation(shown + "<|im_middle|>", [{"role": "user", "content": "x"}], {}, [SEARCH, GRAFT])
    assert found.startswith(expected)
    others = render_conversation("{{ tools | tojson }}", [{"role": "user", "content": "x"}], {}, [SEARCH])
    assert others.startswith('[{"type": "function", "function": {"name": "search"')
