"""Renders a conversation to the prompt's text. Shared by the server and LLM.chat."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import InvalidRequest
from octavo.text.chat_messages import ContentFormat, plain_messages
from octavo.text.chat_template import render_chat
from octavo.text.content_format import content_format
from octavo.text.kimi_tools import as_kimi_has_them, as_typescript, is_kimis_template
from octavo.text.tool_prompt import PLAIN_CALLS, CallForm, render_tools, shows_tools, spell_calls

__all__ = ["render_conversation"]


def render_conversation(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    *,
    continue_final_message: bool = False,
    content: str = "auto",
    switches: Mapping[str, Any] | None = None,
    calls: CallForm = PLAIN_CALLS,
    image_text: str | None = None,
    video_text: str | None = None,
) -> str:
    """The prompt's text. `content`: the content format that the template reads; `auto` detects it. `switches`: variables of the
    template. `calls`: the call format to describe, if the template does not. `image_text`, `video_text`: what stands for one
    where the template reads strings; None refuses them. With `continue_final_message` the text ends exactly where the last
    message does, including trailing blanks.

    Raises InvalidRequest for messages that cannot be rendered.
    """
    form: ContentFormat = content_format(template) if content == "auto" else "openai" if content == "openai" else "string"
    plain = spell_calls(template, plain_messages(messages, form, image_text, video_text), calls)
    if tools and is_kimis_template(template):
        tools = as_kimi_has_them(tools)
        if "tools_ts_str" in template and (text := as_typescript(tools)) is not None:
            switches = {"tools_ts_str": text, **(switches or {})}

    def render(add: bool) -> str:
        if tools and not shows_tools(template):
            return render_tools(template, plain, special_tokens, tools, add, calls, **dict(switches or {}))
        return render_chat(template, plain, special_tokens, tools, add, **dict(switches or {}))

    if not continue_final_message:
        return render(add_generation_prompt)
    if not plain:
        raise InvalidRequest("continue_final_message needs a message to continue.", "messages")
    mark = secrets.token_hex(16)  # appended to the content, so that no template trims it
    plain[-1]["content"] = _marked(plain[-1]["content"], mark)
    text, found, _ = render(False).rpartition(mark)
    if not found:
        raise InvalidRequest(
            "continue_final_message needs a last message that the chat template prints, and this one is not.", "messages"
        )
    return text


def _marked(content: str | list[dict[str, str]] | None, mark: str) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return (content or "") + mark
    if content and content[-1]["type"] == "text":
        *content, last = content
        mark = last["text"] + mark
    return [*content, {"type": "text", "text": mark}]
