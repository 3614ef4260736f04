"""The body of POST /v1/responses, and the chat that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from octavo.errors import InvalidRequest
from octavo.server.protocol import MAX_TOOLS, ApiModel, ChatRequest, Objects, ObjectWithFates, Strings, StructuredOutputs
from octavo.server.request_fields import Refused
from octavo.server.responses.response_fields import INCLUDE, REASONING, RESPONSES, TEXT
from octavo.server.responses.response_items import chat_messages
from octavo.server.responses.response_store import size_of

__all__ = ["CHAT_NAMES", "ResponsesRequest"]

MAX_TOOLS_SIZE = 2**20  # characters: events repeat the tools
MAX_REFERRING = 1000  # items of an input that refers to kept ones, which is translated in the server's own process
MAX_METADATA = 16
MAX_KEY, MAX_VALUE = 64, 512  # characters
_SAME = (
    *("model", "parallel_tool_calls", "temperature", "top_p", "top_k", "logit_bias", "skip_special_tokens", "ignore_eos"),
    *("include_stop_str_in_output", "cache_salt", "chat_template_kwargs", "repetition_penalty", "seed", "stop"),
)
# A chat's field -> the field that it is made of. Errors name the latter.
CHAT_NAMES = {
    **{"messages": "input", "prompt": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"},
    **{"response_format": "text.format", "reasoning_effort": "reasoning.effort"},
}


class TextFormat(ApiModel):
    """`text.format`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Text(ObjectWithFates):
    """`text`."""

    fates = TEXT
    where = "text."

    format: TextFormat = TextFormat(type="text")


class Reasoning(ObjectWithFates):
    """`reasoning`."""

    fates = REASONING
    where = "reasoning."

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class FunctionTool(ApiModel):
    """An entry of `tools`."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, Mapping) else "function"
        if isinstance(kind, str) and kind != "function":
            raise InvalidRequest(f"A tool of type {kind[:80]!r} is not served; the tools are your own functions.", "tools")
        return data


class ToolChoice(ApiModel):
    """A `tool_choice` that names functions."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: Objects = Field(default_factory=list)


Metadata = dict[Annotated[str, Field(max_length=MAX_KEY)], Annotated[str, Field(max_length=MAX_VALUE)]]


class ResponsesRequest(ObjectWithFates):
    """POST /v1/responses. `chat`: what it asks for, as a chat."""

    fates = RESPONSES

    model: str | None = None
    input: Any = ""  # a text, or a list of items: validated by hand, for one sentence
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: Text = Text()
    reasoning: Reasoning = Reasoning()
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: Strings = Field(default_factory=list)
    stream: bool = False
    store: bool = True
    previous_response_id: str | None = None
    metadata: Annotated[Metadata, Field(max_length=MAX_METADATA)] = Field(default_factory=dict)

    top_k: int | None = None
    logit_bias: dict[int, float] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    structured_outputs: StructuredOutputs = StructuredOutputs()
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    ignore_eos: bool | None = None

    _chat: ChatRequest = PrivateAttr()
    _referring: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    @property
    def chat(self) -> ChatRequest:
        """The chat, without the messages of a previous response."""
        return self._chat

    @property
    def referring(self) -> list[dict[str, Any]]:
        """The input's items, if some refer to kept ones; then the chat has no messages yet."""
        return self._referring

    def model_post_init(self, context: Any, /) -> None:
        """Translates here, since a large body is validated in a process of its own."""
        for value in self.include:
            fate = INCLUDE.get(value)
            if fate is None:
                raise InvalidRequest(f"include has {value[:80]!r}; known are: {', '.join(INCLUDE)}.", "include")
            if isinstance(fate, Refused):
                raise InvalidRequest(fate.sentence, "include")
        sizes = (size_of(tool.parameters, most=MAX_TOOLS_SIZE, each=2) + len(tool.description or "") for tool in self.tools)
        if sum(sizes) > MAX_TOOLS_SIZE:
            raise InvalidRequest(f"The tools have over {MAX_TOOLS_SIZE} characters; send fewer, or shorter ones.", "tools")
        messages = self._messages()
        self.input = ""  # what is in the messages need not be kept, or sent between processes, twice
        same = {name: getattr(self, name) for name in _SAME}
        tools, choice = self._tools()
        chat: dict[str, Any] = {
            "stream": self.stream,
            "max_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort,
        }
        chat |= {"tools": tools, "tool_choice": choice, "response_format": self._response_format()}
        chat |= {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs if self.logprobs else None}
        self._chat = ChatRequest.model_validate({**same, **chat, "messages": [{"role": "user"}]})
        self._chat.messages, self._chat.structured_outputs = messages, self.structured_outputs

    def _messages(self) -> list[dict[str, Any]]:
        given = self.input
        known = isinstance(given, str) or (isinstance(given, list) and all(isinstance(item, dict) for item in given))
        if not known or not (given or self.previous_response_id):
            raise InvalidRequest("input should be a text or a list of items, and not empty.", "input")
        if isinstance(given, str):
            return [{"role": "user", "content": given}] if given else []
        if not any(item.get("type") == "item_reference" for item in given):
            return chat_messages(given)
        if len(given) > MAX_REFERRING:
            raise InvalidRequest(f"An input with item_reference may have {MAX_REFERRING} items; send the items.", "input")
        self._referring = given
        return []

    @property
    def logprobs(self) -> bool:
        """Whether the answer tells the log-probabilities of its text."""
        return "message.output_text.logprobs" in self.include or bool(self.top_logprobs)

    def _tools(self) -> tuple[list[dict[str, Any]], Any]:
        """Tools and tool_choice as chats have them. Of allowed tools the model sees no others."""
        choice, tools = self.tool_choice, self.tools
        chosen: Any = choice
        if isinstance(choice, ToolChoice) and choice.type == "function":
            if choice.name is None:
                raise InvalidRequest("tool_choice of type function needs a name.", "tool_choice")
            chosen = {"type": "function", "function": {"name": choice.name}}
        elif isinstance(choice, ToolChoice):
            allowed = {str(tool.get("name")) for tool in choice.tools}
            if lacking := sorted(allowed - {tool.name for tool in tools}):
                raise InvalidRequest(f"tool_choice names {lacking[0][:80]!r}, which is not among the tools.", "tool_choice")
            tools = [tool for tool in tools if tool.name in allowed]
            chosen = choice.mode
        functions = [{"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools]
        return [{"type": "function", "function": function} for function in functions], chosen

    def _response_format(self) -> dict[str, Any] | None:
        wanted = self.text.format
        if wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.schema_ is None:
            raise InvalidRequest("text.format of type json_schema needs its schema.", "text.format.schema")
        return {"type": wanted.type, "json_schema": {"name": wanted.name, "schema": wanted.schema_}}
