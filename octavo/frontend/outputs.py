"""What a user of the engine gets, and the steps between it and the tokens. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from octavo.errors import InvalidRequest
from octavo.messages import EngineInfo, EngineRequest, FinishReason, Logprob, Logprobs, SamplingParams, TokenOutput
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer

__all__ = ["CompletionOutput", "Delta", "OutputProcessor", "RequestOutput", "check_request", "fan_out"]


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
        for count, token_id in enumerate(shown, 1):
            delta.text += detokenizer.step(token_id)
            if detokenizer.stopped is not None:
                delta.token_ids = delta.token_ids[:count]
                delta.logprobs = delta.logprobs and delta.logprobs[:count]
                break
        if delta.finish_reason is not None and detokenizer.stopped is None:
            delta.text += detokenizer.finish()
        if detokenizer.stopped is not None:
            delta.finish_reason, delta.stop_reason = "stop", detokenizer.stopped


def check_request(
    info: EngineInfo, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], params: SamplingParams
) -> None:
    """Raises InvalidRequest for what the engine could never serve, before anything is sent to it."""
    length, longest = len(prompt_token_ids), info.max_model_len - 1
    if not length:
        raise InvalidRequest("The prompt is empty; send at least one token.", "prompt")
    if length > longest:
        raise InvalidRequest(f"The prompt has {length} tokens; at most {longest} fit beside one to generate.", "prompt")
    if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < info.vocab_size:
        wrong = next(token for token in prompt_token_ids if not 0 <= token < info.vocab_size)
        raise InvalidRequest(f"Token id {wrong} is out of the vocabulary of {info.vocab_size} tokens.", "prompt")
    if params.stop and (tokenizer is None or not params.detokenize):
        reason = "detokenize is off" if tokenizer is not None else "the checkpoint has no tokenizer.json"
        raise InvalidRequest(f"Stop strings need text, and {reason}; use stop_token_ids.", "stop")


def fan_out(
    request_id: str, prompt_token_ids: list[int], params: SamplingParams, eos_token_ids: frozenset[int]
) -> Iterator[EngineRequest]:
    """The n sequences of one request as the engine takes them, each with a seed of its own."""
    if params.n == 1:
        yield EngineRequest(request_id, prompt_token_ids, params, eos_token_ids)
        return
    for i in range(params.n):
        seed = None if params.seed is None else params.seed + i
        prompt_logprobs = params.prompt_logprobs if i == 0 else None  # they are the same for all
        one = replace(params, n=1, seed=seed, prompt_logprobs=prompt_logprobs)
        yield EngineRequest(f"{request_id}-{i}", prompt_token_ids, one, eos_token_ids)
