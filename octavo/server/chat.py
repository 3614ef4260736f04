"""POST /v1/chat/completions. A non-streamed answer is the joined stream, so there is one way to parse a message."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from octavo.errors import InvalidRequest
from octavo.frontend.outputs import Delta
from octavo.messages import SamplingParams, StructuredOutput
from octavo.server.chat_images import HeldImages
from octavo.server.completions import Usage, stream_extras
from octavo.server.http import Answer
from octavo.server.logprobs import chat_logprobs, prompt_logprobs
from octavo.server.parsers.argument_types import ArgumentTypes
from octavo.server.parsers.call import CallParser, NamedCall
from octavo.server.parsers.reasoning import MessageReader, ThinkKeeper, ThinkSplitter, join_delta, joined, make_splitter
from octavo.server.parsers.registry import call_form, id_maker, keeps_special, make_parser
from octavo.server.protocol import ChatInput, ChatRequest, NamedToolChoice, TokenizeRequest
from octavo.server.serving import Served
from octavo.server.structured import arguments_of, calls_of, structured_output
from octavo.text.tool_prompt import CallForm

__all__ = ["chat", "chat_prompt"]

_THINKING = frozenset({"enable_thinking", "thinking"})  # switches of most chat templates, and of DeepSeek's and Kimi's


async def chat(served: Served, request: ChatRequest, request_id: str) -> Answer:
    """Answers a chat request: an object, or the chunks of a stream."""
    served.check_model(request.model)
    job = await _begin(served, request, f"chatcmpl-{request.request_id or request_id}")
    return job.stream() if request.stream else await job.whole()


async def _begin(served: Served, request: ChatRequest, response_id: str) -> _Job:
    """Sends the request to the engine. What it holds here of images ends with this call and not with the answer."""
    tools = _Tools(served, request)
    images = served.images.take(request)
    text = await chat_prompt(served, request, tools.form)
    prompt = await served.encode(text, bool(request.add_special_tokens))
    prompt, placed, held = await served.images.place(prompt, images)
    params = _params(served, request, tools, len(prompt))
    await served.validate(params.structured)
    deltas = served.generate(prompt, params, response_id, request.cache_salt, placed)
    job = _Job(served, request, response_id, _Prompt(text, prompt), deltas, params, tools)
    job.held = held
    return job


async def chat_prompt(served: Served, request: ChatInput | TokenizeRequest, calls: CallForm | None = None) -> str:
    """The rendered prompt. `calls`: the format of tool calls to describe, if the model's template does not describe one."""
    tools = None
    if request.tools and getattr(request, "tool_choice", None) != "none":
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    effort = getattr(request, "reasoning_effort", None)
    asked: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if asked and not request.chat_template_kwargs.keys() & _THINKING:
        asked |= dict.fromkeys(_THINKING, effort != "none")
    switches = {
        **served.template_kwargs,
        **asked,
        **request.chat_template_kwargs,
        "documents": getattr(request, "documents", None),
    }
    return await served.render(
        request.messages or [],
        tools,
        request.add_generation_prompt,
        switches,
        continues=request.continue_final_message,
        calls=calls or call_form(served.tool_parser),
    )


def _params(served: Served, request: ChatRequest, tools: _Tools, num_prompt_tokens: int) -> SamplingParams:
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if limit is None:
        limit = served.max_tokens_for(num_prompt_tokens)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    structured = structured_output(request)
    if tools.structured is not None:
        if structured is not None:
            raise InvalidRequest("A forced tool_choice and a structured output exclude each other.", "tool_choice")
        structured = tools.structured
    fixed = {"skip_special_tokens": False} if tools.keep_special or served.thinks_in_special_tokens else {}
    return served.sampling(request, max_tokens=limit, logprobs=logprobs, structured=structured, **fixed)


class _Tools:
    """What the request's tools and tool_choice mean for the grammar and for parsing the answer."""

    def __init__(self, served: Served, request: ChatRequest):
        names = [tool.function.name for tool in request.tools or ()]
        self.types = ArgumentTypes({tool.function.name: tool.function.parameters for tool in request.tools or ()})
        choice = request.tool_choice if request.tool_choice is not None else ("auto" if names else "none")
        if not names and choice not in ("none", "auto"):
            raise InvalidRequest("tool_choice needs tools to choose from.", "tool_choice")
        self.named = choice.function.name if isinstance(choice, NamedToolChoice) else None
        if self.named is not None and self.named not in names:
            raise InvalidRequest(f"tool_choice names '{self.named}', which is not among the tools.", "tool_choice")
        self.parser: str | None = None
        self.structured: StructuredOutput | None = None
        if self.named is not None:
            function = next(tool.function for tool in request.tools or () if tool.function.name == self.named)
            self.structured = arguments_of(function)
        elif choice == "required":
            self.parser = "json"
            self.structured = calls_of(request.tools or (), not request.parallel_tool_calls)
        elif choice == "auto" and names:
            self.parser = served.tool_parser
        self.form = replace(call_form(self.parser or served.tool_parser), named=self.named)
        self.keep_special = self.parser is not None and keeps_special(self.parser)

    def reader(self) -> CallParser | None:
        """The parser of calls for one choice, if it may contain any."""
        if self.named is not None:
            return NamedCall(self.named)
        return make_parser(self.parser, self.types) if self.parser else None


