"""The engine of one rank: schedule, run, update. Requests go in, one step's tokens come out.

On an accelerator each step is launched before the host has read the tokens of the one before; the device passes them on. A
decision that the host takes from a token, such as finishing its request, therefore comes one step late.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.block_pool import BlockPool
from octavo.engine.encoder_cache import EncoderCache
from octavo.engine.grammar import Grammar, GrammarCompiler
from octavo.engine.grammar_work import CANNOT_FOLLOW, GrammarWork, fault_of
from octavo.engine.place import Place
from octavo.engine.runner import ModelRunner
from octavo.engine.sampling_row import SamplingRow, waits_for_tokens
from octavo.engine.scheduler import IMAGE_TOKENS, Scheduler
from octavo.engine.sequence import ScheduledRequest, SchedulerOutput, Status
from octavo.engine.step_tokens import StepTokens, latest
from octavo.engine.token_rules import BadWords, TokenRules
from octavo.errors import InvalidRequest, OctavoError
from octavo.messages import KV_CACHE, WEIGHTS, EngineInfo, EngineRequest, EngineStats, Logprobs, TokenOutput

__all__ = ["EngineCore"]


@dataclass
class _Generation:
    """Engine state of one sequence beside its tokens."""

    seed: int
    grammar: Grammar | None
    rules: TokenRules
    bad_words: BadWords | None
    prompt_logprobs: list[Logprobs | None] = field(default_factory=lambda: [None])
    row: SamplingRow | None = None  # made with its first step, when its grammar is known


@dataclass(slots=True)
class _Step:
    """A launched step."""

    schedule: SchedulerOutput
    result: StepTokens
    synchronous: bool  # the next step must not be launched before this one's tokens are read


class EngineCore:
    """Runs requests together. Not thread-safe: the caller makes one call of add, abort or step at a time."""

    def __init__(self, config: EngineConfig, progress: Callable[[str, float], None] | None = None, place: Place | None = None):
        if place is None and config.num_ranks > 1:
            split = "--tensor-parallel-size" if config.tensor_parallel_size > 1 else "--pipeline-parallel-size"
            raise OctavoError(f"{split} is for octavo serve, chat, bench and LLM here; leave it out.")
        place = place or Place()
        self.runner = runner = ModelRunner(config, progress, place)
        self.config, self.awake = config, frozenset((WEIGHTS, KV_CACHE))
        self._make_scheduler()
        self.grammars = GrammarWork(GrammarCompiler(Path(config.text_directory), runner.limits.vocab_size), place)
        self.generations: dict[str, _Generation] = {}
        # Most steps in flight: one a stage of a pipeline, and one that is launched before the tokens that it computes are read.
        self.depth = runner.tp.stages.count + runner.pipeline.ahead
        self.in_flight: deque[_Step] = deque()  # launched and not yet read, oldest first
        self.next_seed = config.seed << 32  # requests without a seed count up from here, so that a run is reproducible

    def __del__(self) -> None:
        """Returns freed memory to the device and the system, which torch's allocator and the C library would keep."""
        runner = vars(self).pop("runner", None)
        if runner is not None and not sys.is_finalizing():
            platform = runner.platform
            del runner
            platform.release()

    def _make_scheduler(self) -> None:
        """Makes the scheduler and an empty block pool for the runner's blocks."""
        runner = self.runner
        pool = BlockPool(runner.num_blocks, runner.block_size, self.config.enable_prefix_caching)
        room = 0 if runner.encoder is None else runner.encoder.capacity
        limits = self.config.max_num_seqs, runner.max_num_batched_tokens, runner.max_model_len
        at_once = IMAGE_TOKENS if runner.encoder is None else runner.encoder.step_tokens
        self.scheduler = Scheduler(pool, *limits, EncoderCache(room), at_once, runner.tp.stages.count, runner.pipeline.ahead)
        self.info = EngineInfo(
            max_model_len=runner.max_model_len,
            vocab_size=runner.limits.vocab_size,
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
            model_type=runner.model_type,
            max_logprobs=self.config.max_logprobs,
            image_tokens=0 if runner.encoder is None else runner.encoder.largest,
            report=runner.describe(),
            weights=[(role, scheme, group.held) for (role, scheme), group in runner.report.groups.items()],
        )

    def add(self, *requests: EngineRequest) -> None:
        """Queues the n sequences of a request, which differ in id and seed. Raises InvalidRequest if it cannot be run."""
        if KV_CACHE not in self.awake:
            raise InvalidRequest("The engine sleeps; wake it first.")
        first = requests[0]
        rules = TokenRules(first.params, first.eos_token_ids, first.bad_words)
        for request in requests:
            seed, self.next_seed = self.next_seed, self.next_seed + 1
            if request.params.seed is not None:
                seed = request.params.seed
            words = BadWords(rules) if rules.restricted else None
            if waits_for_tokens(first.params) or rules.restricted or first.grammar is not None:
                self.scheduler.slow.add(request.request_id)
            self.generations[request.request_id] = _Generation(seed, None, rules, words)
        if first.images and self.runner.encoder is not None:
            delta = self.runner.encoder.rotary_delta(first.images)
            requests = tuple(replace(request, rotary_delta=delta) for request in requests)
        if first.grammar is not None:
            self.grammars.compile(requests)
            return
        for request in requests:
            self.scheduler.add(request)

    def _queue_compiled(self, outputs: list[TokenOutput]) -> None:
        """Queues requests whose grammars have compiled. `outputs` gets an error for each grammar that does not compile."""
        for requests, grammars in self.grammars.compiled():
            if isinstance(grammars, OctavoError):
                outputs += self._failed([request.request_id for request in requests], str(grammars))
                continue
            for request, grammar in zip(requests, grammars, strict=False):  # some sequences may have been aborted
                self.generations[request.request_id].grammar = grammar
                self.scheduler.add(request)

    def _failed(self, request_ids: Iterable[str], reason: str) -> list[TokenOutput]:
        for request_id in request_ids:
            self.abort(request_id)
        return [TokenOutput(request_id, [], "abort", error=reason) for request_id in request_ids]

    def abort(self, request_id: str) -> None:
        """Forgets a request. An unknown or finished one is no error."""
        self.scheduler.abort(request_id)
        self._forget(request_id)
        if self.runner.encoder is not None:  # no step may follow, which would drop what is half encoded
            self.runner.encoder.run((), self.scheduler.encoder_cache.take_evicted())

    def _forget(self, request_id: str) -> None:
        self.generations.pop(request_id, None)
        self.scheduler.slow.discard(request_id)
        self.grammars.forget(request_id)
        self.runner.histories.forget(request_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.in_flight) or self.grammars.compiling

    def step(self) -> tuple[list[TokenOutput], EngineStats]:
        """Runs one step: the outputs that it added to each request, and the engine's statistics."""
        outputs: list[TokenOutput] = []
        step = self.in_flight[0] if self.in_flight else self._launch(outputs)
        while len(self.in_flight) < self.depth and not step.synchronous:
            further = self._launch(outputs).schedule
            if not further.items:  # the next step may depend on the tokens of `step`
                step.schedule.report(further)
                break
        if self.in_flight and self.in_flight[0] is step:
            self.in_flight.popleft()
        outputs += self._take(step)
        stats = self.scheduler.stats(step.schedule)
        stats.num_deferred = self.grammars.num_compiling
        stats.image_queries, stats.image_hits = self.scheduler.encoder_cache.take_counts()
        return outputs, stats

    def _launch(self, outputs: list[TokenOutput]) -> _Step:
        """Launches the next step and adds it to those in flight unless it is empty. `outputs` gets the failed requests."""
        for step in self.in_flight:
            if not step.result.tell_early():
                break
        schedule = self.scheduler.schedule(self._skipped(outputs))
        for request, reason in schedule.failed:
            self._forget(request.request_id)
            outputs.append(TokenOutput(request.request_id, [], "abort", error=reason))
        rows = [self._row(item) for item in schedule.items]
        pending = {item.request.request_id for item in schedule.items if item.pending}
        previous = latest([step.result for step in self.in_flight], pending) if pending else None
        if self.runner.encoder is not None:
            self.runner.encoder.run(schedule.images, schedule.evicted)
        synchronous = self.runner.tp.stages.count == 1 and any(row.synchronous for row in rows)  # else the next has other rows
        step = _Step(schedule, self.runner.run(schedule.items, rows, previous), synchronous)
        if schedule.items:
            self.in_flight.append(step)
        return step

    def _skipped(self, outputs: list[TokenOutput]) -> Collection[str]:
        """Ids of requests whose allowed next tokens are not computed yet. `outputs` gets those that exceeded the time limit."""
        if not self.grammars.busy:
            return ()
        unready, late = self.grammars.decide(self.scheduler.request_ids)
        if late:
            outputs += self._failed(late, CANNOT_FOLLOW.format("finding its next tokens takes too long."))
        self._queue_compiled(outputs)
        return unready

    def check_reload(self, model: str) -> None:
        """Raises OctavoError, the same on every rank, where `reload` could not take a checkpoint directory. Changes nothing."""
        self._check_weights()
        self.runner.check_reload(model)

    def reload(self, model: str, checked: bool = False) -> None:
        """Loads the weights of another checkpoint directory with the same config.json and schemes; else OctavoError, and the
        old weights stay. `checked`: by `check_reload`, just now.

        The cache holds keys and values of the old weights, so no request may run, and the prefix cache is dropped.
        """
        self._check_weights()
        self._check_idle("weights are reloaded")
        if not checked:
            self.runner.check_reload(model)
        try:
            self.runner.reload(model)
        finally:
            self.reset_prefix_cache()  # also where the old weights are back: the new ones have written to blocks
        if KV_CACHE in self.awake:
            self.info = replace(self.info, report=self.runner.describe())

    def reset_prefix_cache(self) -> None:
        """Forgets which blocks hold which prefixes, and the features of images."""
        self.scheduler.pool.reset_prefix_cache()
        if self.runner.encoder is not None and not self.scheduler.has_work:  # running requests need theirs
            self.scheduler.encoder_cache = EncoderCache(self.runner.encoder.capacity)
            self.runner.encoder.forget()

    def sleep(self) -> None:
        """Frees weights, cache and graphs until `wake`. Raises OctavoError while requests run."""
        if not self.awake:
            raise OctavoError("the engine sleeps already; wake the engine first.")
        self._check_idle("the engine sleeps")
        self.awake = frozenset()
        self.runner.sleep()

    def wake(self, parts: Collection[str] = (WEIGHTS, KV_CACHE)) -> None:
        """Loads or makes again what `sleep` freed: the WEIGHTS, the KV_CACHE with what else a step needs, or both.

        What is awake stays as it is. OctavoError for a cache without weights, from whose size its own follows.
        """
        if WEIGHTS in parts and WEIGHTS not in self.awake:
            self.runner.load_weights()
            self.awake |= {WEIGHTS}
        if KV_CACHE in parts and KV_CACHE not in self.awake:
            self._check_weights()
            self.runner.make_runnable()
            self._make_scheduler()  # there may be another number of blocks now
            self.awake |= {KV_CACHE}

    def _check_weights(self) -> None:
        if WEIGHTS not in self.awake:
            raise OctavoError("the engine sleeps and has no weights; wake the engine first, or its weights alone.")

    def _check_idle(self, what: str) -> None:
        if self.has_work():
            raise OctavoError(f"{what} only while no request runs; wait for the running ones, or abort them.")

    def _row(self, item: ScheduledRequest) -> SamplingRow:
        request, generation = item.request, self.generations[item.request.request_id]
        if generation.row is None:
            known = request.params, request.token_ids, request.num_prompt_tokens, generation.seed, request.eos_token_ids
            generation.row = SamplingRow(*known, generation.grammar, rules=generation.rules, bad_words=generation.bad_words)
        generation.row.num_pending = item.pending
        return generation.row

    def _take(self, step: _Step) -> list[TokenOutput]:
        """Waits for a step's tokens and makes the outputs."""
        outputs, schedule, result = [], step.schedule, step.result
        tokens = result.to_host()
        self.grammars.new_step()
        for item in schedule.items if result.prompt_logprobs else ():
            entries = result.prompt_logprobs.get(item.request.request_id)
            if entries is not None and item.request.status is not Status.FINISHED:  # an aborted request needs none
                kept = self.generations[item.request.request_id].prompt_logprobs
                del kept[item.start + 1 :]  # a preempted prefill computes these positions again
                kept.extend(entries)
        for request, token, finish_reason, stop_reason in self.scheduler.update(schedule, tokens):
            request_id = request.request_id
            generation = self.generations[request_id]
            if (fault := fault_of(generation.grammar, token)) is not None:
                outputs += self._failed([request_id], fault)
                continue
            if generation.grammar is not None and finish_reason is None:
                self.grammars.find(request_id, generation.grammar)
            output = TokenOutput(request_id, [token], finish_reason, stop_reason)
            output.num_cached_tokens, output.num_preemptions = request.num_cached_tokens, request.num_preemptions
            if result.logprobs and request_id in result.logprobs:
                output.logprobs = [result.logprobs[request_id]]
            if request.params.prompt_logprobs is not None and request.num_output_tokens == 1:
                output.prompt_logprobs = generation.prompt_logprobs
            outputs.append(output)
            if finish_reason is not None:
                self._forget(request_id)
        return outputs
