"""The requests of the OpenAI API with vLLM's extensions: the supported fields.

`request_fields.py` handles the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from octavo.errors import InvalidRequest
from octavo.server.request_fields import CHAT, CHAT_TEMPLATE, COMPLETION, STRUCTURED_OUTPUTS, Fate, refuse_fields

__all__ = [
    "ApiModel",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "Function",
    "GenerationRequest",
    "Invocation",
    "NamedToolChoice",
    "ObjectWithFates",
    "Objects",
    "ResponseFormat",
    "Strings",
    "StructuredOutputs",
    "TokenizeRequest",
    "Tool",
]

MAX_TOOLS = 4096  # the server processes their schemas at every request

# Validation of a list stops at the first error, because finding all could take long.
Strings = Annotated[list[str], Field(fail_fast=True)]
Integers = Annotated[list[int], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class ApiModel(BaseModel):
    """A JSON object in which null means the same as an absent field."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data

    @classmethod
    def model_for(cls, data: Mapping[str, Any]) -> type[ApiModel]:
        """The model of a body that was sent for this one."""
        return cls


class ObjectWithFates(ApiModel):
    """An object whose every known field is served, refused, or harmless. `where`: what precedes a field's name in errors."""

    fates: ClassVar[Mapping[str, Fate]] = {}
    where: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            refuse_fields(cls.fates, data, cls.where)
        return data


class StreamOptions(ApiModel):
    """Options of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(ApiModel):
    """The schema of `response_format`."""

    name: str = ""
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")


class ResponseFormat(ApiModel):
    """OpenAI's request for structured output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(ObjectWithFates):
    """vLLM's request for structured output: one of these."""

    fates = STRUCTURED_OUTPUTS
    where = "structured_outputs."

    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_none(cls, data: Any) -> Any:
        """A misspelt constraint would be none at all."""
        if isinstance(data, Mapping) and data and not set(data) & (STRUCTURED_OUTPUTS.keys() | {"json"}):
            raise InvalidRequest(
                "structured_outputs has no constraint; give one of json, json_object, regex, choice, grammar, or leave it out.",
                "structured_outputs",
            )
        return data


class GenerationRequest(ObjectWithFates):
    """The fields that completions and chat share. None: absent from the request, so the model's default applies."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Strings | None = None
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: Strings | None = None
    allowed_token_ids: Integers | None = None
    skip_special_tokens: bool | None = None

    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    request_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs = StructuredOutputs()
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    fates = COMPLETION

    prompt: Any = None  # validated by hand: a union would try every branch on each of 100,000 token ids
    echo: bool = False
    logprobs: int | None = None


class Function(ApiModel):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(ApiModel):
    """An entry of `tools`."""

    type: Literal["function"] = "function"
    function: Function


class FunctionName(ApiModel):
    """The name inside NamedToolChoice."""

    name: str


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class NamedToolChoice(ApiModel):
    """A `tool_choice` that names one function."""

    type: Literal["function"] = "function"
    function: FunctionName


class _WithoutTemplate(ApiModel):
    """Messages that only the server's chat template may render."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_template(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            refuse_fields({"chat_template": CHAT_TEMPLATE}, data)
        return data


class ChatInput(_WithoutTemplate):
    """Messages and how to render them."""

    messages: Annotated[Objects, Field(min_length=1)]
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    documents: Objects | None = None


class ChatRequest(ChatInput, GenerationRequest):
    """POST /v1/chat/completions."""

    fates = CHAT

    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    return_prompt_text: bool = False


class Invocation(ApiModel):
    """POST /invocations, SageMaker's one path for all: a chat if there are messages, a completion if there is a prompt."""

    @classmethod
    def model_for(cls, data: Mapping[str, Any]) -> type[ApiModel]:
        """Raises InvalidRequest for a body that is neither."""
        if data.get("messages") is not None:
            return ChatRequest
        if data.get("prompt") is not None:
            return CompletionRequest
        raise InvalidRequest("The body needs messages, for a chat, or a prompt, for a completion.")


class TokenizeRequest(_WithoutTemplate):
    """POST /tokenize: a prompt, or messages as in a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Objects, Field(min_length=1)] | None = None
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeRequest(ApiModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: Integers
