"""The prompts of DeepSeek-V3.2, against strings in the form of the example that the model's repository has beside its encoding
script (https://huggingface.co/deepseek-ai/DeepSeek-V3.2, encoding/test_output.txt); what the model writes, read and rendered.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from cases import cases
from server.api_client import Client
from server.fake_engine import FakeEngine

from octavo.demo import MODEL_DIR
from octavo.errors import InvalidRequest
from octavo.server.serve import make_served
from octavo.text.chat_prompt import render_conversation
from octavo.text.checkpoint_text import stand_in_note
from octavo.text.deepseek_encoding import DEEPSEEK_V32
from octavo.text.tokenizer import Tokenizer
from octavo.text.tool_prompt import shows_tools

TOOLS = [
    {"type": "function", "function": {"name": "get_datetime", "description": 'Now, in <a> "zone"', "parameters": {}}},
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    },
]
TOLD = """

## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{"name": "get_datetime", "description": "Now, in <a> \\"zone\\"", "parameters": {}}
{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
</functions>
"""  # noqa: E501


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "x", "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is it in Zürich?"}
CALLED = {
    "role": "assistant",
    "content": "Let me look.",
    "reasoning_content": "When is it?",
    "tool_calls": [
        call("get_weather", '{"city": "Zürich\\n\\"Alt\\"", "days": 2, "at": [1, {"h": null}], "metric": true}'),
        call("get_datetime", "{}"),
    ],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "x", "content": '{"sun": 1}'},
    {"role": "tool", "tool_call_id": "x", "content": "noon"},
]
ANSWER = {"role": "assistant", "reasoning_content": "Sun.", "content": "Sunny."}
WRITTEN = """Let me look.

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Zürich
"Alt"</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
<｜DSML｜parameter name="at" string="false">[1, {"h": null}]</｜DSML｜parameter>
<｜DSML｜parameter name="metric" string="false">true</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="get_datetime">

</｜DSML｜invoke>
</｜DSML｜function_calls>"""
BOS, EOS, ASKED = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>How is it in Zürich?<｜Assistant｜>"
SHOWN = '\n\n<function_results>\n<result>{"sun": 1}</result>\n<result>noon</result>\n</function_results>\n\n'
THINKS = {"thinking": True}
CASES: list[tuple[list[dict[str, Any]], Any, dict[str, Any], str]] = [
    ([USER], None, {}, f"{BOS}{ASKED}</think>"),
    ([USER], None, {"thinking": False}, f"{BOS}{ASKED}</think>"),
    ([USER], None, THINKS, f"{BOS}{ASKED}<think>"),
    ([USER], None, {"enable_thinking": True}, f"{BOS}{ASKED}<think>"),
    ([SYSTEM, USER], TOOLS, {}, f"{BOS}Be brief.{TOLD}{ASKED}</think>"),
    ([USER], TOOLS, {}, f"{BOS}{TOLD}{ASKED}</think>"),
    ([SYSTEM, USER, CALLED, *RESULTS], None, {}, f"{BOS}Be brief.{ASKED}</think>{WRITTEN}{EOS}{SHOWN}</think>"),
    (
        [USER, CALLED, *RESULTS],
        TOOLS,
        THINKS,
        f"{BOS}{TOLD}{ASKED}<think>When is it?</think>{WRITTEN}{EOS}{SHOWN}<think>",
    ),
    (  # thinking of before the user's last message is not shown
        [USER, CALLED, *RESULTS, ANSWER, USER],
        None,
        THINKS,
        f"{BOS}{ASKED}</think>{WRITTEN}{EOS}{SHOWN}</think>Sunny.{EOS}{ASKED}<think>",
    ),
    (
        [USER, CALLED, *RESULTS, ANSWER],
        None,
        THINKS,
        f"{BOS}{ASKED}<think>When is it?</think>{WRITTEN}{EOS}{SHOWN}<think>Sun.</think>Sunny.{EOS}",
    ),
]


@cases(("messages", "tools", "switches", "expected"), CASES)
def test_conversations(messages: list[dict[str, Any]], tools: Any, switches: dict[str, Any], expected: str) -> None:
    assert render_conversation(DEEPSEEK_V32, messages, {}, tools, switches=switches) == expected


def test_what_the_script_does_not_have() -> None:
    assert shows_tools(DEEPSEEK_V32)
    assert render_conversation(DEEPSEEK_V32, [USER], {}, add_generation_prompt=False) == BOS + "<｜User｜>How is it in Zürich?"
    begun = [USER, {"role": "assistant", "content": "Sun"}]
    assert render_conversation(DEEPSEEK_V32, begun, {}, continue_final_message=True) == f"{BOS}{ASKED}</think>Sun"
    broken = {**CALLED, "content": "", "tool_calls": [call("get_datetime", '{"zone')]}
    assert '<｜DSML｜invoke name="get_datetime">\n{"zone\n</｜DSML｜invoke>' in render_conversation(
        DEEPSEEK_V32, [USER, broken], {}
    )
    for messages, told in (
        ([USER, *RESULTS], "A tool message must follow"),
        ([{"role": "critic", "content": ""}], "not critic"),
    ):
        with pytest.raises(InvalidRequest, match=told):
            render_conversation(DEEPSEEK_V32, messages, {})


def test_a_checkpoint_without_a_chat_template(tmp_path: Path) -> None:
    """Of this family it gets the published form, which a template of its own replaces; the answer is read, and shown again."""
    tokens = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    tokens.add_special_tokens(["<think>", "</think>", "｜DSML｜", EOS])  # kept in the text where they mean something
    tokens.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).chat_template is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v32"}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.chat_template == DEEPSEEK_V32
    assert "no chat template" in str(stand_in_note(tokenizer.chat_template))

    engine = FakeEngine(f"When is it?</think>{WRITTEN}")
    engine.tokenizer, engine.info = (
        tokenizer,
        replace(engine.info, model_type="deepseek_v32", max_model_len=2048, vocab_size=5000),
    )
    client = Client(engine, make_served(engine, ["m"]))  # type: ignore[arg-type]
    how = {"messages": [USER], "tools": TOOLS, "chat_template_kwargs": THINKS}
    message = client.chat(**how)["choices"][0]["message"]
    prompt = tokenizer.decode(engine.calls[-1][0], skip_special_tokens=False)
    assert prompt == f"{BOS}{TOLD}{ASKED}<think>"
    assert message["reasoning_content"] == "When is it?"
    assert message["content"] == "Let me look."
    assert [one["function"]["name"] for one in message["tool_calls"]] == ["get_weather", "get_datetime"]
    client.chat(**{**how, "messages": [USER, message, *RESULTS]})
    again = tokenizer.decode(engine.calls[-1][0], skip_special_tokens=False)
    assert again == f"{prompt}{engine.text}{EOS}{SHOWN}<think>"

    engine.text = "Why?</think>Sunny."  # without tools, too
    assert client.chat(messages=[USER], reasoning_effort="high")["choices"][0]["message"]["reasoning_content"] == "Why?"

    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer(tmp_path).chat_template == "{{ messages }}"
    assert stand_in_note("{{ messages }}") is None
