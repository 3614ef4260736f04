"""The engine as the endpoints use it: model names, defaults, prompts, and generations with metrics."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.engine_stream import Tap
from octavo.frontend.outputs import Delta
from octavo.images import PlacedImage
from octavo.messages import SamplingParams, StructuredOutput
from octavo.server.chat_images import ChatImages
from octavo.server.error_responses import ApiError
from octavo.server.http import GateState
from octavo.server.metrics import Metrics
from octavo.server.parsers.reasoning import CLOSE, OPEN
from octavo.server.protocol import GenerationRequest
from octavo.server.responses.response_store import ResponseStore
from octavo.server.side_processes import SideProcesses, side_processes
from octavo.text.chat_prompt import render_conversation
from octavo.text.chat_template import render_chat
from octavo.text.llguidance_grammar import serialize
from octavo.text.tokenizer import Tokenizer
from octavo.text.tool_prompt import PLAIN_CALLS, CallForm, shows_tools

if TYPE_CHECKING:
    from octavo.frontend.operations import Operations
    from octavo.frontend.router import Engine
    from octavo.server.engine_metrics import RequestWatch

__all__ = ["Served"]

_SAMPLING_FIELDS = GenerationRequest.model_fields.keys() & {field.name for field in fields(SamplingParams)}
_TEMPLATE_ARGUMENTS = frozenset(inspect.signature(render_chat).parameters)
_MOST_GRAMMARS = 16  # that are kept: clients often send the same schema with every request
_LONG_TEXT = 2_000  # characters, a millisecond or two; more is encoded in a thread, to keep other streams going
_MAX_RENDERED = 2**24  # characters of a rendered chat template


def _rendered(conversation: tuple[Any, ...], how: dict[str, Any]) -> str:
    try:
        text = render_conversation(*conversation, **how)
    except OctavoError as error:  # includes an invalid template
        raise InvalidRequest(str(error), getattr(error, "param", "messages")) from error
    if len(text) > _MAX_RENDERED:
        raise InvalidRequest(f"The chat template makes {len(text)} characters of these messages; send less.", "messages")
    return text


@dataclass
class Served:
    """One model under one or more names."""

    engine: Engine
    names: Sequence[str]
    metrics: Metrics
    chat_template: str | None = None  # replaces the checkpoint's
    content_format: str = "auto"  # format of message content that the template expects
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables of the template that requests may override
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    engine_timeout: float = 0.0  # seconds without a step after which a busy engine is considered stalled; 0: never
    side: SideProcesses = field(default_factory=side_processes)
    images: ChatImages = field(default_factory=ChatImages)
    gate: GateState = field(default_factory=GateState)
    operations: Operations | None = None
    log_request: Callable[[str, RequestWatch, SamplingParams, list[int]], None] | None = None  # once it has ended
    responses: ResponseStore = field(default_factory=ResponseStore)
    created: int = field(default_factory=lambda: int(time.time()))
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _grammars: dict[StructuredOutput, str] = field(default_factory=dict)  # in llguidance's format, the latest last

    @property
    def stalled(self) -> bool:
        """Whether the engine has had work for longer than engine_timeout without a step."""
        return 0 < self.engine_timeout < self.engine.silent_seconds

    @property
    def most_listed(self) -> int:
        """Most tokens of a prompt that is only counted or listed: the context length, or more if that is short."""
        return max(self.engine.info.max_model_len, 2**17)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises InvalidRequest if the checkpoint has none."""
        if self.engine.tokenizer is None:
            raise InvalidRequest("This checkpoint has no tokenizer.json; send the prompt as token ids.", "prompt")
        return self.engine.tokenizer

    @property
    def thinks_in_special_tokens(self) -> bool:
        """Whether the tags of thinking are special tokens, which detokenization must keep for the reasoning parser."""
        if self.reasoning_parser is None or self.engine.tokenizer is None:
            return False
        return any(self.engine.tokenizer.token_id(tag) in self.engine.tokenizer.special_ids for tag in (OPEN, CLOSE))

    def check_model(self, name: str | None) -> None:
        """Raises a 404 for another model's name. A request without a name means this model."""
        if name is not None and name not in self.names:
            served = f"{' and '.join(self.names)} {'are' if len(self.names) > 1 else 'is'}"
            raise ApiError(404, f"The model '{name}' is not served here; {served}.", "model", "model_not_found")

    async def encode(self, text: str, add_special_tokens: bool = True, limit: int | None = None) -> list[int]:
        """The token ids of a prompt. Raises InvalidRequest for text far longer than `limit` tokens (default: the context)."""
        return (await self.encode_all([text], add_special_tokens, limit))[0]

    async def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool = True, limit: int | None = None
    ) -> list[list[int]]:
        """The token ids of each text, as `encode`; in a thread if the texts are long."""
        if sum(map(len, texts)) < _LONG_TEXT:
            return self._encode(texts, add_special_tokens, limit)
        return await asyncio.to_thread(self._encode, texts, add_special_tokens, limit)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool, limit: int | None) -> list[list[int]]:
        tokenizer, most = self.tokenizer, self.engine.info.max_model_len
        for text in texts:
            if tokenizer.exceeds(text, limit or most):
                fit = f"{limit} are read" if limit else f"{most - 1} fit beside one to generate"
                raise InvalidRequest(f"The prompt has more than {limit or most} tokens; at most {fit}.", "prompt")
        return [tokenizer.encode(text, add_special_tokens) for text in texts]

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        switches: Mapping[str, Any],
        continues: bool = False,
        calls: CallForm = PLAIN_CALLS,
    ) -> str:
        """Renders a chat's prompt. `switches`: variables of the template. `continues`: the last message is to be continued.
        `calls`: the call format to describe, for a template that does not.

        A template is a program, so it runs in a separate process, which may die without harm.
        """
        chosen = self.template_for(bool(tools))
        if chosen is None:
            raise InvalidRequest(
                "The model has no chat template; use /v1/completions, or start with --chat-template.", "messages"
            )
        variables = {name: value for name, value in switches.items() if name not in _TEMPLATE_ARGUMENTS}
        conversation = (chosen, messages, self.tokenizer.special_tokens, tools, add_generation_prompt)
        how = {"continue_final_message": continues, "content": self.content_format, "switches": variables, "calls": calls}
        how |= {"image_text": self.images.text, "video_text": self.images.video_text}
        return await self.side.run("Rendering the chat template", _rendered, conversation, how)

    def template_for(self, tools: bool) -> str | None:
        """The chat template in use, if there is one."""
        return self.chat_template or self.tokenizer.template_for(tools)

    async def tools_note(self) -> str | None:
        """A note for the log if the chat template does not show a request's tools to the model."""
        template = self.template_for(tools=True) if self.engine.tokenizer else None
        if template is None:
            return None
        try:
            if await self.side.run("Rendering the chat template", shows_tools, template):
                return None
        except InvalidRequest as error:
            return f"the chat template cannot be tried: {error}"
        form = f"in the form of --tool-call-parser {self.tool_parser}" if self.tool_parser else "as JSON"
        return f"the chat template does not print tools: a request's are put into its system message, to be called {form}."

    def max_tokens_for(self, num_prompt_tokens: int, most: int | None = None) -> int | None:
        """The default max_tokens: the model's recommendation, at most `most`, limited to what fits."""
        recommended = self.tokenizer.default_sampling.get("max_tokens") if self.engine.tokenizer else None
        known = [limit for limit in (recommended, most) if limit is not None]
        return max(1, min(*known, self.engine.info.max_model_len - num_prompt_tokens)) if known else None

    def sampling(
        self,
        request: GenerationRequest,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        structured: StructuredOutput | None,
        **fixed: Any,
    ) -> SamplingParams:
        """Sampling parameters: the request's values, else the model's recommended ones, else SamplingParams' defaults."""
        tokenizer = self.engine.tokenizer
        recommended = tokenizer.default_sampling if tokenizer else {}
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
        asked = {"max_tokens": max_tokens, "logprobs": logprobs, "structured": structured}
        return SamplingParams(**{**recommended, **given, **asked, **fixed})

    async def with_grammar(self, params: SamplingParams) -> SamplingParams:
        """The parameters, with the grammar of their structured output as the engine takes it. Raises InvalidRequest for one
        that cannot be used.

        A side process reads it, since a few lines of schema or grammar may ask for any amount of computing and memory.
        """
        if (wanted := params.structured) is None:
            return params
        if (grammar := self._grammars.pop(wanted, None)) is None:
            try:
                grammar = await self.side.run(f"Reading {wanted.param}", serialize, wanted)
            except InvalidRequest as error:
                raise InvalidRequest(str(error), wanted.param) from error
        self._grammars[wanted] = grammar  # the latest is last
        if len(self._grammars) > _MOST_GRAMMARS:
            del self._grammars[next(iter(self._grammars))]
        return replace(params, structured=replace(wanted, llguidance=grammar))

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        response_id: str,
        cache_salt: str | None = None,
        images: Sequence[PlacedImage] = (),
        tap: Tap | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The engine's deltas, with metrics, except those that `tap` takes. Closing the generator aborts the request.

        Raises InvalidRequest at the call for what the engine would refuse, before any of the answer is sent.
        """
        request_id = f"{response_id}-{next(self._numbers)}"  # unique, even if two clients send the same X-Request-Id
        number = self.engine.route(prompt, cache_salt, images)
        generated = self.engine.generate(prompt, params, request_id, cache_salt, images, number, tap)
        return self._counted(generated, request_id, prompt, params, number, tap)

    async def _counted(
        self,
        generated: AsyncGenerator[Delta, None],
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        number: int,
        tap: Tap | None,
    ) -> AsyncGenerator[Delta, None]:
        watch = self.metrics.watch(request_id, len(prompt), params.n, number, params.max_tokens)
        if tap is not None:
            tap.saw = watch.saw
        try:
            async with aclosing(generated) as deltas:
                async for delta in deltas:
                    watch.saw(delta)
                    yield delta
        except OctavoError:
            watch.failed()
            raise
        finally:
            if tap is not None:
                tap.close()
            watch.close()
            if self.log_request is not None:
                self.log_request(request_id, watch, params, prompt)
