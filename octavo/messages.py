"""Messages between the API process and the engine: requests, sampling parameters, tokens, statistics.

A message is a tuple whose first item is its kind. To the engine: ("add", the EngineRequests of one request's sequences),
("abort", request ids), ("shutdown",), and the CONTROLS, methods of EngineCore: ("check_reload", directory),
("reset_prefix_cache",), and while no request runs ("reload", directory, whether it is checked), ("sleep",), ("wake", parts).
They are answered by ("done", sentence or None, EngineInfo). From the engine: ("progress", stage, fraction), then ("ready",
EngineInfo) or ("failed", sentence), then ("step", outputs, stats) and, if it dies, ("dead", sentence). Any rank answers
("ping", whether to print its stacks) with ("pong", steps, turns and exchanges begun), numbers of octavo.engine.place's Pulse,
from a thread that no step holds up.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.errors import InvalidRequest
from octavo.images import PlacedImage
from octavo.token_logprobs import Logprob, Logprobs, PackedLogprobs

__all__ = [
    "CONTROLS",
    "KV_CACHE",
    "WEIGHTS",
    "EngineInfo",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "GrammarKind",
    "Logprob",
    "Logprobs",
    "Message",
    "Progress",
    "SamplingParams",
    "StructuredOutput",
    "TokenOutput",
]

Message = tuple[Any, ...]
CONTROLS = ("check_reload", "reset_prefix_cache", "reload", "sleep", "wake")
WEIGHTS, KV_CACHE = "weights", "kv_cache"  # parts of an engine that sleep apart; vLLM's tags
Progress = Callable[[str, float], None]
FinishReason = Literal["stop", "length", "abort"]
GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
MAX_PROMPT_LOGPROBS = 20  # of each token of a prompt, of which there may be many
MAX_BAD_WORDS = 1024
MAX_STOP = 256
MAX_GRAMMAR = 1 << 19  # characters; reading, sending and compiling this many takes some tenths of a second
MAX_STOP_TOKEN_IDS = 4096
MAX_CHARACTERS = 16_384  # sum over stop strings, and over bad words: each character becomes a state of an automaton


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """A grammar that the output must follow. `kind` is the format of `grammar`."""

    kind: GrammarKind
    grammar: str = ""  # a JSON schema as text, a regular expression, or a Lark grammar; empty for json_object
    param: str = field(default="structured", compare=False)  # the request field that set it, for error messages
    llguidance: str | None = field(default=None, compare=False, repr=False)  # the same in llguidance's format, once it was read

    def __post_init__(self) -> None:
        if len(self.grammar) > MAX_GRAMMAR:
            raise InvalidRequest(
                f"{self.param} has over {MAX_GRAMMAR} characters as a grammar, the most that is served; make it smaller.",
                self.param,
            )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request. Names and defaults are vLLM's. Raises InvalidRequest on a wrong value."""

    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16  # None: up to the context length
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # number of alternatives beside each sampled token
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured: StructuredOutput | None = None
    bad_words: Sequence[str] = ()  # each forbidden with and without a leading space
    allowed_token_ids: Sequence[int] | None = None  # only these tokens may be sampled

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        _check_strings("stop", self.stop, MAX_STOP)
        object.__setattr__(self, "stop_token_ids", tuple(dict.fromkeys(self.stop_token_ids or ())))
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; at most {MAX_STOP_TOKEN_IDS} are served.",
                "stop_token_ids",
            )
        if isinstance(self.bad_words, str):
            raise InvalidRequest("bad_words must be a list of strings, not one string.", "bad_words")
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        _check_strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        if not all(isinstance(word, str) and word.strip() for word in self.bad_words):
            raise InvalidRequest("bad_words must hold strings that are more than blanks.", "bad_words")
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(self.allowed_token_ids)))
            if not self.allowed_token_ids:
                raise InvalidRequest(
                    "allowed_token_ids is empty, which forbids every token; leave it out.", "allowed_token_ids"
                )
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails too
                allowed = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
                raise InvalidRequest(f"{name} must be {allowed}, not {value}.", name)
        if self.top_p <= 0:
            raise InvalidRequest(f"top_p must be over 0 and at most 1, not {self.top_p}.", "top_p")
        if self.repetition_penalty <= 0:
            raise InvalidRequest(f"repetition_penalty must be over 0, not {self.repetition_penalty}.", "repetition_penalty")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}.", "min_tokens")
        if any(not s for s in self.stop):
            raise InvalidRequest("stop must not hold an empty string.", "stop")
        for token, bias in (self.logit_bias or {}).items():
            if not -100 <= bias <= 100:
                raise InvalidRequest(f"logit_bias of token {token} must be between -100 and 100, not {bias}.", "logit_bias")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    def sequence(self, number: int) -> SamplingParams:
        """The parameters of one of the n sequences. Only the first reports prompt logprobs. Nothing is checked again: these
        parameters are valid, and checking a client's long lists n times would be slow."""
        one = copy(self)
        object.__setattr__(one, "n", 1)
        if self.seed is not None:
            object.__setattr__(one, "seed", self.seed + number)
        if number:
            object.__setattr__(one, "prompt_logprobs", None)
        return one


