"""The bodies of POST /v1/messages and /v1/messages/count_tokens, and the chat that they ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from octavo.errors import InvalidRequest
from octavo.server.anthropic.message_blocks import chat_messages, continues, system_message
from octavo.server.anthropic.message_fields import MESSAGES, OUTPUT_CONFIG
from octavo.server.protocol import MAX_TOOLS, ChatRequest, Objects, ObjectWithFates, Strings

__all__ = ["CHAT_NAMES", "CountTokensRequest", "MessagesRequest"]

# A chat's field -> the field that it is made of. Errors name the latter.
CHAT_NAMES = {
    **{"prompt": "messages", "stop": "stop_sequences", "response_format": "output_config.format"},
    "reasoning_effort": "output_config.effort",
}


class Tool(ObjectWithFates):
    """An entry of `tools`."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise InvalidRequest(f"A tool of type {kind[:80]!r} is not served; the tools are your own functions.", "tools")
        return data

    def function(self) -> dict[str, Any]:
        """As chats have it."""
        parameters = {"type": "object", **self.input_schema}
        return {"name": self.name, "description": self.description, "parameters": parameters}


class ToolChoice(ObjectWithFates):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(ObjectWithFates):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    display: Literal["summarized", "omitted"] = "summarized"


class OutputFormat(ObjectWithFates):
    """`output_config.format`."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(ObjectWithFates):
    """`output_config`."""

    fates = OUTPUT_CONFIG
    where = "output_config."

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(ObjectWithFates):
    """POST /v1/messages/count_tokens, and what /v1/messages shares with it. `chat`: what it asks for, as a chat."""

    fates = MESSAGES

    model: str | None = None
    messages: Annotated[Objects, Field(min_length=1)]
    system: Any = None  # a text, or a list of blocks: validated by hand, for one sentence
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    _chat: ChatRequest = PrivateAttr()

    @property
    def chat(self) -> ChatRequest:
        """The chat."""
        return self._chat

    def model_post_init(self, context: Any, /) -> None:
        """Translates here, since a large body is validated in a process of its own."""
        messages = chat_messages(self.messages)
        prefilled = continues(messages)
        messages = [*system_message(self.system, self.messages), *messages]
        self.messages, self.system = [], None  # they need not be kept, or sent between processes, twice
        chat = {**self._sampling(), **self._thinking(), **self._calls(), "model": self.model}
        chat |= {"continue_final_message": prefilled, "add_generation_prompt": not prefilled}
        if (wanted := self.output_config.format) is not None:
            chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}
        self._chat = ChatRequest.model_validate({**chat, "messages": [{"role": "user"}]})
        self._chat.messages = messages

    def _sampling(self) -> dict[str, Any]:
        return {}

    def _thinking(self) -> dict[str, Any]:
        """Whether the model thinks, in the words of chat templates; the model's default where nothing is said."""
        switches = self.chat_template_kwargs
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            switches = {"enable_thinking": thinks, "thinking": thinks, **switches}
        shown = self.thinking is None or self.thinking.display != "omitted"
        effort = {"reasoning_effort": self.output_config.effort}
        return {**effort, "chat_template_kwargs": switches, "include_reasoning": shown}

    def _calls(self) -> dict[str, Any]:
        tools = [{"type": "function", "function": tool.function()} for tool in self.tools]
        choice = self.tool_choice
        if choice is None:
            return {"tools": tools}
        if choice.type == "tool" and choice.name is None:
            raise InvalidRequest("tool_choice of type tool needs a name.", "tool_choice")
        chosen: Any = {"type": "function", "function": {"name": choice.name}}
        chosen = {"auto": "auto", "none": "none", "any": "required", "tool": chosen}[choice.type]
        return {"tools": tools, "tool_choice": chosen, "parallel_tool_calls": not choice.disable_parallel_tool_use}


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: Strings | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def _sampling(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_tokens", "stream", "temperature", "top_p", "top_k")}
        return {**own, "stop": self.stop_sequences}
