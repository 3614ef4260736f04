"""POST /v1/completions. A non-streamed answer is the joined stream, so there is one way to make text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from octavo.errors import InvalidRequest
from octavo.frontend.engine_stream import Tap
from octavo.frontend.outputs import Delta
from octavo.messages import Logprobs, SamplingParams
from octavo.server.events import MARK, Chunk, Event, EventStream, Frame, Writer, encoded, head_of
from octavo.server.http import Answer, merge
from octavo.server.logprobs import completion_logprobs, prompt_logprobs
from octavo.server.protocol import CompletionRequest, GenerationRequest
from octavo.server.serving import Served
from octavo.server.structured import structured_output
from octavo.text.detokenizer import read_prompt

__all__ = ["DEFAULT_MAX_TOKENS", "Usage", "complete", "stream_extras"]

DEFAULT_MAX_TOKENS = 16  # OpenAI's default
MAX_SEQUENCES = 4096  # per request: prompts times n
WAITING = 2**14  # most tokens of one request's prompts in the engine's queue at a time, where they delay other requests
_SEQUENCE = 16  # cost in tokens of each of a prompt's n sequences: its first decode step


async def complete(served: Served, request: CompletionRequest, request_id: str) -> Answer:
    """Answers a completion request: an object, or the chunks of a stream."""
    served.check_model(request.model)
    given = _prompts(request.prompt)
    if len(given) > 1 and (sequences := len(given) * max(1, request.n or 1)) > MAX_SEQUENCES:
        raise InvalidRequest(
            f"The request asks for {sequences} answers ({len(given)} prompts, n = {request.n or 1}); at most {MAX_SEQUENCES} "
            "are given, so send several requests.",
            "prompt",
        )
    prompts = await _ids(served, given, request)
    params = await served.with_grammar(_params(served, request, max(map(len, prompts))))
    response_id = f"cmpl-{request.request_id or request_id}"
    tap = Tap() if len(prompts) == 1 else None  # the deltas of several are merged, in which they must not overtake one another
    streams = []
    for prompt in prompts:
        streams.append(served.generate(prompt, params, response_id, request.cache_salt, tap=tap))
        await asyncio.sleep(0)  # lets other streams proceed between two prompts
    job = _Job(served, request, response_id, prompts, streams, params, tap or Tap())
    return job.stream() if request.stream else await job.whole()


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts, from any of OpenAI's four forms."""
    many = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if many and all(isinstance(one, str) or _is_ids(one) for one in many):
        return many
    raise InvalidRequest("prompt should be a string, a list of strings, a list of token ids or a list of such lists.", "prompt")


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and set(map(type, prompt)) == {int}


async def _ids(served: Served, prompts: list[str | list[int]], request: CompletionRequest) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await served.encode_all(texts, request.add_special_tokens is not False)) if texts else iter(())
    return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]


