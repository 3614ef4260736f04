"""Decides, step by step, how many tokens each request computes. Prefill and decode are the same thing here: tokens that a
request knows and has not computed yet, one of them in a decode, many in a prefill.

Requests are served in the order of their arrival, and that order has consequences to rely on. Every running request came
before every waiting one. Running ones are served from the oldest, so whoever must give up its memory (always the youngest)
has not yet been served in that step. And a prompt is cut only where the step's budget ends, so that at most one request, the
youngest, is in the middle of its prefill: the budget goes to decodes first, and what is left of it to the prefill.

Nothing here reads a clock or depends on chance: every rank decides alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from octavo.engine.blocks import BlockPool
from octavo.engine.request import EngineRequest, EngineStats, FinishReason

__all__ = ["NewToken", "Request", "Schedule", "ScheduledRequest", "Scheduler", "Status"]


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
        self.prompt_token_ids = request.prompt_token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)  # prompt and output
        self.num_computed_tokens = 0  # tokens whose KV is in the cache, or will be after the steps scheduled so far
        self.num_cached_tokens = 0  # prompt tokens that the prefix cache had when the request was first started
        self.num_preemptions = 0
        self.block_ids: list[int] = []  # block i holds the tokens [i * block_size, (i + 1) * block_size)
        self.names: list[bytes] = []  # of its first full blocks, as far as anyone has asked; they outlive the blocks
        self.status = Status.WAITING
        limit = max_model_len if self.params.max_tokens is None else self.num_prompt_tokens + self.params.max_tokens
        self.max_total_tokens = min(limit, max_model_len)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def finish_of(self, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether `token`, just appended, ends the request: finish reason and stop reason."""
        params = self.params
        if self.num_output_tokens >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token in params.stop_token_ids:
                return "stop", token
        return ("length" if len(self.token_ids) >= self.max_total_tokens else None), None


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step: it computes its tokens [start, start + num_tokens)."""

    request: Request
    start: int
    num_tokens: int
    samples: bool  # the last known token is among them, so the step chooses the next one


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


class Scheduler:
    """The queue, the running requests and their blocks.

    A step computes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests. The pool should hold
    `max_model_len` tokens; a request that outgrows it fails alone.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int):
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def add(self, request: EngineRequest) -> Request:
        """Queues a request. ValueError if its id is in use; one that can never run fails in the next schedule."""
        if request.request_id in self._requests:
            raise ValueError(f"Request id '{request.request_id}' is in use.")
        added = self._requests[request.request_id] = Request(request, self.max_model_len)
        self.waiting.append(added)
        return added

    def abort(self, request_id: str) -> Request | None:
        """Ends a request, also between `schedule` and `update`; None if it is not known (any more)."""
        if (request := self._requests.get(request_id)) is None:
            return None
        (self.waiting if request.status is Status.WAITING else self.running).remove(request)
        self._release(request)
        return request

    def schedule(self) -> Schedule:
        """Decides the next step. The requests that `failed` in it are finished; only a step with items need be run."""
        schedule = Schedule(self.max_num_batched_tokens)
        self._continue_running(schedule)
        if not schedule.preempted:  # whoever was just put out of memory would come straight back in
            self._admit_waiting(schedule)
        return schedule

    def update(self, schedule: Schedule, sampled: Sequence[int]) -> list[NewToken]:
        """Takes a finished step's tokens, one for each of `schedule.sampling`, and ends the requests that they complete.

        Requests aborted meanwhile are passed over. ValueError if the number of tokens is wrong.
        """
        for item in schedule.items:
            if item.request.status is Status.RUNNING:
                self._cache_full_blocks(item)
        pairs = zip(schedule.sampling, sampled, strict=True)
        return [self._append(item.request, token) for item, token in pairs if item.request.status is Status.RUNNING]

    def stats(self, schedule: Schedule) -> EngineStats:
        """The state as it is now, and what `schedule` did."""
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_cache_usage=self.pool.usage,
            iteration_tokens=sum(item.num_tokens for item in schedule.items),
            prefix_cache_queries=schedule.prefix_queries,
            prefix_cache_hits=schedule.prefix_hits,
            num_preemptions=len(schedule.preempted),
            scheduled_first=schedule.started,
        )

    def _continue_running(self, schedule: Schedule) -> None:
        served = 0
        while served < len(self.running) and schedule.budget:  # the list may lose its tail on the way
            if self._grow(self.running[served], schedule):
                self._compute(self.running[served], schedule)
                served += 1

    def _grow(self, request: Request, schedule: Schedule) -> bool:
        """Gets blocks for all the tokens that `request` knows, if need be the youngest ones'; False if it lost its own."""
        missing = self.pool.blocks_for(len(request.token_ids)) - len(request.block_ids)
        while missing > self.pool.num_free:
            victim = self.running.pop()
            if not self.running:  # it had the whole pool
                self._fail(victim, "The request has outgrown the KV cache.", schedule)
                return False
            self._preempt(victim, schedule)
            if victim is request:
                return False
        request.block_ids += self.pool.allocate(missing)
        return True

    def _admit_waiting(self, schedule: Schedule) -> None:
        """Starts waiting requests in order; the first one that does not fit holds up the rest, so that none starves."""
        while self.waiting and schedule.budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if reason := self._hopeless(request):
                self._fail(self.waiting.popleft(), reason, schedule)
            elif self._start(request, schedule):
                self.running.append(self.waiting.popleft())
                self._compute(request, schedule)
            else:
                break

    def _start(self, request: Request, schedule: Schedule) -> bool:
        """Gives a waiting request its cached prefix and blocks for all the tokens it knows, if there is room for them.

        All, though its first chunk may need few: a prefill once begun then never stops for want of memory. And a block for
        each running request must stay free, or their next tokens would soon put this one out again, its work wasted.
        """
        if not self.pool.num_free:  # the cache never has the last token's block; this spares a long queue the look-up
            return False
        cached = self._cached_prefix(request)
        fresh = self.pool.blocks_for(len(request.token_ids)) - len(cached)
        if self.pool.free_beside(cached) < fresh + len(self.running):
            return False
        self.pool.share(cached)  # first, or allocating might evict them
        request.block_ids = cached + self.pool.allocate(fresh)
        request.num_computed_tokens = len(cached) * self.pool.block_size
        request.status = Status.RUNNING
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
            schedule.started.append(request.request_id)
            schedule.prefix_queries += request.num_prompt_tokens if self._may_share(request) else 0
            schedule.prefix_hits += request.num_cached_tokens
        return True

    def _may_share(self, request: Request) -> bool:
        return self.pool.prefix_caching and request.params.prompt_logprobs is None  # those need every position's logits

    def _cached_prefix(self, request: Request) -> list[int]:
        if not self._may_share(request):
            return []
        count = (len(request.token_ids) - 1) // self.pool.block_size  # leaves at least one token to compute
        self.pool.name_blocks(request.names, request.token_ids, count)
        return self.pool.match(request.names[:count])

    def _compute(self, request: Request, schedule: Schedule) -> None:
        start, missing = request.num_computed_tokens, len(request.token_ids) - request.num_computed_tokens
        num_tokens = min(missing, schedule.budget)
        schedule.items.append(ScheduledRequest(request, start, num_tokens, num_tokens == missing))
        schedule.budget -= num_tokens
        # Counted here, not in `update`: a later version can so schedule a step before the tokens of this one are known.
        request.num_computed_tokens += num_tokens

    def _cache_full_blocks(self, item: ScheduledRequest) -> None:
        """Offers the blocks that the step has filled to other requests."""
        size, request = self.pool.block_size, item.request
        first, stop = item.start // size, (item.start + item.num_tokens) // size
        if first < stop:
            self.pool.name_blocks(request.names, request.token_ids, stop)
            self.pool.commit(request.block_ids[first:stop], request.names[first:stop])

    def _append(self, request: Request, token: int) -> NewToken:
        request.token_ids.append(token)
        finish_reason, stop_reason = request.finish_of(token)
        if finish_reason:
            self.running.remove(request)
            self._release(request)
        return NewToken(request, token, finish_reason, stop_reason)

    def _preempt(self, request: Request, schedule: Schedule) -> None:
        """Takes a request's memory. It keeps its tokens, will compute them anew, and is the next to be admitted."""
        self._drop_blocks(request)
        request.num_preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        schedule.preempted.append(request)

    def _hopeless(self, request: Request) -> str | None:
        """Why a waiting request can never run."""
        if not 0 < request.num_prompt_tokens < self.max_model_len:
            return f"A prompt must have 1 to {self.max_model_len - 1} tokens; this one has {request.num_prompt_tokens}."
        if self.pool.blocks_for(len(request.token_ids)) > self.pool.num_blocks:
            return "The request has outgrown the KV cache."
        return None

    def _fail(self, request: Request, reason: str, schedule: Schedule) -> None:
        self._release(request)
        schedule.failed.append((request, reason))

    def _release(self, request: Request) -> None:
        request.status = Status.FINISHED
        del self._requests[request.request_id]
        self._drop_blocks(request)

    def _drop_blocks(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