def _check_strings(name: str, strings: Sequence[str], most: int) -> None:
    """Raises InvalidRequest for more or longer strings than a server can match against every token of every sequence."""
    if len(strings) > most:
        raise InvalidRequest(f"{name} has {len(strings)} entries; at most {most} are served.", name)
    if not all(isinstance(one, str) for one in strings):
        raise InvalidRequest(f"{name} must hold strings.", name)
    if (characters := sum(map(len, strings))) > MAX_CHARACTERS:
        raise InvalidRequest(f"{name} has {characters} characters in all; at most {MAX_CHARACTERS} are served.", name)


_INF = float("inf")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, 128),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", -1, 2**31),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 100),
    ("seed", -(2**63), 2**64 - 1),
    ("max_tokens", 1, _INF),
    ("min_tokens", 0, _INF),
    ("logprobs", 0, _INF),
    ("prompt_logprobs", 0, MAX_PROMPT_LOGPROBS),
)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate, as the engine sees it (n > 1 makes several of these).

    The frontend has validated it. `grammar` is in llguidance's format, compiled from `params.structured`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    grammar: str | None = None
    rotary_delta: int = 0  # rotary row minus position of its output tokens
    bad_words: tuple[tuple[int, ...], ...] = ()  # params.bad_words in token ids
    cache_salt: str | None = None  # only requests with the same salt share prefixes
    images: tuple[PlacedImage, ...] = ()  # in the order of their places in the prompt


@dataclass(slots=True)
class TokenOutput:
    """The output of one step for one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it; None for EOS
    logprobs: list[Logprobs] | None = None  # one entry per token in token_ids
    prompt_logprobs: Sequence[Logprobs | None] | None = None  # with the first token only; None for the first prompt token
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_preemptions: int = 0
    error: str | None = None  # why the engine cannot continue the request

    def __reduce__(self) -> tuple[type[TokenOutput], tuple[Any, ...]]:
        """One is pickled a token: by its arguments, in a fifth of the time of a dataclass with slots."""
        prompt = None if self.prompt_logprobs is None else PackedLogprobs.of(self.prompt_logprobs)
        given = (self.request_id, self.token_ids, self.finish_reason, self.stop_reason, self.logprobs, prompt)
        rest = (self.num_cached_tokens, self.num_preemptions, self.error)
        return TokenOutput, given if rest == (0, 0, None) else given + rest


@dataclass(slots=True)
class EngineStats:
    """Engine statistics after one step. Counters are for this step alone."""

    num_running: int = 0
    num_waiting: int = 0  # in the queue, for room
    kv_cache_usage: float = 0.0  # 0 to 1
    iteration_tokens: int = 0
    prefix_cache_queries: int = 0  # in tokens
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    scheduled_first: list[str] = field(default_factory=list)  # ids of requests that left the queue in this step
    num_deferred: int = 0  # requests whose grammar is being compiled
    image_queries: int = 0  # images looked up in the encoder cache
    image_hits: int = 0


@dataclass(frozen=True)
class EngineInfo:
    """Facts about a loaded engine."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    model_type: str
    report: list[str] = field(default_factory=list)  # lines to print: quantization and memory
    max_logprobs: int = 20  # of an output token, the most that a request may ask for
    image_tokens: int = 0  # the most tokens of one image; 0: the model reads no images
    weights: list[tuple[str, str, int]] = field(default_factory=list)  # role, scheme, bytes that a rank holds of both
