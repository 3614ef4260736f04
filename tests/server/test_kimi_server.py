"""Kimi-K2.5 as its hub has it, INT4 experts beside BF16, through the real server: with the flag and without, and its calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import tokens
from models.test_kimi import kimi, write
from server.api_client import Client
from server.fake_engine import FakeEngine
from server.processes import Server
from server.vision_checkpoints import ask, engine_says, picture
from text import test_tiktoken_model
from transformers.utils.chat_template_utils import render_jinja_template

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.server.parsers.token_calls import TOKEN_FORMS
from octavo.server.serve import make_served
from octavo.text.chat_template import render_chat
from octavo.text.tokenizer import Tokenizer

FORM = TOKEN_FORMS["kimi_k2"]
TOKENS = (
    "[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<think>", "</think>",
    FORM.blocks[0], FORM.block_ends[0], FORM.call, FORM.separator, FORM.call_end,
    "<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>",
)  # fmt: skip
# Of the form of the hub's: tools first, ids and arguments between tokens, results under their ids, thinking of the last turn
# alone, which goes on after calls; an answer begins with thinking unless that is switched off.
TEMPLATE = """
{%- macro said(m) -%}
  {%- if m.get('content') is string -%}{{ m.content }}
  {%- elif m.get('content') is not none -%}{%- for part in m.content -%}
    {%- if part.type == 'image' or part.type == 'image_url' -%}<|media_begin|>image<|media_content|><|media_pad|><|media_end|>
    {%- else -%}{{ part.text }}{%- endif -%}
  {%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- macro called(m) -%}
  <|tool_calls_section_begin|>
  {%- for call in m.tool_calls -%}
    <|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
    {%- if call.function.arguments is string -%}{{ call.function.arguments }}
    {%- else -%}{{ call.function.arguments | tojson }}{%- endif -%}<|tool_call_end|>
  {%- endfor -%}<|tool_calls_section_end|>
{%- endmacro -%}
{%- set turn = namespace(last=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and not m.get('tool_calls') -%}{%- set turn.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>
  {%- if tools_ts_str -%}{{ tools_ts_str }}{%- else -%}{{ tools | tojson(separators=(',', ':')) }}{%- endif -%}<|im_end|>
{%- endif -%}
{%- for m in messages -%}
  <|im_{{ m.role if m.role in ('user', 'assistant') else 'system' }}|>{{ m.get('name') or m.role }}<|im_middle|>
  {%- if m.role == 'assistant' -%}
    <think>{{ m.get('reasoning_content', '') if loop.index0 > turn.last }}</think>{{ said(m) }}
    {%- if m.get('tool_calls') -%}{{ called(m) }}{%- endif -%}
  {%- elif m.role == 'tool' -%}## Return of {{ m.tool_call_id }}
{{ said(m) }}
  {%- else -%}{{ said(m) }}{%- endif -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|>{{ '<think></think>' if thinking is defined and not thinking else '<think>' }}
{%- endif -%}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Of a place.",
        "parameters": {
            "type": "object", "required": ["place"],
            "properties": {"place": {"type": "string", "description": "Which"}, "days": {"type": "integer", "minimum": 1}},
        },
    },
}  # fmt: skip
TYPESCRIPT = """# Tools

## functions
namespace functions {
// Of a place.
type weather = (_: {
  // Which
  place: string,
  // minimum: 1
  days?: number
}) => any;
}
"""
ARGUMENTS = '{"place": "Zürich", "days": 2}'
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "How is the weather?"},
    {
        "role": "assistant", "content": "One moment.", "reasoning_content": "I must look.",
        "tool_calls": [
            {"id": f"functions.weather:{i}", "type": "function", "function": {"name": "weather", "arguments": text}}
            for i, text in enumerate((ARGUMENTS, '{"place": "Bern"}'))
        ],
    },
    {"role": "tool", "tool_call_id": "functions.weather:0", "content": "Rain."},
    {"role": "tool", "tool_call_id": "functions.weather:1", "content": "Sun."},
]  # fmt: skip
SIZES = dict(vocab_size=1280, hidden_size=128, moe_intermediate_size=512)


