"""Chooses the parsers of tool calls and thinking: the requested ones, or by the chat template or the model family."""

from __future__ import annotations

from collections.abc import Callable

from octavo.errors import OctavoError
from octavo.server.parsers.argument_types import ArgumentTypes
from octavo.server.parsers.call import CallParser
from octavo.server.parsers.reasoning import REASONING_PARSERS
from octavo.server.parsers.token_calls import TOKEN_FORMS, TokenCalls, TokenSpelling
from octavo.server.parsers.tools import PARSERS, json_parser
from octavo.server.parsers.xml_calls import XmlCalls
from octavo.server.parsers.xml_forms import FORMS, Spelling
from octavo.text.tool_prompt import PLAIN_CALLS, CallForm

__all__ = [
    "REASONING_NAMES",
    "TOOL_CALL_NAMES",
    "call_form",
    "choose_parser",
    "choose_reasoning_parser",
    "id_maker",
    "keeps_special",
    "make_parser",
]

TOOL_CALL_NAMES = (*PARSERS, *FORMS, *TOKEN_FORMS)
REASONING_NAMES = (*REASONING_PARSERS, "none")
# Other names of the same formats, most of them vLLM's.
_ALIASES = {
    **{"llama": "llama3_json", "llama3": "llama3_json"},
    **{"qwen": "hermes", "qwen2": "hermes", "qwen3": "hermes", "qwen3_xml": "qwen3_coder"},
    **{"glm47": "glm45", "minimax": "minimax_m2", "kimi_k25": "kimi_k2"},
}
_FAMILIES = {
    **{"qwen2": "hermes", "qwen3": "hermes", "qwen3_moe": "hermes", "mistral": "mistral", "llama": "llama3_json"},
    **{"glm4_moe": "glm45", "glm_moe_dsa": "glm45", "minimax_m2": "minimax_m2"},
    **{"deepseek_v3": "deepseek_v3", "deepseek_v32": "deepseek_v32", "kimi_k2": "kimi_k2", "kimi_k25": "kimi_k2"},
}

_REASONING_ALIASES = {
    **{"glm47": "glm45", "minimax": "minimax_m2", "kimi_k25": "kimi_k2"},
    **{"deepseek_v31": "deepseek_v3", "deepseek_v32": "deepseek_v3"},
}
_REASONING_FAMILIES = {
    **{"qwen3_moe": "qwen3", "glm4_moe": "glm45", "glm_moe_dsa": "glm45", "minimax_m2": "minimax_m2"},
    **{"deepseek_v3": "deepseek_v3", "deepseek_v32": "deepseek_v3", "kimi_k2": "kimi_k2", "kimi_k25": "kimi_k2"},
}


def choose_parser(asked: str | None, template: str | None, model_type: str) -> str | None:
    """The name of the format: the requested one, else by the chat template, else the family's; None if unknown."""
    if asked:
        name = _ALIASES.get(asked, asked)
        if name not in TOOL_CALL_NAMES:
            raise OctavoError(f"--tool-call-parser '{asked}' is not known; known are: {', '.join(TOOL_CALL_NAMES)}.")
        return name
    template = template or ""
    for name, token_form in TOKEN_FORMS.items():
        if token_form.separator in template and ("```json" in template or not token_form.fenced):
            return name
    for name, form in FORMS.items():  # before PARSERS, because the JSON formats share their tags
        if all(tag in template for tag in (form.block, form.call, form.key)):
            return name
    for name, json_form in PARSERS.items():
        if json_form.opener and json_form.opener in template:
            return name
    return _FAMILIES.get(model_type)


def choose_reasoning_parser(asked: str | None, model_type: str) -> str | None:
    """The name of the reasoning parser: the requested one, or the family's; None without one."""
    if not asked:
        return _REASONING_FAMILIES.get(model_type)
    name = _REASONING_ALIASES.get(asked, asked)
    if name not in REASONING_NAMES:
        raise OctavoError(f"--reasoning-parser '{asked}' is not known; known are: {', '.join(REASONING_NAMES)}.")
    return None if name == "none" else name


def make_parser(name: str, types: ArgumentTypes) -> CallParser:
    """A parser for one answer. `types`: the tools' parameter types, for formats that write values untyped."""
    if name in TOKEN_FORMS:
        return TokenCalls(TOKEN_FORMS[name])
    return XmlCalls(FORMS[name], types) if name in FORMS else json_parser(name)


def call_form(name: str | None) -> CallForm:
    """The call format that the parser reads, described to a model whose chat template does not describe one."""
    if name in FORMS:
        return Spelling(form=FORMS[name])
    if name in TOKEN_FORMS:
        return TokenSpelling(form=TOKEN_FORMS[name])
    return PARSERS[name].call_form if name else PLAIN_CALLS


def id_maker(name: str | None, earlier: int) -> Callable[[str, int], str] | None:
    """Makes ids of calls for which the model wrote none, if its template prints ids. `earlier`: calls in earlier messages."""
    return (lambda function, place: f"functions.{function}:{earlier + place}") if name == "kimi_k2" else None


def keeps_special(name: str) -> bool:
    """Whether the format's tags are special tokens, which detokenization must keep."""
    return name in TOKEN_FORMS or (FORMS[name].special if name in FORMS else name in PARSERS and PARSERS[name].special)
