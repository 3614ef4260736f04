"""Who compiles the kernels of a start: a process that was begun with the engine, or this process's threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.engine.compile_process import CompileProcess, begun
from octavo.engine.place import Place
from octavo.platform import Platform, threads_on

__all__ = ["beside", "compiling"]


@contextmanager
def compiling(platform: Platform, tp: TensorParallel, place: Place) -> Iterator[None]:
    """Within this context kernels are compiled by the process that rank 0 has begun, if there is one, for all ranks: those of
    one host share its caches, and ranks that split every layer launch the same kernels.
    """
    process = begun()
    try:
        if platform.is_cpu or platform.is_described or place.address or tp.stages.count > 1:
            yield
            return
        (there,) = tp.engine.least(int(process is not None or place.rank > 0))
        if not there:
            yield
            return
        if process is not None:
            process.describe(platform.described())
        ops.compile_elsewhere(_OfRankZero(process, lambda: tp.engine.least(0)))
        try:
            yield
        finally:
            ops.compile_elsewhere(None)
    finally:
        if process is not None:
            process.close()


@contextmanager
def beside(platform: Platform, fuse: Callable[[Platform], None] | None) -> Iterator[Future[None]]:
    """Within this context fuse(platform), if there is one, runs in a thread: megakernels are compiled while the kernels of
    prompts are."""
    if fuse is None:
        nothing: Future[None] = Future()
        nothing.set_result(None)
        yield nothing
        return
    with threads_on(platform.device, 1, "octavo-beside") as pool:
        made = pool.submit(fuse, platform)
        yield made
        made.result()


class _OfRankZero:
    """The process, on rank 0; other ranks have none, and wait until it has compiled what rank 0 needed.

    meet: waits for all ranks.
    """

    def __init__(self, process: CompileProcess | None, meet: Callable[[], object]):
        self.process, self.meet = process, meet

    def submit(self, module: str, name: str, specialization: str) -> Future[None]:
        if self.process is not None:
            return self.process.submit(module, name, specialization)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def finish(self) -> None:
        self.meet()
