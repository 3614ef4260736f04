"""Requests that nobody should send: right ones with something wrong, huge, deep or odd in them, for each endpoint and field."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from octavo.server.anthropic.message_fields import MESSAGES
from octavo.server.request_fields import CHAT, COMPLETION, STRUCTURED_OUTPUTS
from octavo.server.responses.response_fields import INCLUDE, RESPONSES

__all__ = ["Generator", "Sent"]

LONG = 20_000  # characters of a long text
MANY = 3_000  # items of a long list
DEEP = 3_000  # levels of a nested value
# The same of the few huge requests: what the server bounds, and more.
HUGE_LONG = 5_000_000
HUGE_MANY = 1_000_000
HUGE_DEEP = 100_000
HUGE = 1 / 50  # of the requests
BODY = 33 * 2**20  # bytes, at most: the server reads 32 MiB

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
FUNCTION = {"name": "f", "parameters": TOOL["function"]["parameters"], "input_schema": {"type": "object"}}  # of the other APIs
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "integer"}}, "required": ["a"]}


def _nested(depth: int, opening: str, closing: str) -> Any:
    return json.loads(opening * depth + '{"type":"string"}' + closing * depth)


SCHEMAS = [
    _nested(depth, opening, closing)
    for depth in (50, 250, 400, 800)
    for opening, closing in (('{"type":"object","properties":{"a":', "}}"), ('{"anyOf":[', "]}"), ('{"a":', "}"))
    if depth * len([one for one in opening if one in "{["]) <= 800  # Python's own reader goes little deeper
]
ENDPOINTS = {
    "/v1/completions": {"prompt": "def read(self", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/invocations": {"prompt": "def read(self", "max_tokens": 3},
    "/tokenize": {"prompt": "def read(self"},
    "/detokenize": {"tokens": [70, 71, 72]},
}
FIELDS = {
    "/v1/completions": [*COMPLETION, "best_of"],
    "/v1/chat/completions": [*CHAT, "structured_outputs"],
    "/v1/responses": [*RESPONSES, "input", "input", "tools", "text", "include"],
    "/v1/messages": [*MESSAGES, "messages", "messages", "system", "tools", "thinking", "output_config"],
    "/v1/messages/count_tokens": [*MESSAGES, "messages", "system"],
    "/invocations": ["prompt", "messages", "n", "max_tokens", "logprobs"],
    "/tokenize": ["model", "prompt", "messages", "tools", "chat_template", "chat_template_kwargs", "add_special_tokens",
                  "return_token_strs", "add_generation_prompt", "continue_final_message"],
    "/detokenize": ["model", "tokens"],
}  # fmt: skip
# Values that a field may have; the others get whatever comes.
LIKELY: dict[str, list[Any]] = {
    "n": [1, 2, 16, 128, 129, 0],
    "temperature": [0, 1, 1.5, -1, 1e9],
    "top_k": [0, 1, 50, 10**6, -1],
    "top_p": [0.1, 1, 0, 2],
    "min_p": [0, 0.5],
    "max_tokens": [0, 1, 5, 40, 10**9, None],
    "min_tokens": [0, 3, 10**6],
    "logprobs": [0, 5, 20, 21, True],
    "top_logprobs": [0, 20],
    "prompt_logprobs": [0, 20],
    "seed": [0, -1, 2**63, 2**70],
    "stop": ["\n", [" ", "e"], [f"never {i}" for i in range(200)], ["a" * 5000 + "b", "a"], [f"{i}" for i in range(MANY)]],
    "stop_token_ids": [[5], list(range(4000)), list(range(MANY * 2))],
    "logit_bias": [{"70": 5}, {str(i): -1 for i in range(4096)}, {"99999": 1}],
    "bad_words": [["read"], [f"w{i}" for i in range(1000)], ["a" * 10_000]],
    "allowed_token_ids": [[70, 71], list(range(4096)), [0]],
    "guided_choice": [["yes", "no"], [f"choice {i}" for i in range(MANY)]],
    "guided_regex": ["[ab]+", "a{3000}", "(a|b)*a(a|b){12}", "((a{50}){50}){50}", "a{300000}", "(", ".*.*.*x"],
    "guided_json": [*SCHEMAS, SCHEMA, {"enum": list(range(MANY))}, {"$ref": "#"}, {"const": "a" * LONG}, "{}", True],
    "guided_grammar": ['start: "a"+', "start: /a", 'start: a\na: a a | "x"', "start: " + '"a" ' * MANY],
    "structured_outputs": [{"regex": "[0-9]{2}"}, {"choice": ["a", "b"]}, {"json": SCHEMA, "regex": "a"}]
    + [{name: "x"} for name in STRUCTURED_OUTPUTS],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, {}],
    "tools": [[TOOL], [TOOL] * 200, [{"type": "function", **FUNCTION}], [FUNCTION] * 50, [{"type": "web_search"}]]
    + [[{"type": "function", "function": {"name": "f", "parameters": schema}}] for schema in SCHEMAS]
    + [[{"type": "function", "function": {"name": ""}}]],
    "tool_choice": [
        "auto",
        "none",
        "required",
        {"type": "function", "function": {"name": "f"}},
        {"type": "any"},
        {"type": "function", "name": "f"},
        {"type": "tool", "name": "f"},
        {"type": "allowed_tools", "tools": [{"name": "f"}]},
    ],
    "prompt": ["x", ["a", "b"] * 20, [5, 6, 7], [[5], [6]], "x " * 400, [5] * 1000, [[5]] * 300],
    "messages": [
        [],
        [{"role": "user", "content": "x " * 400}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 50,
        [{"role": "assistant", "content": "a", "tool_calls": []}, {"role": "tool", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "a"}, {"type": "tool_use", "id": "a", "name": "f"}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text"}]}]},
        ],
        [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "a", "data": "a"}}]}],
        [{"role": "user", "content": [None, {}, {"type": 3}]}],
    ],
    "input": [
        "",
        [],
        "x " * 400,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]}] * 20,
        [
            {"type": "reasoning", "content": [{"text": "a"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"},
            {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "a"}]},
        ],
        [{"type": "reasoning", "summary": [{}]}],
        [{"type": "item_reference"}],
        [{"type": "message"}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}, {"type": "input_file"}]}],
    ],
    "system": ["x", [{"type": "text", "text": "a"}] * 50, [{"type": "text"}], [{}]],
    "text": [{"format": {"type": "json_object"}}, {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}]
    + [{"format": {"type": "json_schema", "schema": schema}} for schema in SCHEMAS]
    + [{"verbosity": "low"}, {"format": {"type": "json_schema"}}, {"format": {}}],
    "reasoning": [{"effort": "high"}, {"effort": "x"}, {"summary": "auto"}, {"mode": "pro"}],
    "include": [[name] for name in INCLUDE] + [list(INCLUDE), ["x"] * MANY],
    "thinking": [{"type": "enabled", "budget_tokens": 1}, {"type": "disabled"}, {"type": "adaptive", "display": "omitted"}, {}],
    "output_config": [{"effort": "low"}, {"format": {"type": "json_schema", "schema": SCHEMA}}, {"format": {}}]
    + [{"format": {"type": "json_schema", "schema": schema}} for schema in SCHEMAS],
    "stop_sequences": [["e"], [""], [f"{i}" for i in range(MANY)]],
    "max_output_tokens": [0, 1, 40, 10**9, None],
    "previous_response_id": ["resp_x", "", "x" * LONG],
    "metadata": [{"a": "b"}, {"a": "b" * 513}, {str(i): "" for i in range(MANY)}],
    "stream_options": [{"include_usage": True}, {"continuous_usage_stats": True}, {}],
    "request_id": ["x", "a b", "x" * 1000],
    "cache_salt": ["s", "", "x" * 2000],
    "tokens": [[70] * 5000, [-1], [10**9]],
}


# What they have in a field: at a bound and over it. Made when asked for: each takes megabytes.
HUGE_VALUES: dict[str, list[Callable[[], Any]]] = {
    "n": [lambda: 128],
    "logprobs": [lambda: 20],
    "prompt_logprobs": [lambda: 20],
    "stop": [lambda: [f"{i:064}" for i in range(256)], lambda: [f"never {i}" for i in range(10_000)], lambda: "a" * 16_384],
    "stop_token_ids": [lambda: list(range(4096)), lambda: list(range(HUGE_MANY))],
    "logit_bias": [lambda: {str(i): 1e-9 * i for i in range(4096)}, lambda: {str(i): 0 for i in range(200_000)}],
    "bad_words": [lambda: [f"w{i}" for i in range(1024)], lambda: ["a " * 8000], lambda: ["x"] * HUGE_MANY],
    "allowed_token_ids": [lambda: list(range(4096)), lambda: [5] * HUGE_MANY],
    "guided_choice": [lambda: [f"choice {i}" for i in range(25_000)], lambda: ["ab" * 10**5] * 2, lambda: ["x"] * HUGE_MANY],
    "guided_regex": [lambda: "(" + "|".join(f"w{i}" for i in range(50_000)) + ")", lambda: "a?" * 5000 + "a" * 5000],
    "guided_json": [
        lambda: {"enum": list(range(60_000))},
        lambda: {"enum": list(range(HUGE_MANY))},
        lambda: {"const": "a" * 500_000},
        lambda: {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(10_000)}},
        lambda: {"anyOf": [{"type": "object", "properties": {f"p{i}": {"const": i}}} for i in range(8000)]},
    ],
    "guided_grammar": [lambda: "start: " + " | ".join(f'"w{i}"' for i in range(40_000))],
    "tools": [
        lambda: [{"type": "function", "function": {"name": f"f{i}", "parameters": SCHEMA}} for i in range(4096)],
        lambda: [TOOL] * 50_000,
    ],
    "prompt": [
        lambda: "word " * 1_000_000,
        lambda: " ".join(f"w{i}x" for i in range(600_000)),
        lambda: "a" * HUGE_LONG,
        lambda: [[5]] * 4096,
        lambda: [[5]] * 32,
        lambda: [[7] * 1000] * 50,
        lambda: [[7] * 100_000] * 10,
        lambda: ["x"] * 100_000,
    ],
    "messages": [
        lambda: [{"role": "user", "content": "x " * 1_000_000}],
        lambda: [{"role": "user", "content": "x"}] * 100_000,
        lambda: [{"role": "user", "content": [{"type": "text", "text": "x"}] * 100_000}],
    ],
    "input": [
        lambda: "x " * 1_000_000,
        lambda: [{"role": "user", "content": "x"}] * 60_000,
        lambda: [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}] * 40_000,
        lambda: [{"role": "user", "content": [{"type": "input_text", "text": "x"}] * 60_000}],
    ],
    "system": [lambda: [{"type": "text", "text": "x"}] * 60_000],
    "include": [lambda: ["message.output_text.logprobs"] * HUGE_MANY],
    "metadata": [lambda: {str(i): "a" for i in range(200_000)}],
    "chat_template_kwargs": [lambda: {f"k{i}": i for i in range(200_000)}],
    "tokens": [lambda: [70] * 2**17, lambda: [70] * HUGE_MANY],
    "user": [lambda: [[]] * 10_000_000],
}


@dataclass(frozen=True)
class Sent:
    """One request: a body, which may be no JSON, for a path."""

    path: str
    body: bytes
    what: str  # for whoever reads of its failure


class Generator:
    """The same requests for the same seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.long, self.many, self.deep = LONG, MANY, DEEP  # of the request that is made

    def request(self) -> Sent:
        """The next one."""
        pick = self.random
        path = pick.choice([*ENDPOINTS, "/v1/completions", "/v1/chat/completions"])
        huge = pick.random() < HUGE
        self.long, self.many, self.deep = (HUGE_LONG, HUGE_MANY, HUGE_DEEP) if huge else (LONG, MANY, DEEP)
        body: dict[str, Any] = dict(ENDPOINTS[path])
        body["stream"] = pick.random() < 0.4
        names = []
        for _ in range(pick.choice((1, 1, 1, 2, 3, 6))):
            name = pick.choice([one for one in FIELDS[path] if one in HUGE_VALUES] if huge else FIELDS[path])
            names.append(name)
            likely = [pick.choice(HUGE_VALUES[name])()] if huge else LIKELY.get(name)
            body[name] = pick.choice(likely) if likely and pick.random() < 0.7 else self.value()
        for name in pick.sample(sorted(body), k=pick.random() < 0.03):
            del body[name]
        data = self._encoded(body)
        return Sent(path, data, f"{path} {names} {data[:200]!r} ({len(data)} bytes)")

    def value(self, depth: int = 0) -> Any:
        """Anything that JSON can hold, and NaN and Infinity, which Python's can."""
        pick = self.random
        kind = pick.randrange(12 if depth < 3 else 8)
        if kind < 2:
            return pick.choice((None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(10**400)))
        if kind < 4:
            return pick.choice((0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")))
        if kind < 7:
            return self.text()
        if kind == 7:
            return pick.choice(([], {}, [[]], "", [None], {"": None}))
        if kind < 10:
            if depth == 0 and pick.random() < 0.2:
                return [pick.choice((0, -1, "x", None, 0.5, [], {}, [5], {"a": 1}))] * self.many
            return [self.value(depth + 1) for _ in range(pick.choice((1, 2, 5)))]
        if kind == 10:
            return {self.text()[:50]: self.value(depth + 1) for _ in range(pick.choice((1, 2, 5)))}
        value: Any = pick.choice(("x", 1, None))
        for _ in range(pick.choice((3, 30, 300, self.deep))):
            value = [value] if pick.random() < 0.5 else {"a": value}
        return value

    def text(self) -> str:
        """Short, long, or of what is not written every day."""
        pick = self.random
        letters = pick.choice(
            ("abc ", "\u0000\u0001\x7f", "é世界👩‍👩‍👧", "\u202e\ufeff\u2028", "\ud800\udc00\udfff", '"\\\n', "{%}[]<|>")
        )
        unit = "".join(pick.choice(letters) for _ in range(pick.randrange(1, 12)))
        return unit * pick.choice((1, 1, 1, 10, self.long // len(unit)))

    def _encoded(self, body: dict[str, Any]) -> bytes:
        pick = self.random
        data = _dumped(body)[:BODY]
        if pick.random() > 0.04:
            return data
        at = pick.randrange(len(data))
        return pick.choice(
            (data[:at], data[:at] + bytes([pick.randrange(256)]) + data[at + 1 :], b"", b"[]", b"null", data * 2)
        )


def _dumped(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=len(body) % 2 == 0).encode("utf-8", "surrogatepass")
    except RecursionError:  # deeper than Python itself would write
        return b'{"prompt":' + b"[" * HUGE_DEEP + b"]" * HUGE_DEEP + b"}"
