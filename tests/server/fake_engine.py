"""An engine that writes what a test tells it to, with the interface of AsyncEngine and the demo model's tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.frontend.async_engine import EngineDead
from octavo.frontend.engine_stream import Tap
from octavo.frontend.image_support import ImageSupport
from octavo.frontend.outputs import Delta
from octavo.frontend.requests import engine_requests
from octavo.images import PlacedImage
from octavo.messages import EngineInfo, EngineRequest, EngineStats, FinishReason, Logprob, SamplingParams
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer
from octavo.token_logprobs import PackedLogprobs


class FakeEngine:
    """Answers every prompt with `text`, one token a step."""

    count = 1

    alive: tuple[()] = ()  # of those that an operator could pause

    def __init__(self, text: str = " hello world") -> None:
        self.tokenizer = Tokenizer(MODEL_DIR)
        self.info = EngineInfo(1024, 4096, 64, 16, "llama", report=["report"])
        self.images = ImageSupport()
        self.text = text
        self.healthy = True
        self.fail_after: int | None = None  # tokens, then the engine dies
        self.delay = 0.0
        self.calls: list[tuple[list[int], SamplingParams, str]] = []
        self.requests: list[EngineRequest] = []  # what an engine would have been asked
        self.aborted: list[str] = []
        self.listeners: list[Callable[[EngineStats], None]] = []
        self.silent_seconds = 0.0
        self._failure: OctavoError | None = None
        self._death: asyncio.Queue[str] = asyncio.Queue()

    async def end_if_a_rank_hangs(self) -> None:
        pass

    def add_stats_listener(self, listener: Callable[[EngineStats], None]) -> None:
        self.listeners.append(listener)

    def route(self, prompt: Sequence[int], salt: str | None = None, images: Sequence[PlacedImage] = ()) -> int:
        return 0

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        cache_salt: str | None = None,
        images: Sequence[PlacedImage] = (),
        number: int = 0,
        tap: Tap | None = None,
    ) -> AsyncGenerator[Delta, None]:
        assert number == 0
        if not self.healthy:
            raise EngineDead("The engine is dead.")
        eos = self.tokenizer.eos_token_ids
        self.requests += engine_requests(self.info, self.tokenizer, request_id, prompt, params, eos, cache_salt, images)
        self.calls.append((prompt, params, request_id))
        return self._generate(prompt, params, request_id, tap or Tap())

    async def _generate(
        self, prompt: list[int], params: SamplingParams, request_id: str, tap: Tap
    ) -> AsyncGenerator[Delta, None]:
        ids = self.tokenizer.encode(self.text)[: params.max_tokens]
        whole = len(ids) == len(self.tokenizer.encode(self.text))
        done = False
        texts = [Detokenizer(self.tokenizer, params, prompt) for _ in range(params.n)]
        for listener in self.listeners:
            first = request_id if params.n == 1 else f"{request_id}-0"
            listener(EngineStats(1, 0, 0.5, len(prompt), len(prompt), 0, 0, [first]))
        try:
            for position, token in enumerate(ids):
                await asyncio.sleep(self.delay)
                if self._failure is not None:
                    raise self._failure
                if position == self.fail_after:
                    raise EngineDead("The engine died.")
                last = position == len(ids) - 1
                reason: FinishReason | None = ("stop" if whole else "length") if last else None
                for index in range(params.n):
                    offset = texts[index].length
                    delta = Delta(
                        index,
                        texts[index].step(token) + (texts[index].finish() if last else ""),
                        [token],
                        [self._logprobs(token, params.logprobs)] if params.logprobs is not None else None,
                        reason,
                        None,
                        self._prompt_logprobs(prompt, params) if not position and not index else None,
                        num_cached_tokens=0 if position else 3,
                        offsets=[offset],
                    )
                    if reason is None and tap.take(delta):  # where this runs, the reader waits
                        tap.saw(delta)
                    else:
                        yield delta
            done = True
        finally:
            if not done:
                self.aborted.append(request_id)

    def _logprobs(self, token: int, count: int) -> tuple[Logprob, ...]:
        return (Logprob(token, -0.5, 1), *(Logprob(5 + i, float("-inf"), i + 2) for i in range(count)))

    def _prompt_logprobs(self, prompt: list[int], params: SamplingParams) -> PackedLogprobs | None:
        if params.prompt_logprobs is None:
            return None
        return PackedLogprobs.of([None, *(self._logprobs(token, params.prompt_logprobs) for token in prompt[1:])])

    async def death(self) -> str:
        """Returns when a test killed this engine: the sentence that it gave to `die`."""
        return await self._death.get()

    def die(self, sentence: str) -> None:
        self.healthy = False
        self._death.put_nowait(sentence)

    def fail_running(self, error: OctavoError) -> None:
        self._failure = error

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        self.healthy = False
