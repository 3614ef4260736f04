"""Compiles grammars and computes token masks in threads beside the steps.

Each can take a second for a grammar of some kilobytes, and llguidance frees the interpreter's lock meanwhile. A request is
queued once its grammar is compiled, and a sequence whose mask is not computed yet skips a step, so that no other request waits
for it. A grammar that has been fast so far is computed without a thread; if it turns out slow, the others wait once.

This module reads a clock, as the scheduler does not. With several ranks, rank 0's view decides which grammars are done and
which sequences skip (`decide`); the other ranks wait for their own threads where those are behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from octavo.engine.grammar import Grammar, GrammarCompiler
from octavo.engine.place import Place
from octavo.engine.sampler import NO_TOKEN
from octavo.errors import InvalidRequest, OctavoError
from octavo.messages import EngineRequest

__all__ = ["CANNOT_FOLLOW", "GrammarWork", "fault_of"]

THREADS = 2
PATIENCE = 0.005  # seconds that a step spends on masks itself, and seconds that it then waits for those in threads
IDLE_PATIENCE = 0.02  # the wait where no request can run; messages wait no longer than that
LIMIT = 10.0  # seconds that compiling a grammar, or computing one mask, may take


@dataclass
class _Job:
    """Work in a thread. Its time limit counts from when it began, so that other requests' slow grammars do not use it up."""

    run: Callable[[], Any]
    began: float | None = None
    future: Future[Any] = field(init=False)

    def __call__(self) -> Any:
        self.began = time.monotonic()
        return self.run()

    @property
    def late(self) -> bool:
        return self.began is not None and not self.future.done() and time.monotonic() - self.began > LIMIT


class _Decision(NamedTuple):
    """unready: ids of requests whose masks are not computed yet; late: those of them that exceeded LIMIT. compiled: places in
    the queue of compilations that ended, and the error where one took longer than LIMIT."""

    unready: set[str]
    late: list[str]
    compiled: list[tuple[int, OctavoError | None]]


class GrammarWork:
    """Grammar work in progress. All methods must be called from one thread."""

    def __init__(self, compiler: GrammarCompiler, place: Place | None = None):
        self.compiler, self.place = compiler, place or Place()
        self._done: list[tuple[list[EngineRequest], list[Grammar] | OctavoError]] = []
        self._known: set[str] = set()  # requests with grammars
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="octavo-grammar")
        self._compiling: list[tuple[_Job, dict[str, EngineRequest]]] = []
        self._finding: dict[str, _Job] = {}
        self._spent = 0.0  # seconds spent on masks in this step

    @property
    def busy(self) -> bool:
        """Whether `decide` has something to decide; with several ranks it is the same on all."""
        return bool(self._finding or self._compiling) if self.place.size == 1 else bool(self._known)

    @property
    def compiling(self) -> bool:
        return bool(self._compiling)

    @property
    def num_compiling(self) -> int:
        """Sequences that wait for their grammars."""
        return sum(len(requests) for _, requests in self._compiling)

    def compile(self, requests: Sequence[EngineRequest]) -> None:
        """Begins to compile the grammar of `requests`, the n sequences of one request; `compiled` returns the result."""
        job = self._begin(partial(self._compile, requests[0], len(requests)))
        self._compiling.append((job, {request.request_id: request for request in requests}))
        self._known.update(request.request_id for request in requests)

    def compiled(self) -> list[tuple[list[EngineRequest], list[Grammar] | OctavoError]]:
        """Requests whose compilation ended by the last `decide`, each with a grammar per sequence or the error."""
        done, self._done = self._done, []
        return done

    def decide(self, others: Collection[str]) -> tuple[set[str], list[str]]:
        """Which requests skip the next step, since their masks are not computed yet, and which of them exceeded LIMIT. Decides
        what is `compiled`, too.

        Waits up to PATIENCE, and up to IDLE_PATIENCE before that if none of the requests `others` can run meanwhile.
        """
        decision = self.place.share(self._look(others) if not self.place.rank else _Decision(set(), [], []))
        for request_id in [name for name in self._finding if name not in decision.unready]:
            self._finding.pop(request_id).future.result()  # an exception here is a bug and stops the engine
        left = dict(enumerate(self._compiling))
        for place, error in decision.compiled:
            job, requests = left.pop(place)
            self._done.append((list(requests.values()), error or job.future.result()))
        self._compiling = list(left.values())
        return decision.unready, decision.late

    def find(self, request_id: str, grammar: Grammar) -> None:
        """Computes the mask of the next tokens: at once if the grammar is fast and the step has time left, else in a thread,
        which would start too late for a fast one."""
        if grammar.speed.slow or self._spent > PATIENCE:
            self._finding[request_id] = self._begin(grammar.find)
            return
        start = time.monotonic()
        grammar.find()
        self._spent += time.monotonic() - start

    def new_step(self) -> None:
        """Resets the time that a step may spend on masks."""
        self._spent = 0.0

    def _look(self, others: Collection[str]) -> _Decision:
        idle = all(request_id in self._finding for request_id in others)
        if idle:
            jobs = [*self._finding.values(), *(job for job, _ in self._compiling)]
            wait([job.future for job in jobs], IDLE_PATIENCE, FIRST_COMPLETED)
        wait([job.future for job in self._finding.values()], PATIENCE)
        unready = {name for name, job in self._finding.items() if not job.future.done()}
        late = [name for name, job in self._finding.items() if name in unready and job.late]
        compiled: list[tuple[int, OctavoError | None]] = []
        for place, (job, _) in enumerate(self._compiling):
            if job.future.done():
                compiled.append((place, None))
            elif job.late:
                error = InvalidRequest(
                    f"The grammar of the structured output was not compiled within {LIMIT:g} s; make it simpler.",
                    "response_format",
                )
                compiled.append((place, error))
        return _Decision(unready, late, compiled)

    def forget(self, request_id: str) -> None:
        """Drops the work in progress for a request. An unknown request is no error."""
        self._known.discard(request_id)
        if (job := self._finding.pop(request_id, None)) is not None:
            job.future.cancel()
        for job, requests in self._compiling:
            if requests.pop(request_id, None) is not None and not requests:
                job.future.cancel()
        self._compiling = [(job, requests) for job, requests in self._compiling if requests]

    def _begin(self, run: Callable[[], Any]) -> _Job:
        job = _Job(run)
        job.future = self._pool.submit(job)
        return job

    def _compile(self, request: EngineRequest, count: int) -> list[Grammar] | OctavoError:
        """`count` copies of the compiled grammar. The first mask is computed once, before copying."""
        assert request.grammar is not None
        try:
            first = self.compiler.compile(request.grammar, request.eos_token_ids)
        except OctavoError as error:
            return error
        first.find()
        return [first, *(first.copy() for _ in range(count - 1))]


CANNOT_FOLLOW = "The structured output cannot be followed any further: {}"


def fault_of(grammar: Grammar | None, token: int) -> str | None:
    """Advances `grammar` by `token`. Returns an error sentence if the request cannot go on."""
    if grammar is not None and token != NO_TOKEN:
        grammar.accept(token)
    if grammar is not None and (error := grammar.error):
        return CANNOT_FOLLOW.format(error)
    if token == NO_TOKEN:
        return (
            "No token is left to choose: allowed_token_ids, bad_words, min_tokens and the structured output exclude them all."
        )
    return None