@dataclass(frozen=True, slots=True)
class _Prompt:
    """The prompt, as text and token ids."""

    text: str
    token_ids: list[int]


class _Job:
    """One chat request in progress."""

    held: HeldImages  # of the engine's memory, until the job is dropped

    def __init__(
        self,
        served: Served,
        request: ChatRequest,
        response_id: str,
        prompt: _Prompt,
        deltas: AsyncGenerator[Delta, None],
        params: SamplingParams,
        tools: _Tools,
    ):
        self.served, self.request, self.params, self.tools = served, request, params, tools
        self.usage, self.generated = Usage(len(prompt.token_ids)), deltas
        self.prompt_fields: dict[str, Any] = {"prompt_token_ids": prompt.token_ids} if request.return_token_ids else {}
        self.prompt_fields |= {"prompt_text": prompt.text} if request.return_prompt_text else {}
        self.head = {"id": response_id, "created": int(time.time()), "model": request.model or served.names[0]}
        ids = id_maker(served.tool_parser, sum(len(one.get("tool_calls") or ()) for one in request.messages))
        self.readers = [MessageReader(tools.reader(), self._splitter(prompt.text), ids) for _ in range(params.n)]
        self.prompt_logprobs: list[Any] | None = None

    def _splitter(self, prompt: str) -> ThinkSplitter | ThinkKeeper | None:
        name = self.served.reasoning_parser
        if name is None or self.params.structured is not None:  # a grammar permits no thinking
            return None
        return make_splitter(name, prompt)

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """For each choice a chunk with its role, then one chunk per engine step, because clients time the chunks."""
        head = {**self.head, "object": "chat.completion.chunk"}
        begun: set[int] = set()
        first_fields = self.prompt_fields
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                extras = stream_extras(self.request, self.usage)
                if delta.index not in begun:
                    begun.add(delta.index)
                    first = {"role": "assistant", "content": ""}
                    yield {**head, "choices": [_choice(delta.index, {"delta": first}, None, None)], **extras, **first_fields}
                    first_fields = {}
                message, logprobs, reason = self._read(delta)
                fields = {"delta": message, **self._ids(delta.token_ids)}
                yield {**head, "choices": [_choice(delta.index, fields, logprobs, reason, delta.stop_reason)], **extras}
        if self.request.stream_options.include_usage:
            yield {**head, "choices": [], "usage": self.usage.dict()}

    async def whole(self) -> dict[str, Any]:
        """All choices, complete."""
        messages: list[dict[str, Any]] = [{} for _ in self.readers]
        logprobs: list[list[Any]] = [[] for _ in self.readers]
        token_ids: list[list[int]] = [[] for _ in self.readers]
        ends: list[tuple[str | None, int | str | None]] = [(None, None)] * len(self.readers)
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                message, known, reason = self._read(delta)
                join_delta(messages[delta.index], message)
                token_ids[delta.index] += delta.token_ids
                logprobs[delta.index] += known["content"] if known else []
                ends[delta.index] = (reason, delta.stop_reason)
        choices = []
        for i, message in enumerate(messages):
            fields = {"message": _message(message), **self._ids(token_ids[i])}
            choices.append(_choice(i, fields, {"content": logprobs[i]} if self.request.logprobs else None, *ends[i]))
        answer = {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage.dict()}
        answer |= self.prompt_fields
        return answer if self.prompt_logprobs is None else {**answer, "prompt_logprobs": self.prompt_logprobs}

    def _ids(self, token_ids: list[int]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self.request.return_token_ids else {}

    async def _deltas(self) -> AsyncGenerator[Delta, None]:
        async with aclosing(self.generated) as deltas:
            async for delta in deltas:
                self.usage.add(0, delta)
                if delta.prompt_logprobs is not None:
                    self.prompt_logprobs = prompt_logprobs(self.served.tokenizer, delta.prompt_logprobs)
                yield delta

    def _read(self, delta: Delta) -> tuple[dict[str, Any], dict[str, Any] | None, str | None]:
        reader = self.readers[delta.index]
        reason: str | None = delta.finish_reason
        message = reader.feed(delta.text, final=reason is not None)
        if not self.request.include_reasoning:
            message.pop("reasoning_content", None)
        if reason == "stop" and reader.calls and self.tools.named is None:  # for a named tool_choice OpenAI returns "stop"
            reason = "tool_calls"
        logprobs = None
        if self.request.logprobs and delta.logprobs is not None:
            logprobs = chat_logprobs(self.served.tokenizer, delta.logprobs, self.request.return_tokens_as_token_ids)
        return message, logprobs, reason


def _choice(
    index: int,
    fields: dict[str, Any],
    logprobs: dict[str, Any] | None,
    reason: str | None,
    stop_reason: int | str | None = None,
) -> dict[str, Any]:
    return {"index": index, **fields, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stop_reason}


def _message(deltas: dict[str, Any]) -> dict[str, Any]:
    parts = joined(deltas)
    content = parts.get("content", "")
    return {"role": "assistant", **parts, "content": content if content.strip() or not parts.get("tool_calls") else None}
