"""What the scheduler decides and about whom: requests with their progress, and one step's parts of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from octavo.engine.block_pool import root_of
from octavo.messages import EngineRequest, FinishReason

__all__ = ["NewToken", "Request", "Schedule", "ScheduledRequest", "Status"]


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """The progress of one generation. Only the scheduler changes it."""

    def __init__(self, request: EngineRequest, max_model_len: int):
        self.request_id = request.request_id
        self.params = request.params
        self.eos_token_ids = request.eos_token_ids
        self.stop_token_ids = frozenset(request.params.stop_token_ids)
        self.prompt_token_ids = request.prompt_token_ids
        self.rotary_delta = request.rotary_delta
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)  # prompt and output
        self.num_pending = 0  # tokens that scheduled steps choose and `update` has not brought yet
        self.num_computed_tokens = 0  # tokens whose KV is in the cache, or will be after the steps scheduled so far
        self.num_cached_tokens = 0  # prompt tokens that the prefix cache had when the request was first started
        self.num_preemptions = 0
        self.block_ids: list[int] = []  # block i holds the tokens [i * block_size, (i + 1) * block_size)
        self.cache_root = root_of(request.cache_salt)
        self.names: list[bytes] = []  # of its first full blocks, as far as anyone has asked; they outlive the blocks
        self.status = Status.WAITING
        limit = max_model_len if self.params.max_tokens is None else self.num_prompt_tokens + self.params.max_tokens
        self.max_total_tokens = min(limit, max_model_len)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output, with the tokens whose values are not known yet."""
        return len(self.token_ids) + self.num_pending

    @property
    def complete(self) -> bool:
        """Whether it has all the tokens it may have; `update` ends it when the last one's value is known."""
        return self.num_tokens >= self.max_total_tokens

    def finish_of(self, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether `token`, just appended, ends the request: finish reason and stop reason."""
        params = self.params
        if self.num_output_tokens >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token in self.stop_token_ids:
                return "stop", token
        return ("length" if len(self.token_ids) >= self.max_total_tokens else None), None


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step: it computes its tokens [start, start + num_tokens)."""

    request: Request
    start: int
    num_tokens: int
    samples: bool  # the request's last token is among them, so the step chooses the next one
    pending: bool = False  # the step before chooses its one token


@dataclass(slots=True)
class Schedule:
    """What one step does, and what deciding it did. Items are in the order of arrival."""

    budget: int  # tokens that the step could still compute
    items: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)  # lost their cache and wait again
    failed: list[tuple[Request, str]] = field(default_factory=list)  # finished, each with a sentence that says why
    started: list[str] = field(default_factory=list)  # ids of those scheduled for the first time
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache, and found
    prefix_hits: int = 0

    @property
    def sampling(self) -> list[ScheduledRequest]:
        """The items that get a token, in the order that `Scheduler.update` takes them."""
        return [item for item in self.items if item.samples]


class NewToken(NamedTuple):
    """What a step brought one request. stop_reason is the stop token that ended it; None for EOS."""

    request: Request
    token: int
    finish_reason: FinishReason | None
    stop_reason: int | None
