"""Conversations as templates get them: content in the form that they read, and a last message that goes on."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from cases import cases
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.demo import MODEL_DIR
from octavo.errors import InvalidRequest, OctavoError
from octavo.text.chat_messages import check_content_format, has_images, without_images
from octavo.text.chat_prompt import render_conversation
from octavo.text.chat_template import render_chat
from octavo.text.content_format import content_format
from octavo.text.tokenizer import Tokenizer

LOOP = "{% for p in CONTENT %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
MESSAGES = "{% for m in messages %}<{{ m.role }}>BODY{% endfor %}"
TEMPLATES = {
    MESSAGES.replace("BODY", LOOP.replace("CONTENT", "m.content")): "openai",
    MESSAGES.replace("BODY", LOOP.replace("CONTENT", "m['content']")): "openai",
    MESSAGES.replace("BODY", LOOP.replace("CONTENT", "m.get('content')")): "openai",
    MESSAGES.replace("BODY", "{% set c = m['content'] %}" + LOOP.replace("CONTENT", "c")): "openai",
    MESSAGES.replace("BODY", "{% set c = m.content if m.content else [] %}" + LOOP.replace("CONTENT", "c")): "openai",
    "{% set rest = messages[1:] if false else messages %}"
    + MESSAGES.replace("messages", "rest").replace("BODY", LOOP.replace("CONTENT", "m.content")): "openai",
    "{% macro show(c) %}" + LOOP.replace("CONTENT", "c") + "{% endmacro %}"
    + MESSAGES.replace("BODY", "{{ show(m.content) }}"): "openai",
    MESSAGES.replace("BODY", LOOP.replace("CONTENT", "m.content | reverse | list")): "openai",
    "{% set ns = namespace(all=messages) %}"
    + MESSAGES.replace("in messages", "in ns.all").replace("BODY", LOOP.replace("CONTENT", "m.content")): "openai",
    MESSAGES.replace(
        "BODY", "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP.replace("CONTENT", "m.content") + "{% endif %}"
    ): "either",
    MESSAGES.replace("BODY", "{{ m.content | trim }}"): "string",
    MESSAGES.replace("BODY", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"): "string",
    "{% for t in tools or [] %}{% for x in t.content %}{% endfor %}{% endfor %}"
    + MESSAGES.replace("BODY", "{{ m.content }}"): "string",
}  # fmt: skip


def render(template: str, *messages: dict[str, Any], **how: Any) -> str:
    return render_conversation(template, messages, {}, **how)


@cases(("template", "form"), TEMPLATES.items())
def test_the_form_of_content_is_found_in_the_template(template: str, form: str) -> None:
    assert content_format(template) == form
    for content in ("Hello", [{"type": "text", "text": "Hello"}], ["Hello"], [{"type": "input_text", "text": "Hello"}]):
        assert render(template, {"role": "user", "content": content}) == "<user>Hello"
    assert render(template, {"role": "user", "content": None}) == "<user>"


def test_the_demo_s_template_reads_a_string() -> None:
    template = Tokenizer(MODEL_DIR).chat_template
    assert template is not None
    assert content_format(template) == "string"


def test_a_form_that_is_asked_for() -> None:
    parts = MESSAGES.replace("BODY", "{{ m.content }}")
    assert render(parts, {"role": "user", "content": "x"}, content="openai") == "<user>[{'type': 'text', 'text': 'x'}]"
    assert render(next(iter(TEMPLATES)), {"role": "user", "content": "x"}, content="string") == "<user>"
    with pytest.raises(OctavoError, match="known are: auto, string, openai"):
        check_content_format("list")


def test_no_tool_calls_are_none() -> None:
    """A template may take the key for a call, and then leaves the content out."""
    template = "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls is not none %}[CALL]{% else %}{{ m.content }}{% endif %}{% endfor %}"  # fmt: skip  # noqa: E501
    assert render(template, {"role": "assistant", "content": "kept", "tool_calls": []}) == "kept"
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert render(template, {"role": "assistant", "content": "", "tool_calls": [call]}) == "[CALL]"


@cases("content", ["```json\n", "The answer: ", "", "I say", " \n "])
def test_a_continued_message_ends_where_it_ends(content: str) -> None:
    template = Tokenizer(MODEL_DIR).chat_template
    assert template is not None
    last = {"role": "assistant", "content": content}
    text = render(template, {"role": "user", "content": content or "x"}, last, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\n" + content)
    parts = next(iter(TEMPLATES))
    assert render(parts, {"role": "user", "content": "x"}, last, continue_final_message=True) == "<user>x<assistant>" + content
    trimming = MESSAGES.replace("BODY", "{{ m.content | trim }}!")
    shown = content.lstrip()
    if shown:
        assert render(trimming, last, continue_final_message=True) == "<assistant>" + shown


def test_a_message_that_is_not_printed_cannot_go_on() -> None:
    with pytest.raises(InvalidRequest, match="continue_final_message needs"):
        render(
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            {"role": "assistant", "content": "x"},
            continue_final_message=True,
        )


def test_compiling_a_template_computes_nothing() -> None:
    """Constants would be folded where nothing can stop it: at the start of a server."""
    endless = ("9**9**9", "[9**9**9]", "9**9**9 if 9**9**9 else 2", "'a'|center(10**9)", "'a'|center(1000000000)")
    large = ("'a' * 1000000000", "'%1000000000d' % 1", "'%1000000000d'|format(1)", "[0] * 1000000000")
    templates = [f"{{{{ {one} }}}}" for one in (*endless, *large)]
    templates += ["{% if 9**9**9 %}{% endif %}", "{% set x = 9**9**9 %}", "{% autoescape 9**9**9 %}{% endautoescape %}"]
    code = f"""if True:
        import resource
        from octavo.text.chat_template import check_template
        check_template("{{{{ 1 }}}}")
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
        for template in {templates!r}:
            check_template(template)
    """
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    folded = "{{ 2 * 3 }}{{ 'a' * 3 }}{{ 2**3 }}{{ '%d' % 5 }}{{ 7 % 4 }}<{{ 'x'|upper }}"
    assert render_chat(folded, [], {}) == "6aaa853<X"


JOINED = (
    "{% for m in messages %}{% for c in m.tool_calls %}{{ 'f:' + c['function']['arguments'] + '!' }}{% endfor %}{% endfor %}"
)
CALLS_OF_NO_CONTENT = (
    "{% for m in messages %}{% if m['content'] is none %}{% for c in m['tool_calls'] %}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% else %}{{ m['content'] + '.' }}{% endif %}{% endfor %}"
)


@cases("arguments", ['{"city": "Zürich"}', {"city": "Zürich"}])
@cases("content", ["", None, []])
def test_calls_of_earlier_turns_as_the_template_reads_them(arguments: Any, content: Any) -> None:
    """DeepSeek's templates join arguments with text; V3's prints calls only of a message whose content is none."""
    made = {"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert render(JOINED, made) == 'f:{"city": "Zürich"}!'
    assert render(JOINED.replace(" + ", " ~ "), made) == 'f:{"city": "Zürich"}!'
    assert render(JOINED.replace("'arguments']", "'arguments']|tojson"), made) == 'f:{"city": "Zürich"}!'
    assert render(CALLS_OF_NO_CONTENT, {"role": "user", "content": content}, made) == '.{"city": "Zürich"}'
    assert render(CALLS_OF_NO_CONTENT, {**made, "content": "Well"}) == "Well."
    assert render(CALLS_OF_NO_CONTENT, made, continue_final_message=True) == ""


# Of the form of Qwen3-VL's and of Kimi-K2.5's templates.
QWEN = """
{%- set count = namespace(images=0) %}
{%- macro shown(content) %}
  {%- if content is string %}{{- content }}
  {%- else %}
    {%- for part in content %}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
        {%- set count.images = count.images + 1 %}
        {%- if add_vision_id %}Picture {{ count.images }}: {% endif -%}<|vision_start|><|image_pad|><|vision_end|>
      {%- elif 'text' in part %}{{- part.text }}{%- endif %}
    {%- endfor %}
  {%- endif %}
{%- endmacro %}
{%- for m in messages %}{{- '<' + m.role + '>' + shown(m.content) }}{%- endfor %}"""
KIMI = """
{%- macro shown(m) -%}
  {%- set content = m.get('content') -%}
  {%- if content is string -%}{{ content }}
  {%- elif content is not none -%}
    {%- for part in content -%}
      {%- if part['type'] == 'image' or part['type'] == 'image_url' -%}
        <|media_begin|>image<|media_content|><|media_pad|><|media_end|>
      {%- else -%}{{ part['text'] }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}<{{ m.role }}>{{ shown(m) }}{%- endfor -%}"""
PICTURES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,1"}},
                                 {"type": "image", "image": "data:,2"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,3"}}]},
]  # fmt: skip


@cases(("template", "switches"), [(QWEN, {}), (QWEN, {"add_vision_id": True}), (KIMI, {})])
def test_images_stand_where_transformers_has_them(template: str, switches: dict[str, Any]) -> None:
    """Without their URLs, which the template's process never sees."""
    (expected,), _ = render_jinja_template([PICTURES], chat_template=template, **switches)
    bare = without_images(PICTURES)
    assert has_images(PICTURES)
    assert "data:" not in repr(bare)
    assert bare[0] is PICTURES[0]
    assert render(template, *bare, switches=switches, image_text="?") == expected
    assert expected.count("_pad|>") == 3
    continued = render(template, *bare, switches=switches, image_text="?", continue_final_message=True)
    assert continued == expected


def test_images_in_a_template_of_strings() -> None:
    template = MESSAGES.replace("BODY", "{{ m.content }}")
    assert render(template, *PICTURES, image_text="[I]") == "<system>Be short.<user>a\n[I]\n[I]\nb<assistant>c<user>[I]"
    for content in ("string", "openai"):
        with pytest.raises(InvalidRequest, match=r"reads no images here, and messages\.1\.content holds one"):
            render(template, *PICTURES, content=content)
    for kind in ("video_url", "input_audio", "image_embeds"):
        with pytest.raises(InvalidRequest, match=f"part of type '{kind}', which is not served"):
            render(template, {"role": "user", "content": [{"type": kind}]}, image_text="[I]")
