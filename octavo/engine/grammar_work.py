"""The slow parts of grammars, compiling them and finding the tokens that may come next, in threads beside the steps.

A grammar of some kilobytes can take a second for either, and llguidance frees the interpreter's lock meanwhile. So a request is
queued when its grammar is compiled, and a sequence whose next tokens are not found yet sits out a step: nobody waits for it. A
grammar that was quick so far is no thread's work; when it turns out to be slow, that costs the others one wait a request.

This reads a clock, as the scheduler does not: with several ranks, one of them has to tell the others who sits out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from octavo.engine.grammar import Grammar, GrammarCompiler
from octavo.errors import InvalidRequest, OctavoError
from octavo.messages import EngineRequest

__all__ = ["GrammarWork"]

THREADS = 2
PATIENCE = 0.005  # seconds that a step takes to find tokens, and then waits for those that threads find
IDLE_PATIENCE = 0.02  # where there is nothing else to do; messages wait no longer than that
LIMIT = 10.0  # seconds that compiling one grammar, or finding its next tokens, may take


@dataclass
class _Job:
    """Work in a thread. It has the limit from when it began: others' slow grammars are not its own."""

    run: Callable[[], Any]
    began: float | None = None
    future: Future[Any] = field(init=False)

    def __call__(self) -> Any:
        self.began = time.monotonic()
        return self.run()

    @property
    def late(self) -> bool:
        return self.began is not None and not self.future.done() and time.monotonic() - self.began > LIMIT


class GrammarWork:
    """What is under way. Its owner calls everything from one thread."""

    def __init__(self, compiler: GrammarCompiler):
        self.compiler = compiler
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="octavo-grammar")
        self._compiling: list[tuple[_Job, dict[str, EngineRequest]]] = []
        self._finding: dict[str, _Job] = {}
        self._spent = 0.0  # seconds of this step

    @property
    def busy(self) -> bool:
        return bool(self._finding) or bool(self._compiling)

    @property
    def compiling(self) -> bool:
        return bool(self._compiling)

    def compile(self, requests: Sequence[EngineRequest]) -> None:
        """Begins to compile the grammar that `requests`, the sequences of one, have; `compiled` tells when it is done."""
        job = self._begin(partial(self._compile, requests[0], len(requests)))
        self._compiling.append((job, {request.request_id: request for request in requests}))

    def compiled(self) -> list[tuple[list[EngineRequest], list[Grammar] | OctavoError]]:
        """Requests whose grammar is compiled since the last call, each with its own, or why it cannot be."""
        done: list[tuple[list[EngineRequest], list[Grammar] | OctavoError]] = []
        left = []
        for job, requests in self._compiling:
            if job.late:
                error = InvalidRequest(
                    f"The grammar of the structured output was not compiled within {LIMIT:g} s; make it simpler.",
                    "response_format",
                )
                done.append((list(requests.values()), error))
            elif not job.future.done():
                left.append((job, requests))
            else:
                done.append((list(requests.values()), job.future.result()))
        self._compiling = left
        return done

    def find(self, request_id: str, grammar: Grammar) -> None:
        """Finds the tokens that may come next: at once if that was quick so far and the step has time, else in a thread, whose
        turn would come later than the tokens."""
        if grammar.pace.slow or self._spent > PATIENCE:
            self._finding[request_id] = self._begin(grammar.find)
            return
        start = time.monotonic()
        grammar.find()
        self._spent += time.monotonic() - start

    def new_step(self) -> None:
        """There is time again to find tokens at once."""
        self._spent = 0.0

    def unready(self, others: Collection[str]) -> tuple[set[str], list[str]]:
        """Requests whose next tokens are not found yet, of which those that took too long are told apart. Waits a little, and
        a little longer unless some of `others` can run meanwhile."""
        idle = all(request_id in self._finding for request_id in others)
        if idle:
            jobs = [*self._finding.values(), *(job for job, _ in self._compiling)]
            wait([job.future for job in jobs], IDLE_PATIENCE, FIRST_COMPLETED)
        wait([job.future for job in self._finding.values()], PATIENCE)
        for request_id in [name for name, job in self._finding.items() if job.future.done()]:
            self._finding.pop(request_id).future.result()  # an error in it is the engine's own
        late = [name for name, job in self._finding.items() if job.late]
        return set(self._finding), late

    def forget(self, request_id: str) -> None:
        """Whatever is under way for a request is of no use any more; one that is not known is no error."""
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
        """The same grammar `count` times, the first tokens found: the copies know what that has computed."""
        assert request.grammar is not None
        try:
            first = self.compiler.compile(request.grammar, request.eos_token_ids)
        except OctavoError as error:
            return error
        first.find()
        return [first, *(first.copy() for _ in range(count - 1))]
