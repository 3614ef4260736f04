"""Decides, step by step, how many tokens each request computes.

Prefill and decode are scheduled alike: a request has tokens that it has not computed yet, one in a decode, many in a prefill.

Requests are served in order of arrival, and other code relies on the consequences. Every running request arrived before every
waiting one. Running requests are served from the oldest, and the youngest is preempted first, so a preempted request has not
been scheduled in that step. A prefill is chunked only where the step's budget ends, so at most one request, the youngest, is
in the middle of its prefill: decodes get the budget first, and the prefill the rest.

A step may be scheduled while the one before it still runs. The token that the earlier step samples counts as `num_pending`: it
gets a block and is computed, and its value passes from step to step on the device. In a pipeline a step takes a part of the
running requests, none of which the steps right before it have, so that each stage has a step of its own.

The vision tower encodes an image before the step that computes its first tokens, at most `IMAGE_TOKENS` a step, so that images
do not stall decoding. Where the tower or the cache of its outputs has no room, a prefill stops in front of the image, and with
it the step's budget ends.

The scheduler reads no clock and no random numbers, so every rank decides alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from octavo.engine.block_pool import BlockPool
from octavo.engine.encoder_cache import EncoderCache
from octavo.engine.sequence import NewToken, Request, ScheduledRequest, SchedulerOutput, Status
from octavo.messages import EngineRequest, EngineStats

__all__ = ["IMAGE_TOKENS", "IMAGE_TOKENS_ON_CPU", "Scheduler"]

IMAGE_TOKENS = 2048  # of the images that one step encodes, two of 1024 x 1024 pixels; larger ones take several steps
IMAGE_TOKENS_ON_CPU = 128


class Scheduler:
    """The waiting queue, the running requests and their blocks.

    A step computes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests. The pool should hold
    `max_model_len` tokens. A request that outgrows the pool fails alone. image_tokens: of the images that a step encodes.
    stages: of a pipeline, each of which has a step with its own part of the running requests; ahead: whether it may compute
    pending tokens.
    """

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
        encoder_cache: EncoderCache | None = None, image_tokens: int = IMAGE_TOKENS, stages: int = 1, ahead: bool = False,
    ):  # fmt: skip
        self.stages, self.ahead, self.steps = stages, ahead, 0  # steps: that have had items
        self.slow: set[str] = set()  # requests whose next token depends on the last one's value on the host
        self.pool, self.encoder_cache, self.image_tokens = pool, encoder_cache or EncoderCache(0), image_tokens
        self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len = max_num_seqs, max_num_batched_tokens, max_model_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: EngineRequest) -> Request:
        """Queues a request. ValueError if its id is in use. One that can never run fails in the next schedule."""
        if request.request_id in self._requests:
            raise ValueError(f"Request id '{request.request_id}' is in use.")
        added = self._requests[request.request_id] = Request(request, self.max_model_len)
        self.waiting.append(added)
        return added

    def abort(self, request_id: str) -> Request | None:
        """Finishes a request, also between `schedule` and `update`. Returns None if it is unknown or already finished."""
        if (request := self._requests.get(request_id)) is None:
            return None
        (self.waiting if request.status is Status.WAITING else self.running).remove(request)
        self._release(request)
        return request

    @property
    def request_ids(self) -> Collection[str]:
        """Ids of waiting and running requests."""
        return self._requests.keys()

    def schedule(self, skipped: Collection[str] = ()) -> SchedulerOutput:
        """Decides the next step. The requests in `failed` are finished. A step without items need not be run. Requests
        `skipped` get no token in this step; all of their known tokens are computed.

        A request with a pending token cannot be preempted, because the value to recompute is unknown. Where preemption would be
        needed there are no items, and the step can be scheduled after the `update` of the one before.
        """
        schedule = SchedulerOutput(self.max_num_batched_tokens, self.image_tokens)
        scarce = self.pool.num_free < len(self.running)  # of which each lacks one block at most
        if scarce and self._missing_blocks() > self.pool.num_free and any(request.num_pending for request in self.running):
            return schedule
        self._continue_running(schedule, skipped)
        if not schedule.preempted:  # a request preempted in this step would be admitted again at once
            self._admit_waiting(schedule, skipped)
        schedule.evicted = self.encoder_cache.take_evicted()
        self.steps += bool(schedule.items)
        return schedule

    def update(self, schedule: SchedulerOutput, sampled: Sequence[int]) -> list[NewToken]:
        """Takes a finished step's tokens, one for each of `schedule.sampling`, and finishes the requests that they complete.

        Requests that finished meanwhile are skipped: aborted ones, and those finished by a token of the step before, which was
        not known when this step was scheduled. ValueError if the number of tokens is wrong.
        """
        size = self.pool.block_size
        for item in schedule.items:
            request, stop = item.request, item.start + item.num_tokens
            if request.status is Status.RUNNING:
                if stop // size > item.start // size:
                    self._cache_full_blocks(item)
                if request.images:
                    self.encoder_cache.release_computed(request, item.start, stop)
        pairs = zip(schedule.sampling, sampled, strict=True)
        return [self._append(item.request, token) for item, token in pairs if item.request.status is Status.RUNNING]

    def stats(self, schedule: SchedulerOutput) -> EngineStats:
        """Statistics of the present state and of what `schedule` did."""
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

    def _continue_running(self, schedule: SchedulerOutput, skipped: Collection[str]) -> None:
        running, items, size, now, ahead = self.running, schedule.items, self.pool.block_size, self.steps, self.ahead
        near = min(self.stages, len(running)) if self.stages > 1 else 0  # last steps, which have other parts of the requests
        served, most = 0, -(-len(running) // self.stages)
        while served < len(running) and schedule.budget and len(items) < most:  # preemption shortens the list
            request = running[served]
            tokens = len(request.token_ids) + (pending := request.num_pending)
            held_back = near and pending and (now - request.last_step < near or not ahead or request.request_id in self.slow)
            if held_back or tokens >= request.max_total_tokens or request.request_id in skipped:
                served += 1
            elif tokens <= len(request.block_ids) * size or self._grow(request, schedule):
                self._compute(request, schedule)
                served += 1

    def _missing_blocks(self) -> int:
        """Blocks that the running requests lack for their present tokens."""
        growing = [request for request in self.running if not request.complete]
        return sum(self.pool.blocks_for(request.num_tokens) - len(request.block_ids) for request in growing)

    def _grow(self, request: Request, schedule: SchedulerOutput) -> bool:
        """Gives a request blocks for all its tokens, preempting the youngest if needed. False if it was preempted itself."""
        missing = self.pool.blocks_for(request.num_tokens) - len(request.block_ids)
        while missing > self.pool.num_free:
            victim = self.running.pop()
            if not self.running:  # it held the whole pool
                self._fail(victim, "The request has outgrown the KV cache.", schedule)
                return False
            self._preempt(victim, schedule)
            if victim is request:
                return False
        request.block_ids += self.pool.allocate(missing)
        return True

    def _admit_waiting(self, schedule: SchedulerOutput, skipped: Collection[str]) -> None:
        """Starts waiting requests in order. The first one that does not fit blocks the rest, so that none starves."""
        while self.waiting and schedule.budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if request.request_id in skipped:  # it was preempted meanwhile and keeps its place in the queue
                break
            if reason := self._why_never(request):
                self._fail(self.waiting.popleft(), reason, schedule)
            elif self._start(request, schedule):
                self.running.append(self.waiting.popleft())
                self._compute(request, schedule)
            else:
                break

    def _start(self, request: Request, schedule: SchedulerOutput) -> bool:
        """Gives a waiting request its cached prefix and blocks for all its tokens, if there is room.

        Blocks are allocated for all tokens, though the first chunk may need few, so that a prefill once begun never stops for
        lack of memory. One block per running request must stay free, or their next tokens would soon preempt this request.
        """
        if not self.pool.num_free:  # the last token's block is never cached; this avoids the prefix lookup for a long queue
            return False
        cached = self._cached_prefix(request)
        fresh = self.pool.blocks_for(len(request.token_ids)) - len(cached)
        if self.pool.free_beside(cached) < fresh + len(self.running):
            return False
        self.pool.share(cached)  # first, because allocating might evict them
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
        return self.pool.prefix_caching and request.params.prompt_logprobs is None  # which need every position's logits

    def _cached_prefix(self, request: Request) -> list[int]:
        if not self._may_share(request):
            return []
        count = (len(request.token_ids) - 1) // self.pool.block_size  # leaves at least one token to compute
        self.pool.hash_blocks(request.block_hashes, request.token_ids, count, request.cache_root, request.block_extra)
        return self.pool.match(request.block_hashes[:count])

    def _compute(self, request: Request, schedule: SchedulerOutput) -> None:
        start, missing = request.num_computed_tokens, request.num_tokens - request.num_computed_tokens
        num_tokens = missing if missing < schedule.budget else schedule.budget
        if request.images and not (num_tokens := self._before_unready_image(request, start, num_tokens, schedule)):
            return
        samples = num_tokens == missing
        # A pending token is scheduled alone: the step that samples it computes all tokens before it.
        schedule.items.append(ScheduledRequest(request, start, num_tokens, samples, request.num_pending))
        schedule.budget -= num_tokens
        # Counted here, not in `update`, so that the next step can be scheduled before this step's tokens are known.
        request.num_computed_tokens += num_tokens
        request.num_pending += samples
        request.last_step = self.steps

    def _before_unready_image(self, request: Request, start: int, num_tokens: int, schedule: SchedulerOutput) -> int:
        """How many of `num_tokens` tokens from `start` can be computed with images that are encoded by then, and has those
        encoded. Ends the step's budget if that is not all of them."""
        cache = self.encoder_cache
        for found in request.images_within(start, start + num_tokens):
            if known := found.key in cache:
                cache.hold(found.key, request.request_id)
            size, most = found.image.tokens, self.image_tokens
            room = min(size, most) <= schedule.image_budget or not schedule.images
            if not cache.ready(found.key) and room and (known or cache.fits(size)):
                if not known:
                    cache.add(found.key, size, request.request_id, parts=-(-size // most))
                schedule.images.append(cache.next_part(found))
                schedule.image_budget -= min(size, most)
            if not cache.ready(found.key):
                num_tokens = max(0, found.start - start)
                schedule.budget = num_tokens  # younger requests must not overtake this one
                break
        return num_tokens

    def _cache_full_blocks(self, item: ScheduledRequest) -> None:
        """Adds the blocks that the step has filled to the prefix cache.

        Their hashes need the tokens' values, which are all known: the last one came with the `update` of the step before.
        """
        size, request = self.pool.block_size, item.request
        first, stop = item.start // size, (item.start + item.num_tokens) // size
        self.pool.hash_blocks(request.block_hashes, request.token_ids, stop, request.cache_root, request.block_extra)
        self.pool.commit(request.block_ids[first:stop], request.block_hashes[first:stop])

    def _append(self, request: Request, token: int) -> NewToken:
        request.token_ids.append(token)
        request.num_pending -= 1
        finish_reason, stop_reason = request.finish_of(token)
        if finish_reason:
            self.running.remove(request)
            self._release(request)
        return NewToken(request, token, finish_reason, stop_reason)

    def _preempt(self, request: Request, schedule: SchedulerOutput) -> None:
        """Frees a request's blocks. It keeps its tokens, recomputes them later, and is the next to be admitted."""
        assert not request.num_pending
        self._drop_blocks(request)
        request.num_preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        schedule.preempted.append(request)

    def _why_never(self, request: Request) -> str | None:
        """Why a waiting request can never run, if it cannot."""
        if not 0 < request.num_prompt_tokens < self.max_model_len:
            return f"A prompt must have 1 to {self.max_model_len - 1} tokens; this one has {request.num_prompt_tokens}."
        if self.pool.blocks_for(len(request.token_ids)) > self.pool.num_blocks:
            return "The request has outgrown the KV cache."
        most = self.encoder_cache.capacity
        if (largest := max((found.image.tokens for found in request.images), default=0)) > most:
            return f"An image has {largest} tokens, and {most} fit into the encoder cache (--mm-processor-cache-gb)."
        return None

    def _fail(self, request: Request, reason: str, schedule: SchedulerOutput) -> None:
        self._release(request)
        schedule.failed.append((request, reason))

    def _release(self, request: Request) -> None:
        # A step in flight may still write to these blocks. A new owner writes in a later step, and the device runs steps in
        # order. The prefix cache does not have them: a block is cached only after its step is over.
        request.status = Status.FINISHED
        del self._requests[request.request_id]
        self._drop_blocks(request)

    def _drop_blocks(self, request: Request) -> None:
        for found in request.images:
            self.encoder_cache.release(found.key, request.request_id)
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
