"""Compiles grammars and computes token masks in threads beside the steps.

Each can take a second for a grammar of some kilobytes, and llguidance frees the interpreter's lock meanwhile. A request is
queued once its grammar is compiled, and a sequence whose mask is not computed yet skips a step, so that no other request waits
for it. A grammar that has been fast so far is computed without a thread; if it turns out slow, the others wait once.

This module reads a clock, as the scheduler does not: with several ranks, one rank must tell the others which requests skip.
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


class GrammarWork:
    """Grammar work in progress. All methods must be called from one thread."""

    def __init__(self, compiler: GrammarCompiler):
        self.compiler = compiler
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="octavo-grammar")
        self._compiling: list[tuple[_Job, dict[str, EngineRequest]]] = []
        self._finding: dict[str, _Job] = {}
        self._spent = 0.0  # seconds spent on masks in this step

    @property
    def busy(self) -> bool:
        return bool(self._finding) or bool(self._compiling)

    @property
    def compiling(self) -> bool:
        return bool(self._compiling)

    def compile(self, requests: Sequence[EngineRequest]) -> None:
        """Begins to compile the grammar of `requests`, the n sequences of one request; `compiled` returns the result."""
        job = self._begin(partial(self._compile, requests[0], len(requests)))
        self._compiling.append((job, {request.request_id: request for request in requests}))

    def compiled(self) -> list[tuple[list[EngineRequest], list[Grammar] | OctavoError]]:
        """Requests whose compilation ended since the last call, each with a grammar per sequence or the error."""
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

    def unready(self, others: Collection[str]) -> tuple[set[str], list[str]]:
        """Requests whose masks are not computed yet, and those among them that exceeded LIMIT. Waits up to PATIENCE, and up to
        IDLE_PATIENCE before that if none of the requests `others` can run meanwhile."""
        idle = all(request_id in self._finding for request_id in others)
        if idle:
            jobs = [*self._finding.values(), *(job for job, _ in self._compiling)]
            wait([job.future for job in jobs], IDLE_PATIENCE, FIRST_COMPLETED)
        wait([job.future for job in self._finding.values()], PATIENCE)
        for request_id in [name for name, job in self._finding.items() if job.future.done()]:
            self._finding.pop(request_id).future.result()  # an exception here is a bug and stops the engine
        late = [name for name, job in self._finding.items() if job.late]
        return set(self._finding), late

    def forget(self, request_id: str) -> None:
        """Drops the work in progress for a request. An unknown request is no error."""
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
