"""The results of generation, and their assembly from tokens. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.messages import EngineRequest, FinishReason, Logprob, Logprobs, TokenOutput
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer

__all__ = ["CompletionOutput", "Delta", "OutputProcessor", "RequestOutput"]


@dataclass(slots=True)
class Delta:
    """The output of one engine step for one of a request's n sequences. `text` is empty while a character is incomplete."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None  # one entry per token in token_ids
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token
    prompt_logprobs: Sequence[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    offsets: list[int] | None = None  # with logprobs: where each token's text begins in the whole, including what is held back


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
    error: str | None = None  # not in vLLM: why the sequence ended early with finish_reason "abort"


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
    _texts: dict[int, list[str]] = field(default_factory=dict, repr=False, compare=False)  # of sequences that run, in pieces

    def add(self, delta: Delta) -> None:
        """Adds the output of one step."""
        output = self.outputs[delta.index]
        self._texts.setdefault(delta.index, []).append(delta.text)  # a string would be copied at each token
        output.token_ids += delta.token_ids
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            output.logprobs = output.logprobs if output.logprobs is not None else []
            output.logprobs += [_by_token(entry) for entry in delta.logprobs]
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(entry[0].logprob for entry in delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = [None if entry is None else _by_token(entry) for entry in delta.prompt_logprobs]
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is not None:
            self._end(delta.index)

    def fail(self, index: int, error: str) -> None:
        """Ends one of the sequences with an error. It keeps the output so far."""
        output = self.outputs[index]
        output.finish_reason, output.error = "abort", error
        self._end(index)

    def _end(self, index: int) -> None:
        self.outputs[index].text = "".join(self._texts.pop(index, ()))
        self.finished = all(output.finish_reason for output in self.outputs)


def _by_token(entry: Logprobs) -> dict[int, Logprob]:
    return {logprob.token_id: logprob for logprob in entry}


class OutputProcessor:
    """Turns the tokens of one sequence into deltas: detokenizes, matches stop strings, sets the finish reason."""

    def __init__(self, request: EngineRequest, tokenizer: Tokenizer | None, index: int = 0):
        self.index = index
        self._params = params = request.params
        detokenize = tokenizer is not None and params.detokenize
        self._detokenizer = Detokenizer(tokenizer, params, request.prompt_token_ids) if tokenizer and detokenize else None

    def process(self, output: TokenOutput) -> Delta:
        """The delta of one step. A stop string sets finish_reason "stop" before the engine knows: then abort the request."""
        delta = Delta(
            self.index,
            "",
            output.token_ids,
            output.logprobs,
            output.finish_reason,
            output.stop_reason,
            output.prompt_logprobs,
            output.num_cached_tokens,
            output.num_preemptions,
        )
        if (detokenizer := self._detokenizer) is None:
            return delta
        if len(delta.token_ids) == 1 and delta.finish_reason is None and delta.logprobs is None:
            delta.text = detokenizer.step(delta.token_ids[0])
            if detokenizer.stopped is not None:
                delta.finish_reason, delta.stop_reason = "stop", detokenizer.stopped
        else:
            self._read(detokenizer, delta)
        return delta

    def _read(self, detokenizer: Detokenizer, delta: Delta) -> None:
        # The stop token is not part of the text, unless the request includes it.
        hidden = delta.finish_reason == "stop" and not self._params.include_stop_str_in_output
        shown = delta.token_ids[:-1] if hidden else delta.token_ids
        offsets: list[int] = []
        for count, token_id in enumerate(shown, 1):
            if delta.logprobs is not None:
                offsets.append(detokenizer.length)
            delta.text += detokenizer.step(token_id)
            if detokenizer.stopped is not None:
                delta.token_ids = delta.token_ids[:count]
                delta.logprobs = delta.logprobs and delta.logprobs[:count]
                break
        if delta.logprobs is not None:
            delta.offsets = [*offsets, detokenizer.length] if hidden and detokenizer.stopped is None else offsets
        if delta.finish_reason is not None and detokenizer.stopped is None:
            delta.text += detokenizer.finish()
        if detokenizer.stopped is not None:
            delta.finish_reason, delta.stop_reason = "stop", detokenizer.stopped