def checkpoint(path: Path) -> Path:
    """All that a hub's directory has."""
    test_tiktoken_model.write(path, named=TOKENS)
    ids = {name: Tokenizer(path).token_id(name) for name in TOKENS}
    write(path, kimi(**SIZES, bos_token_id=ids["[BOS]"], eos_token_id=ids["[EOS]"], pad_token_id=None), int4=True)
    config = json.loads((path / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == ids["[EOS]"]
    (path / "config.json").write_text(
        json.dumps(
            config | dict(eos_token_id=ids["[EOS]"], bos_token_id=ids["[BOS]"], media_placeholder_token_id=ids["<|media_pad|>"])
        )
    )
    (path / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": {"in_patch_limit": 60, "patch_size": 14}}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["<|im_end|>"]}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module", params=[(), ("--quantization", "ptpc_fp8")], ids=["no flag", "ptpc_fp8"])
def served(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server, str]]:
    """The checkpoint, its server, and what the layers that are BF16 in it become."""
    path = checkpoint(tmp_path_factory.mktemp("kimi"))
    memory = ("--max-model-len", "1024", "--gpu-memory-utilization", "0.95", "--threads", "1")
    server = Server("--model", str(path), *request.param, *memory, "--served-model-name", "tiny")
    yield path, server, request.param[1] if request.param else "bf16"
    server.stop()


@pytest.fixture
def client(served: tuple[Path, Server, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[1].url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_what_happened_to_each_group_of_layers_is_printed(served: tuple[Path, Server, str]) -> None:
    """Experts at 4.5 bits a value with the flag and without; the rest as it is stored, or in FP8."""
    _, server, rest = served
    log = "".join(server.log)
    lines = re.findall(r"^  (.+?) +(\w+) +([\d.]+) M +([\d.]+) ([KM]iB)$", log, re.MULTILINE)
    found = {(role, scheme): (float(millions) * 1e6, float(size), unit) for role, scheme, millions, size, unit in lines}
    values, size, unit = found["experts", "int4"]
    assert unit == "MiB"
    assert 4.25 <= 8 * size * 2**20 / values <= 4.7  # 4.5, printed to 0.1 MiB
    matrices = {key for key, (count, _, _) in found.items() if count > 1e4}  # the tower has biases besides
    assert {scheme for role, scheme in matrices if role in ("mlp", "shared experts")} == {rest}
    assert {scheme for role, scheme in found if role == "attention"} == {rest, "bf16"}  # kv_b_proj
    assert not [role for role, scheme in found if scheme == "int4" and role != "experts"]
    assert "not loaded" not in log
    assert "does not print tools" not in log


def test_served_tokens_are_those_of_generate(served: tuple[Path, Server, str], client: openai.OpenAI) -> None:
    path, _, rest = served
    llm = LLM(path, device="cpu", threads=1, cpu_kv_cache_gib=0.05, quantization=None if rest == "bf16" else rest)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    (output,) = llm.generate([tokens(40)], params, use_tqdm=False)
    own = list(output.outputs[0].token_ids)
    assert len(set(own)) > 4
    more = {"ignore_eos": True, "return_token_ids": True}
    how: dict[str, Any] = dict(model="tiny", prompt=tokens(40), max_tokens=24, temperature=0, extra_body=more)
    assert client.completions.create(**how).choices[0].model_dump()["token_ids"] == own
    # A prefix hit would prefill in other parts, whose rounding tips near ties: random weights have such.
    how |= dict(stream=True, extra_body=more | {"cache_salt": "its own"})
    chunks = [one.choices[0].model_dump()["token_ids"] for one in client.completions.create(**how)]
    assert [token for ids in chunks for token in ids] == own


def test_a_conversation_with_calls_is_rendered_as_the_hubs_tokenizer_does(client: openai.OpenAI) -> None:
    """transformers' rendering of the template, with what K2.5's tokenization_kimi.py adds to it: the tools as TypeScript."""
    (expected,), _ = render_jinja_template(
        [MESSAGES], [WEATHER], chat_template=TEMPLATE, add_generation_prompt=True, tools_ts_str=TYPESCRIPT
    )
    asked: dict[str, Any] = dict(model="tiny", max_tokens=1, tools=[WEATHER], extra_body={"return_prompt_text": True})
    found = client.chat.completions.create(messages=MESSAGES, **asked).model_dump()["prompt_text"]
    assert found == expected
    assert f"tool_declare<|im_middle|>{TYPESCRIPT}<|im_end|>" in found
    assert f"functions.weather:0{FORM.separator}{ARGUMENTS}{FORM.call_end}" in found
    assert "## Return of functions.weather:1\nSun.<|im_end|>" in found
    assert found.endswith("<think>")


def test_calls_that_the_model_writes_are_read(client: openai.OpenAI) -> None:
    """A grammar makes the model write content and a section of two calls, in its own tokens; a client sends them back."""
    calls = "".join(FORM.write("weather", text, i) for i, text in enumerate((ARGUMENTS, '{"place": "Bern"}')))
    text = f"One moment.{FORM.blocks[0]}{calls}{FORM.block_ends[0]}"
    parts = [part for part in re.split(r"(<\|\w+\|>)", text) if part]
    grammar = "start: " + " ".join(part if part in TOKENS else json.dumps(part, ensure_ascii=False) for part in parts)
    off = {"structured_outputs": {"grammar": grammar}, "chat_template_kwargs": {"thinking": False}}
    asked: dict[str, Any] = dict(model="tiny", max_tokens=400, temperature=0, tools=[WEATHER], extra_body=off)
    choice = client.chat.completions.create(messages=MESSAGES[:2], **asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "One moment."
    assert [one.model_dump() for one in choice.message.tool_calls or []] == MESSAGES[2]["tool_calls"]
    again = [*MESSAGES[:2], choice.message.model_dump(exclude_none=True), *MESSAGES[3:]]
    shown = {"extra_body": {"return_prompt_text": True}}
    found = client.chat.completions.create(messages=again, **(asked | shown | {"max_tokens": 1})).model_dump()["prompt_text"]
    assert f"<think></think>{text}<|im_end|>" in found


def test_two_pictures_and_two_answers(served: tuple[Path, Server, str], client: openai.OpenAI) -> None:
    """Which are the engine's."""
    path, _, rest = served
    options: dict[str, Any] = dict(quantization=None if rest == "bf16" else rest, max_model_len=1024)
    core = EngineCore(EngineConfig(model=str(path), device="cpu", threads=1, cpu_kv_cache_gib=0.05, **options))
    off = {"chat_template_kwargs": {"thinking": False}, "return_token_ids": True, "ignore_eos": True, "cache_salt": "own"}
    found, expected = [], []
    for images in ([picture(1, 40, 100)], [picture(2, 100, 40)], [picture(3, 30, 30), picture(1, 40, 100)]):
        messages: Any = ask(*images)
        text = render_chat(TEMPLATE, messages, {}, thinking=False)
        assert text.count("<|media_pad|>") == len(images)
        expected.append(engine_says(core, path, text, *images))
        asked: dict[str, Any] = dict(model="tiny", max_tokens=16, temperature=0, extra_body=off)
        found.append(client.chat.completions.create(messages=messages, **asked).choices[0].model_dump()["token_ids"])
    assert found == expected
    assert len({*map(tuple, expected)}) == 3


def test_calls_end_thinking(tmp_path: Path) -> None:
    """Written by an engine in Kimi's own tokens, from within the thinking that its prompt begins."""
    test_tiktoken_model.write(tmp_path, named=TOKENS)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    engine = FakeEngine(f"I must look.{FORM.blocks[0]}{FORM.write('weather', ARGUMENTS, 0)}{FORM.block_ends[0]}")
    engine.tokenizer = Tokenizer(tmp_path)
    engine.info = replace(engine.info, model_type="kimi_k25")
    client = Client(engine, make_served(engine, ["tiny"]))  # type: ignore[arg-type]
    choice = client.chat(messages=MESSAGES[:2], tools=[WEATHER])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "I must look."
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == MESSAGES[2]["tool_calls"][:1]
