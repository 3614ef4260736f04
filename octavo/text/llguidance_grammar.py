"""Converts structured outputs to grammars in llguidance's format, which the engine compiles with its vocabulary.

A grammar is validated here, without a vocabulary, so that an invalid one is reported to the client before the engine sees it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from octavo.errors import InvalidRequest
from octavo.messages import StructuredOutput
from octavo.text.closed_schema import closed
from octavo.text.gbnf import is_gbnf, lark_of

__all__ = ["serialize"]

# JSON permits any amount of white space, and a weak model that begins to write it may never stop. Between two JSON tokens this
# permits one line break and an indentation.
SPACING: Any = {"whitespace_pattern": r"[ \t]{0,4}(\r?\n[ \t]{0,32})?"}


def serialize(wanted: StructuredOutput) -> str:
    """The grammar in llguidance's format, validated. Raises InvalidRequest for one that does not compile."""
    if wanted.llguidance is not None:
        return wanted.llguidance
    grammar, fault = _validated(wanted)
    if fault:
        raise InvalidRequest(f"{wanted.param} cannot be followed: {fault}", wanted.param)
    return grammar


@lru_cache(maxsize=16)  # clients often send the same schema with every request
def _validated(wanted: StructuredOutput) -> tuple[str, str]:
    """The grammar in llguidance's format, and its error in one line; "" if it has none."""
    grammar = ""
    try:
        grammar = _read(wanted)
        errors = validate(grammar)
    except (ValueError, RecursionError) as error:
        errors = str(error)
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "")
    language = {True: "read as GBNF, which has '::=', ", False: "read as Lark ('start: ...'; GBNF is 'root ::= ...'), "}
    if reason and wanted.kind == "lark":
        reason = language[is_gbnf(wanted.grammar)] + reason
    return grammar, reason[:300].rstrip(".:") + "." if reason else ""


def validate(grammar: str) -> str:
    """llguidance's errors in a grammar; "" if it has none."""
    from llguidance import LLMatcher

    return str(LLMatcher.validate_grammar(grammar))


def _read(wanted: StructuredOutput) -> str:
    from llguidance import LLMatcher

    if wanted.kind == "regex":
        return str(LLMatcher.grammar_from_regex(wanted.grammar))
    if wanted.kind == "lark":
        return str(LLMatcher.grammar_from_lark(lark_of(wanted.grammar) if is_gbnf(wanted.grammar) else wanted.grammar))
    schema = json.dumps(closed(json.loads(wanted.grammar))) if wanted.kind == "json_schema" else '{"type": "object"}'
    return str(LLMatcher.grammar_from_json_schema(schema, SPACING))
