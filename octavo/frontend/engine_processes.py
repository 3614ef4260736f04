"""The processes of one engine, one a rank: starting them, noticing that one has ended, ending all.

Ranks compute together, so when one ends the others cannot go on; they would wait for it for ever.
"""

from __future__ import annotations

import atexit
import multiprocessing
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from octavo import pipes
from octavo.config import EngineConfig
from octavo.frontend.engine_start import worker
from octavo.frontend.nodes import Nodes
from octavo.frontend.seat import Seat
from octavo.messages import Message

if TYPE_CHECKING:
    from octavo.engine.worker import MakeCore

__all__ = ["EngineProcesses"]

EXIT_SECONDS = 5.0  # for which a process that was asked to end may take before it is killed
ANSWER_SECONDS = 3.0  # for which a rank may take to answer that it is there
STILL_SECONDS = 1.0  # for which ranks must stand still before one is said to hang
LAST_WORDS = 0.5  # seconds for which the others may go on after one has ended, to send what it did
ELSEWHERE = 1.0  # seconds for another host to say that it is the reason why a rank here has ended


class EngineProcesses:
    """Started engine processes. `connections`: to each rank here; rank 0 answers messages, the others send errors alone.

    leads: rank 0 is in this process, at `place`, and the processes are those of the other ranks. replica: the engine's number
    among those of --data-parallel-size, each of which has the devices behind those of the one before. nodes: the engine's other
    hosts, if this is the API process; the last connection is then their alarm. seat: which ranks are here; default: nodes',
    or all.
    """

    def __init__(
        self,
        config: EngineConfig,
        make_core: MakeCore | None = None,
        *,
        leads: bool = False,
        replica: int = 0,
        nodes: Nodes | None = None,
        seat: Seat | None = None,
    ):
        seat = seat or (nodes.seat if nodes is not None else None) or Seat(0, config.num_ranks, config.num_ranks)
        context = multiprocessing.get_context("spawn")  # fork would copy locks that other threads hold
        self._seat, self._nodes = seat, nodes
        alone = seat.count < 2 or bool(seat.address)  # ranks meet over the network, or there is one
        self._directory = None if alone else tempfile.mkdtemp(prefix="octavo-")
        store = str(Path(self._directory) / "ranks") if self._directory else ""
        links = [context.Pipe() for _ in range(1, seat.count)]
        down = [*(first for first, _ in links), *seat.links]
        theirs: list[Connection] = []
        self.connections: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._reaping = threading.Lock()
        self._answers: dict[int, tuple[int, int, int]] = {}  # rank -> how far it said that it has come
        self.killed = False
        self._ended: tuple[int, int | None] | None = None  # the first rank that ended, and its exit code
        Place, run_engine = worker().Place, worker().run_engine

        def place(n: int) -> Any:
            up = seat.source if n == 0 else links[n - 1][1]
            at = seat.first + n, seat.size, store, down if n == 0 else (), up
            return Place(*at, device=replica * seat.size + n, address=seat.address, interface=seat.interface)

        self.place = place(0) if seat.count else Place()
        self._first = seat.first  # the rank of the first connection
        if seat.api is not None:
            if seat.count:
                self._first += 1
            else:  # all ranks are elsewhere
                self.connections.append(seat.api)
        try:
            with _without_main():
                for n in range(int(leads), seat.count):
                    if n == 0 and seat.api is not None:
                        child_end = seat.api
                    else:
                        mine, child_end = context.Pipe()
                        self.connections.append(mine)
                        theirs.append(child_end)
                    process = context.Process(
                        target=run_engine,
                        args=(config, child_end, make_core, place(n)),
                        name=f"octavo-rank-{seat.first + n}" if seat.size > 1 else "octavo-engine",
                    )
                    self._processes.append(process)
                    process.start()
        except BaseException:
            self.kill()
            raise
        finally:
            held = [] if leads else [*(first for first, _ in links), *(seat.over_network if seat.count else ())]
            for end in (*theirs, *held, *(second for _, second in links)):
                end.close()  # otherwise the end of a process would never be noticed
        self._sending = [threading.Lock() for _ in self.connections]
        self._asked = len(self.connections)
        if nodes is not None:
            self.connections.append(nodes.alarm)
        atexit.register(self.kill)  # multiprocessing's own exit hook would wait for the processes
        if len(self._processes) > 1 and not leads:
            threading.Thread(target=self._watch, name="octavo-watch", daemon=True).start()

    def send(self, message: Message, n: int = 0) -> None:
        """Over connection `n`. Raises OSError if the process is gone."""
        with self._sending[n]:
            pipes.send([self.connections[n]], message)

    def receive(self, n: int) -> Message:
        """The next message of connection `n`; one thread asks for each. Raises EOFError or OSError when the process is gone."""
        message: Message = self.connections[n].recv()
        self.note(n, message)
        return message

    def note(self, n: int, message: Message) -> None:
        """Keeps what a message from connection `n` says about how far its rank has come."""
        if message[0] == "pong":
            self._answers[self._first + n] = message[1:]

    def tell_nodes(self, sentence: str) -> None:
        """Tells the other hosts that the engine is dead, and why. The ranks here end at once: they would print that they have
        lost the others."""
        if self._nodes is not None:
            self._nodes.end(sentence)
            self.end_ranks()

    @property
    def ended_well(self) -> bool:
        """Whether the first rank that has ended was asked to."""
        return self._ended is not None and self._ended[1] == 0

    def hanging(self) -> str | None:
        """A sentence that names the ranks that hang: those that do not answer, else those that the others wait for while none
        moves on. None where there are none. Others must `receive` from each rank, or `note` its messages, meanwhile.

        Every rank that answers prints where it is to standard error, one after another.
        """
        ranks, seen = range(self._seat.size), self.ask(True)
        if silent := [rank for rank in ranks if rank not in seen]:
            return _hang(len(ranks), silent, "no answer")
        time.sleep(STILL_SECONDS)
        steps, turns, exchanges = least = min(seen.values())  # it waits for nobody: all others have come to where it is
        if least == max(seen.values()) or self.ask(False) != seen:
            return None
        behind = [rank for rank in ranks if seen[rank] == least]
        where = f"in step {steps}, behind exchange {exchanges} of turn {turns}"
        return _hang(len(ranks), behind, f"{where}; the others wait in the next")

    def ask(self, prints: bool) -> dict[int, tuple[int, int, int]]:
        """What each rank answers within ANSWER_SECONDS: the steps, turns and exchanges that it has begun."""
        self._answers.clear()
        for n in range(self._asked):  # a message to one that hangs may block its pipe for ever
            threading.Thread(target=self._ping, args=(n, prints), name="octavo-ping", daemon=True).start()
            deadline = time.monotonic() + ANSWER_SECONDS
            while self._first + n not in self._answers and time.monotonic() < deadline:
                time.sleep(0.02)
        others = self._nodes.ask(prints) if self._nodes is not None else {}
        return dict(self._answers) | others

    def _ping(self, n: int, prints: bool) -> None:
        with suppress(OSError):
            self.send(("ping", prints), n)

    def kill(self) -> None:
        """Ends every process at once."""
        self.killed = True
        atexit.unregister(self.kill)
        self.tell_nodes("")
        self.end_ranks()
        self.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def end_ranks(self) -> None:
        """Kills the processes, and does not wait until they have ended."""
        with self._reaping:
            for process in self._processes:
                with suppress(ValueError, AttributeError):  # one that was never started
                    if process.is_alive():
                        process.kill()

    def wait(self) -> None:
        """Waits for all processes to end, EXIT_SECONDS at most."""
        deadline = time.monotonic() + EXIT_SECONDS
        for process in self._processes:
            with suppress(ValueError, AttributeError):
                self._exit_code(process, max(0.0, deadline - time.monotonic()))

    def last_words(self) -> str:
        """Waits until a rank has ended or says that it must, and returns why."""
        for connection in wait(self.connections):
            with suppress(EOFError, OSError):
                return str(cast("Connection", connection).recv()[1])
        return self.how_it_ended()

    def how_it_ended(self, seconds: float | None = EXIT_SECONDS) -> str:
        """Why the engine is gone, in a sentence, once a process has ended, for which this waits so long."""
        if self._ended is None:
            wait([process.sentinel for process in self._processes], seconds)
            self._note_first()
        n, code = self._ended or (0, None)
        if self._seat.size > self._seat.count and (code is None or code >= 0):
            time.sleep(ELSEWHERE)
        who = "The engine process" if self._seat.size == 1 else f"Rank {self._seat.first + n} of the engine"
        if code == -signal.SIGKILL:
            return f"{who} was killed; the machine may have run out of memory."
        if code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
            name = signal.Signals(-code).name
            return f"{who} crashed ({name}); if memory is limited (ulimit -v), it may have been too little."
        return f"{who} ended unexpectedly (exit code {code})."

    def _note_first(self) -> None:
        """Notes which process has ended, before others are ended for it."""
        if self._ended is None:
            ended = [n for n, process in enumerate(self._processes) if wait([process.sentinel], 0)]
            if ended:
                codes = {rank: self._exit_code(self._processes[rank]) or 0 for rank in ended}
                rank = max(ended, key=lambda rank: (codes[rank] < 0, codes[rank] > 1))  # 0 and 1 may be another's doing
                self._ended = rank, codes[rank]

    def _watch(self) -> None:
        """Runs in a thread: when a rank ends, ends the others."""
        wait([process.sentinel for process in self._processes])
        self._note_first()
        wait([self._processes[0].sentinel], LAST_WORDS)
        self.end_ranks()

    def _exit_code(self, process: multiprocessing.process.BaseProcess, seconds: float = EXIT_SECONDS) -> int | None:
        """Waits for a process to end. Its exit code, or None after so many seconds.

        The lock is needed because the kernel reports the exit to one waiter only: a second thread would see a live process.
        """
        if not wait([process.sentinel], seconds):
            return None
        with self._reaping:
            process.join(EXIT_SECONDS)
            return process.exitcode


def _hang(ranks: int, hanging: Sequence[int], how: str) -> str:
    named = f"rank {hanging[0]} hangs" if len(hanging) == 1 else f"ranks {', '.join(map(str, hanging))} hang"
    return f"Of the engine's {ranks} ranks {named} ({how}); the stacks of those that answer are above."


@contextmanager
def _without_main() -> Iterator[None]:
    """Hides the main module, which a spawned process would otherwise import: a script that makes an LLM without asking for
    __name__ == "__main__" would run anew in each."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