def _params(served: Served, request: CompletionRequest, longest: int) -> SamplingParams:
    if request.echo and request.logprobs is not None and (request.n or 1) > 1:
        raise InvalidRequest("echo with logprobs is served for n = 1 only.", "n")
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = served.max_tokens_for(longest, DEFAULT_MAX_TOKENS)
    fixed: dict[str, Any] = {}
    if request.echo:
        max_tokens = max_tokens or 1  # 0 with echo scores the prompt; the one sampled token is dropped
        if request.logprobs is not None:
            fixed["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    structured = structured_output(request)
    return served.sampling(request, max_tokens=max_tokens, logprobs=request.logprobs, structured=structured, **fixed)


@dataclass(slots=True)
class Usage:
    """The token counts of one HTTP request."""

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int | None = None  # None where no reasoning is split from the content
    cached: dict[int, int] = field(default_factory=dict)  # prompt number -> tokens found in the prefix cache

    def add(self, prompt: int, delta: Delta) -> None:
        """Counts the tokens of one delta."""
        self.completion_tokens += len(delta.token_ids)
        if delta.num_cached_tokens:
            self.cached[prompt] = max(self.cached.get(prompt, 0), delta.num_cached_tokens)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that were found in the prefix cache."""
        return sum(self.cached.values())

    def dict(self) -> dict[str, Any]:
        """The counts as OpenAI's usage object."""
        known = None if self.reasoning_tokens is None else {"reasoning_tokens": self.reasoning_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **({} if known is None else {"completion_tokens_details": known}),
        }


def stream_extras(request: GenerationRequest, usage: Usage) -> dict[str, Any]:
    """The usage field of a chunk with tokens: absent, null until the last chunk, or the counts so far."""
    options = request.stream_options
    if not options.include_usage:
        return {}
    return {"usage": usage.dict() if options.continuous_usage_stats else None}


class _Job:
    """One completion request in progress."""

    def __init__(
        self,
        served: Served,
        request: CompletionRequest,
        response_id: str,
        prompts: list[list[int]],
        streams: list[AsyncGenerator[Delta, None]],
        params: SamplingParams,
        tap: Tap,
    ):
        self.served, self.request, self.prompts, self.streams, self.params = served, request, prompts, streams, params
        self._tap = tap
        self.head = {
            "id": response_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model or served.names[0],
        }
        self._head_bytes = head_of(self.head)
        self.usage = Usage(sum(map(len, prompts)))
        self.starts: dict[int, int] = {}  # choice -> offset of its generated text, after the echoed prompt
        self.only_score = request.echo and request.max_tokens == 0

        # whether chunks of a choice, but for its first and last, differ in their text alone
        self._uniform = params.logprobs is None and not (
            request.return_token_ids or request.stream_options.continuous_usage_stats
        )
        self._frames: dict[int, Frame] = {}  # by choice
        self._choices: dict[int, dict[str, Any]] = {}  # of an answer that is not streamed

    def stream(self) -> EventStream:
        """A chunk for each choice and engine step, even while its text is held back, because clients time the chunks."""
        return EventStream(self._events(), self._open)

    async def whole(self) -> dict[str, Any]:
        """All choices, complete."""
        self._tap.take = self._collect
        async with aclosing(self._deltas()) as deltas:
            async for number, delta in deltas:
                self._add(number, delta)
        choices = self._choices
        for choice in choices.values():
            choice["text"] = "".join(choice["text"])
        return {**self.head, "choices": [choices[i] for i in sorted(choices)], "usage": self.usage.dict()}

    async def _events(self) -> AsyncGenerator[Event, None]:
        async with aclosing(self._deltas()) as deltas:
            async for number, delta in deltas:
                chunk = self._chunk(number, delta)
                yield chunk if delta.prompt_logprobs is None else {**self.head, **chunk.rest}  # which may be megabytes
        if self.request.stream_options.include_usage:
            yield {**self.head, "choices": [], "usage": self.usage.dict()}

    def _open(self, writer: Writer) -> None:
        self._tap.take = partial(self._write, writer)

    def _write(self, writer: Writer, delta: Delta) -> bool:
        """Writes the chunk of a delta that is not its choice's last. Only of a request with one prompt."""
        if not writer.ready or delta.prompt_logprobs is not None:
            return False
        if not self._uniform or delta.index not in self.starts:
            writer.write(encoded(self._chunk(0, delta)))
            return True
        if (frame := self._frames.get(delta.index)) is None:
            frame = self._frames[delta.index] = Frame(self._chunk(0, Delta(delta.index, MARK, [])))
        self.usage.add(0, delta)
        writer.write(frame.event(delta.text))
        return True

    def _collect(self, delta: Delta) -> bool:
        self._add(0, delta)
        return True

    def _add(self, number: int, delta: Delta) -> None:
        choice = self._choices.setdefault(number * self.params.n + delta.index, {})
        if self._uniform and choice and delta.finish_reason is None:
            self.usage.add(number, delta)
            choice["text"].append(delta.text)
        else:
            _join(choice, self._piece(number, delta))

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        costs = [len(prompt) + _SEQUENCE * self.params.n for prompt in self.prompts]
        async with aclosing(merge(self.streams, costs, WAITING)) as merged:
            async for number, delta in merged:
                if self.only_score:
                    delta = replace(delta, text="", token_ids=[], logprobs=None, finish_reason="length", stop_reason=None)
                yield number, delta

    def _chunk(self, number: int, delta: Delta) -> Chunk:
        choices = [self._piece(number, delta)]
        return Chunk(self._head_bytes, {"choices": choices, **stream_extras(self.request, self.usage)})

    def _piece(self, number: int, delta: Delta) -> dict[str, Any]:
        """What a delta adds to its choice. Counts its tokens."""
        self.usage.add(number, delta)
        index = number * self.params.n + delta.index
        begun = index in self.starts
        text, entries, offsets = self._echo(number, delta) if self.request.echo and not begun else ("", [], [])
        start = self.starts.setdefault(index, len(text))
        if delta.logprobs is not None:
            given = delta.offsets if delta.offsets is not None else [0] * len(delta.token_ids)  # None without a tokenizer
            offsets += [start + offset for offset in given[: len(delta.logprobs)]]
            entries += zip(delta.token_ids, delta.logprobs, strict=False)
        text += delta.text
        logprobs = None
        if self.params.logprobs is not None:
            spelled = None if self.request.return_tokens_as_token_ids else self.served.engine.tokenizer
            logprobs = completion_logprobs(spelled, entries, offsets)
        piece: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.request.return_token_ids:
            piece |= {} if begun else {"prompt_token_ids": self.prompts[number]}
            piece["token_ids"] = list(delta.token_ids)
        if self.request.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            piece["prompt_logprobs"] = prompt_logprobs(self.served.engine.tokenizer, delta.prompt_logprobs)
        return piece

    def _echo(self, number: int, delta: Delta) -> tuple[str, list[tuple[int, Logprobs | None]], list[int]]:
        """The prompt as the start of an answer: its text and, if logprobs are asked for, its tokens with their
        log-probabilities, and the tokens' text offsets."""
        prompt = self.prompts[number]
        given = _prompts(self.request.prompt)[number]
        tokenizer = self.served.tokenizer
        text, offsets = read_prompt(tokenizer, prompt, given if isinstance(given, str) else None)
        known = delta.prompt_logprobs if self.params.logprobs is not None else None
        return (text, list(zip(prompt, known, strict=False)), offsets) if known else (text, [], [])


def _join(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    """Adds a piece to its choice. The text stays a list until the end: adding to a string would copy it every time."""
    if not choice:
        choice.update(piece, text=[piece["text"]])
        return
    choice["text"].append(piece["text"])
    choice["finish_reason"], choice["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    if "token_ids" in piece:
        choice["token_ids"] += piece["token_ids"]
    if "prompt_logprobs" in piece:
        choice["prompt_logprobs"] = piece["prompt_logprobs"]
    for key, values in (piece["logprobs"] or {}).items():
        choice["logprobs"][key] += values
