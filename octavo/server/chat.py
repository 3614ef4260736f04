"""POST /v1/chat/completions. A non-streamed answer is the joined stream, so there is one way to parse a message."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from octavo.errors import InvalidRequest
from octavo.frontend.engine_stream import Tap
from octavo.frontend.outputs import Delta
from octavo.images import PlacedImage
from octavo.messages import SamplingParams
from octavo.server.chat_images import HeldImages
from octavo.server.chat_pieces import Piece, WholeChoice, told
from octavo.server.chat_tools import ChatTools
from octavo.server.completions import Usage, stream_extras
from octavo.server.events import MARK, Chunk, Event, EventStream, Frame, Writer, encoded, head_of
from octavo.server.http import Answer
from octavo.server.logprobs import chat_logprobs, prompt_logprobs
from octavo.server.parsers.reasoning import MessageReader, ThinkKeeper, ThinkSplitter, make_splitter
from octavo.server.parsers.registry import call_form, id_maker
from octavo.server.protocol import ChatInput, ChatRequest, TokenizeRequest
from octavo.server.serving import Served
from octavo.server.structured import structured_output
from octavo.text.tool_prompt import CallForm

__all__ = ["ChatJob", "begin", "chat", "count_tokens", "read_chat"]

_CHUNK = "chat.completion.chunk"
_TEXTS = frozenset({"content", "reasoning_content"})  # parts of a delta that are texts
_THINKING = frozenset({"enable_thinking", "thinking"})  # switches of most chat templates, and of DeepSeek's and Kimi's


async def chat(served: Served, request: ChatRequest, request_id: str) -> Answer:
    """Answers a chat request: an object, or the chunks of a stream."""
    served.check_model(request.model)
    job = await begin(served, request, f"chatcmpl-{request.request_id or request_id}")
    return job.stream() if request.stream else await job.whole()


async def begin(served: Served, request: ChatRequest, response_id: str) -> ChatJob:
    """Sends the request to the engine. What it holds here of images ends with this call and not with the answer."""
    tools = ChatTools(served, request)
    text, prompt, placed, held = await read_chat(served, request, tools.form)
    params = await served.with_grammar(_params(served, request, tools, len(prompt)))
    tap = Tap()
    deltas = served.generate(prompt, params, response_id, request.cache_salt, placed, tap)
    job = ChatJob(served, request, response_id, _Prompt(text, prompt), deltas, params, tools, tap)
    job.held = held
    return job


async def count_tokens(served: Served, request: ChatRequest) -> int:
    """How many tokens the prompt of a chat has, tools and images included."""
    return len((await read_chat(served, request, ChatTools(served, request).form, served.most_listed))[1])


async def read_chat(
    served: Served, request: ChatRequest | TokenizeRequest, calls: CallForm | None = None, limit: int | None = None
) -> tuple[str, list[int], tuple[PlacedImage, ...], HeldImages]:
    """The prompt of a chat: its text, its token ids, and its images in their places. `calls` and `limit`: see `_prompt_text`
    and `Served.encode`.
    """
    images = served.images.take(request)
    text = await _prompt_text(served, request, calls)
    ids = await served.encode(text, bool(request.add_special_tokens), limit)
    return text, *await served.images.place(ids, images)


async def _prompt_text(served: Served, request: ChatInput | TokenizeRequest, calls: CallForm | None) -> str:
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


def _params(served: Served, request: ChatRequest, tools: ChatTools, num_prompt_tokens: int) -> SamplingParams:
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if limit is None:
        limit = served.max_tokens_for(num_prompt_tokens)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    structured = structured_output(request)
    if tools.structured is not None:
        if structured is not None and structured.param != "response_format":  # which is about text, and calls are none
            raise InvalidRequest("A forced tool_choice and a structured output exclude each other.", "tool_choice")
        structured = tools.structured
    fixed = {"skip_special_tokens": False} if tools.keep_special or served.thinks_in_special_tokens else {}
    return served.sampling(request, max_tokens=limit, logprobs=logprobs, structured=structured, **fixed)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """The prompt, as text and token ids."""

    text: str
    token_ids: list[int]


class ChatJob:
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
        tools: ChatTools,
        tap: Tap,
    ):
        self.served, self.request, self.params, self.tools = served, request, params, tools
        self.usage, self.generated, self._tap = Usage(len(prompt.token_ids)), deltas, tap
        self.prompt_fields: dict[str, Any] = {"prompt_token_ids": prompt.token_ids} if request.return_token_ids else {}
        self.prompt_fields |= {"prompt_text": prompt.text} if request.return_prompt_text else {}
        self.head = {"id": response_id, "created": int(time.time()), "model": request.model or served.names[0]}
        ids = id_maker(served.tool_parser, sum(len(one.get("tool_calls") or ()) for one in request.messages))
        how = ids, request.parallel_tool_calls
        self.readers = [MessageReader(tools.reader(), self._splitter(prompt.text), *how) for _ in range(params.n)]
        self.prompt_logprobs: list[Any] | None = None
        if any(reader.splits for reader in self.readers):
            self.usage.reasoning_tokens = 0
        self._chunk_head = head_of({**self.head, "object": _CHUNK})
        self._begun: set[int] = set()  # choices of a stream
        # whether chunks with a text of one kind, but for the last, differ in that alone
        self._uniform = not (request.logprobs or request.return_token_ids or request.stream_options.continuous_usage_stats)
        self._frames: dict[tuple[int, str], Frame] = {}  # by choice and kind

    def _splitter(self, prompt: str) -> ThinkSplitter | ThinkKeeper | None:
        name = self.served.reasoning_parser
        if name is None or self.params.structured is not None:  # a grammar permits no thinking
            return None
        return make_splitter(name, prompt)

    def stream(self) -> EventStream:
        """For each choice a chunk with its role, then one per engine step, because clients time them, but for a step of which
        nothing is told yet."""
        return EventStream(self._events(), self._open)

    async def whole(self) -> dict[str, Any]:
        """All choices, complete."""
        made = [WholeChoice() for _ in self.readers]

        def collect(delta: Delta) -> bool:
            made[delta.index].add(self._read(delta))
            return True

        self._tap.take = collect
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                made[piece.index].add(piece)
        choices = []
        for i, one in enumerate(made):
            fields = {"message": one.message(), **self._ids(one.token_ids)}
            choices.append(_choice(i, fields, {"content": one.logprobs} if self.request.logprobs else None, *one.end))
        answer = {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage.dict()}
        answer |= self.prompt_fields
        return answer if self.prompt_logprobs is None else {**answer, "prompt_logprobs": self.prompt_logprobs}

    async def _events(self) -> AsyncGenerator[Event, None]:
        first_fields = self.prompt_fields
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                if piece.index not in self._begun:
                    self._begun.add(piece.index)
                    choices = [_choice(piece.index, {"delta": {"role": "assistant", "content": ""}}, None, None)]
                    first = {"choices": choices, **stream_extras(self.request, self.usage), **first_fields}
                    if piece.index or self.prompt_logprobs is None:
                        yield Chunk(self._chunk_head, first)
                    else:  # they may be megabytes, and come with the first choice
                        yield {**self.head, "object": _CHUNK, **first, "prompt_logprobs": self.prompt_logprobs}
                    first_fields = {}
                if piece.tells:
                    yield self._chunk(piece)
        if self.request.stream_options.include_usage:
            yield {**self.head, "object": _CHUNK, "choices": [], "usage": self.usage.dict()}

    def _open(self, writer: Writer) -> None:
        self._tap.take = partial(self._write, writer)

    def _write(self, writer: Writer, delta: Delta) -> bool:
        """Writes the chunk of a delta that is neither its choice's first nor its last."""
        if not writer.ready or delta.index not in self._begun:
            return False
        piece = self._read(delta)
        if not piece.tells:
            return True
        if not self._uniform or len(piece.message) != 1 or (kind := next(iter(piece.message))) not in _TEXTS:
            writer.write(encoded(self._chunk(piece)))
            return True
        if (frame := self._frames.get((piece.index, kind))) is None:
            example = Piece(piece.index, {kind: MARK}, None, None, None, [])
            frame = self._frames[piece.index, kind] = Frame(self._chunk(example))
        writer.write(frame.event(piece.message[kind]))
        return True

    def _chunk(self, piece: Piece) -> Chunk:
        fields = {"delta": told(piece.message), **self._ids(piece.token_ids)}
        choice = _choice(piece.index, fields, piece.logprobs, piece.finish_reason, piece.stop_reason)
        return Chunk(self._chunk_head, {"choices": [choice], **stream_extras(self.request, self.usage)})

    def _ids(self, token_ids: list[int]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self.request.return_token_ids else {}

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The parsed steps of all choices as they come. Closing it aborts the request."""
        async with aclosing(self.generated) as deltas:
            async for delta in deltas:
                yield self._read(delta)

    def _read(self, delta: Delta) -> Piece:
        """The piece of a delta. Counts its tokens."""
        self.usage.add(0, delta)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = prompt_logprobs(self.served.tokenizer, delta.prompt_logprobs)
        reader = self.readers[delta.index]
        reason: str | None = delta.finish_reason
        message = reader.feed(delta.text, final=reason is not None)
        if self.usage.reasoning_tokens is not None and reader.thinking:
            self.usage.reasoning_tokens += len(delta.token_ids)
        if not self.request.include_reasoning:
            message.pop("reasoning_content", None)
        if reason == "stop" and reader.calls and self.tools.named is None:  # for a named tool_choice OpenAI returns "stop"
            reason = "tool_calls"
        logprobs = None
        if self.request.logprobs and delta.logprobs is not None:
            logprobs = chat_logprobs(self.served.tokenizer, delta.logprobs, self.request.return_tokens_as_token_ids)
        ids = delta.token_ids if self.request.return_token_ids else []
        return Piece(delta.index, message, logprobs, reason, delta.stop_reason, ids)


def _choice(
    index: int,
    fields: dict[str, Any],
    logprobs: dict[str, Any] | None,
    reason: str | None,
    stop_reason: int | str | None = None,
) -> dict[str, Any]:
    return {"index": index, **fields, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stop_reason}
