"""Decides, step by step, how many tokens each request computes. Prefill and decode are the same thing here: tokens that a
request knows and has not computed yet, one of them in a decode, many in a prefill.

Requests are served in the order of their arrival, and that order has consequences to rely on. Every running request came
before every waiting one. Running ones are served from the oldest, so whoever must give up its memory (always the youngest)
has not yet been served in that step. And a prompt is cut only where the step's budget ends, so that at most one request, the
youngest, is in the middle of its prefill: the budget goes to decodes first, and what is left of it to the prefill.

A step may be scheduled while the one before it still runs. The token that one will choose is then known by its place alone:
it counts as `num_pending`, gets memory and is computed, its value going from step to step on the device.

Nothing here reads a clock or depends on chance: every rank decides alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from octavo.engine.block_pool import BlockPool
from octavo.engine.sequence import NewToken, Request, Schedule, ScheduledRequest, Status
from octavo.messages import EngineRequest, EngineStats

__all__ = ["Scheduler"]


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

    @property
    def request_ids(self) -> Collection[str]:
        """Those that wait or run."""
        return self._requests.keys()

    def schedule(self, sitting_out: Collection[str] = ()) -> Schedule:
        """Decides the next step. The requests that `failed` in it are finished; only a step with items need be run. Requests
        `sitting_out` have all that they know computed and get no token in it.

        A request with a pending token cannot give up its memory: what it would have to compute anew is not known. Where that
        would be needed there are no items, and the step can be scheduled when the `update` of the one before is done.
        """
        schedule = Schedule(self.max_num_batched_tokens)
        if any(request.num_pending for request in self.running) and self._missing() > self.pool.num_free:
            return schedule
        self._continue_running(schedule, sitting_out)
        if not schedule.preempted:  # whoever was just put out of memory would come straight back in
            self._admit_waiting(schedule, sitting_out)
        return schedule

    def update(self, schedule: Schedule, sampled: Sequence[int]) -> list[NewToken]:
        """Takes a finished step's tokens, one for each of `schedule.sampling`, and ends the requests that they complete.

        Requests that ended meanwhile are passed over: aborted, or by a token of the step before, which came too late to keep
        them out of this one. ValueError if the number of tokens is wrong.
        """
        for item in schedule.items:
            if item.request.status is Status.RUNNING:
                self._cache_full_blocks(item)
        pairs = zip(schedule.sampling, sampled, strict=True)
        return [self._append(item.request, token) for item, token in pairs if item.request.status is Status.RUNNING]

    def stats(self, schedule: Schedule) -> EngineStats:
        """The state as it is now, and what `schedule` did."""
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.pool.usage,
            iteration_tokens=sum(item.num_tokens for item in schedule.items),
            prefix_cache_queries=schedule.prefix_queries,
            prefix_cache_hits=schedule.prefix_hits,
            num_preemptions=len(schedule.preempted),
            scheduled_first=schedule.started,
        )

    def _continue_running(self, schedule: Schedule, sitting_out: Collection[str]) -> None:
        served = 0
        while served < len(self.running) and schedule.budget:  # the list may lose its tail on the way
            if self.running[served].complete or self.running[served].request_id in sitting_out:
                served += 1
            elif self._grow(self.running[served], schedule):
                self._compute(self.running[served], schedule)
                served += 1

    def _missing(self) -> int:
        """Blocks that the running requests lack for the tokens they have."""
        growing = [request for request in self.running if not request.complete]
        return sum(self.pool.blocks_for(request.num_tokens) - len(request.block_ids) for request in growing)

    def _grow(self, request: Request, schedule: Schedule) -> bool:
        """Gets blocks for all the tokens that `request` has, if need be the youngest ones'; False if it lost its own."""
        missing = self.pool.blocks_for(request.num_tokens) - len(request.block_ids)
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

    def _admit_waiting(self, schedule: Schedule, sitting_out: Collection[str]) -> None:
        """Starts waiting requests in order; the first one that does not fit holds up the rest, so that none starves."""
        while self.waiting and schedule.budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if request.request_id in sitting_out:  # preempted meanwhile; it keeps its place
                break
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
        self.pool.name_blocks(request.names, request.token_ids, count, request.cache_root)
        return self.pool.match(request.names[:count])

    def _compute(self, request: Request, schedule: Schedule) -> None:
        start, missing = request.num_computed_tokens, request.num_tokens - request.num_computed_tokens
        num_tokens = min(missing, schedule.budget)
        samples = num_tokens == missing
        # A pending token comes alone: the step that chooses it computes all those before.
        schedule.items.append(ScheduledRequest(request, start, num_tokens, samples, pending=request.num_pending > 0))
        schedule.budget -= num_tokens
        # Counted here, not in `update`, so that the next step can be scheduled before the tokens of this one are known.
        request.num_computed_tokens += num_tokens
        request.num_pending += samples

    def _cache_full_blocks(self, item: ScheduledRequest) -> None:
        """Offers the blocks that the step has filled to other requests.

        Their names need the tokens' values, and all are there: the last one came with the `update` of the step before.
        """
        size, request = self.pool.block_size, item.request
        first, stop = item.start // size, (item.start + item.num_tokens) // size
        if first < stop:
            self.pool.name_blocks(request.names, request.token_ids, stop, request.cache_root)
            self.pool.commit(request.block_ids[first:stop], request.names[first:stop])

    def _append(self, request: Request, token: int) -> NewToken:
        request.token_ids.append(token)
        request.num_pending -= 1
        finish_reason, stop_reason = request.finish_of(token)
        if finish_reason:
            self.running.remove(request)
            self._release(request)
        return NewToken(request, token, finish_reason, stop_reason)

    def _preempt(self, request: Request, schedule: Schedule) -> None:
        """Takes a request's memory. It keeps its tokens, will compute them anew, and is the next to be admitted."""
        assert not request.num_pending
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
        # A step in flight may still write to these blocks. Whoever gets them writes in a later step, and the device runs steps
        # in their order. Nor does anybody share them: a block has a name only when all of it is computed and its step is over.
        request.status = Status.FINISHED
        del self._requests[request.request_id]
        self._drop_blocks(request)

    def _drop_blocks(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
