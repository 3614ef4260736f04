"""What a user of the engine gets, and the steps between it and the tokens. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.messages import EngineRequest, FinishReason, Logprob, Logprobs, TokenOutput
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer

__all__ = ["CompletionOutput", "Delta", "OutputProcessor", "RequestOutput"]


@dataclass(slots=True)
class Delta:
    """What one engine step added to one of a request's n sequences. `text` is empty while a character is incomplete."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None  # beside each of token_ids
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    offsets: list[int] | None = None  # where the text of each of token_ids begins in all the text, shown or held back


@dataclass
class CompletionOutput:
    """One finished sequence. The fields are vLLM's."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # beyond vLLM's: why it ended with finish_reason "abort" before it was whole


@dataclass
class RequestOutput:
    """One prompt and its n sequences. The fields are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Takes in what one step brought."""
        output = self.outputs[delta.index]
        output.text += delta.text
        output.token_ids += delta.token_ids
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            output.logprobs = (output.logprobs or []) + [_by_token(entry) for entry in delta.logprobs]
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(entry[0].logprob for entry in delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = [None if entry is None else _by_token(entry) for entry in delta.prompt_logprobs]
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.finished = all(output.finish_reason for output in self.outputs)

    def fail(self, index: int, error: str) -> None:
        """Ends one of the sequences with what went wrong; what it had so far stays."""
        output = self.outputs[index]
        output.finish_reason, output.error = "abort", error
        self.finished = all(output.finish_reason for output in self.outputs)


def _by_token(entry: Logprobs) -> dict[int, Logprob]:
    return {logprob.token_id: logprob for logprob in entry}


class OutputProcessor:
    """Turns the tokens of one sequence into deltas: text, stop strings, the reason of the end."""

    def __init__(self, request: EngineRequest, tokenizer: Tokenizer | None, index: int = 0):
        self.index = index
        self._params = params = request.params
        detokenize = tokenizer is not None and params.detokenize
        self._detokenizer = Detokenizer(tokenizer, params, request.prompt_token_ids) if tokenizer and detokenize else None

    def process(self, output: TokenOutput) -> Delta:
        """The delta of one step. Its finish_reason may be "stop" before the engine knows: then abort the request there."""
        delta = Delta(
            self.index,
            "",
            output.token_ids,
            output.logprobs,
            output.finish_reason,
            output.stop_reason,
            output.prompt_logprobs,
            output.num_cached_tokens,
        )
        if self._detokenizer is not None:
            self._read(self._detokenizer, delta)
        return delta

    def _read(self, detokenizer: Detokenizer, delta: Delta) -> None:
        # The token that ended a generation is not part of its text, unless asked for.
        hidden = delta.finish_reason == "stop" and not self._params.include_stop_str_in_output
        shown = delta.token_ids[:-1] if hidden else delta.token_ids
        delta.offsets = []
        for count, token_id in enumerate(shown, 1):
            delta.offsets.append(detokenizer.length)
            delta.text += detokenizer.step(token_id)
            if detokenizer.stopped is not None:
                delta.token_ids = delta.token_ids[:count]
                delta.logprobs = delta.logprobs and delta.logprobs[:count]
                break
        if hidden and detokenizer.stopped is None:
            delta.offsets.append(detokenizer.length)
        if delta.finish_reason is not None and detokenizer.stopped is None:
            delta.text += detokenizer.finish()
        if detokenizer.stopped is not None:
            delta.finish_reason, delta.stop_reason = "stop", detokenizer.stopped
