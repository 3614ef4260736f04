"""The engine process: a loop that receives messages, runs steps and sends back each step's outputs.

An engine of several ranks has a process for each. All of them run the same loop; rank 0 receives and sends.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from octavo import pipes
from octavo.config import EngineConfig
from octavo.engine import compile_process
from octavo.engine.place import Place
from octavo.errors import OctavoError, shortage
from octavo.host import release
from octavo.messages import CONTROLS, EngineInfo, EngineRequest, EngineStats, Message, Progress, TokenOutput

__all__ = ["Core", "MakeCore", "Place", "engine_core", "run_engine"]

IDLE_SECONDS = 2.0  # idle time after which freed memory is returned to the system
ALONE_SECONDS = 1.0  # for which a rank waits with its error, in case that another's end is the reason, which ends it
ORPHAN_GRACE = 5.0  # seconds that a running step or load may take to end after the parent died


ALONE = Place()


class Core(Protocol):
    """The part of EngineCore that this process uses."""

    info: EngineInfo

    def add(self, *requests: EngineRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> tuple[list[TokenOutput], EngineStats]: ...


NOTHING: list[Message] = []
BESIDE_REQUESTS = ("check_reload", "reset_prefix_cache")  # the controls that change nothing for requests that run
MakeCore = Callable[[EngineConfig, Progress, Place], Core]


def engine_core(config: EngineConfig, progress: Progress, place: Place = ALONE) -> Core:
    """The real core. Imported lazily, because it imports torch."""
    if not place.rank:
        compile_process.begin(config)
    imported = "octavo.engine.core" in sys.modules
    from octavo.engine.core import EngineCore

    if not imported:  # importing torch.fx leaves a reference cycle through its callers' frames, which keeps their objects alive
        gc.collect()
    return EngineCore(config, progress, place)


def _leave() -> None:
    """Ends this process's part in the collectives, as their library wants it before a process ends."""
    from octavo.distributed import leave

    leave()


def run_engine(config: EngineConfig, connection: Connection, make_core: MakeCore | None = None, place: Place = ALONE) -> None:
    """Main function of an engine process. Ends on a shutdown message, when a step fails, or when the parent is gone.

    connection: to the API process. Those of ranks over 0 carry errors alone.
    """
    line = _Line(connection)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and systemd signal the whole group; the parent decides what to do
        signal.signal(number, signal.SIG_IGN)
    inbox: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=_receive, args=(line, inbox, place), daemon=True).start()
    try:
        core = _load(config, line, make_core or engine_core, place)
        if core is None:
            sys.exit(1)
        gc.collect()
        gc.freeze()  # the model lives as long as the process, so the collector need not walk it during a step
        if place.rank:
            _follow(core, place)
        else:
            _serve(core, inbox, line, place)
        if place.size > 1 and make_core is None:
            del core
            _leave()
    except ConnectionError:
        return  # the parent is gone, so nobody can be notified
    except EOFError:
        sys.exit(1)  # another rank is gone, which the parent sees
    except Exception as error:
        if place.size > 1:
            time.sleep(ALONE_SECONDS)
        _report(error, line, "dead", f"The engine stopped: {_sentence(error)}")
        sys.exit(1)


class _Line:
    """The connection to the API process, to which two threads send."""

    def __init__(self, connection: Connection):
        self.connection, self._sending = connection, threading.Lock()
        self.lost = False  # whether the API process is gone

    def send(self, message: Message) -> None:
        with self._sending:
            self.connection.send(message)


def _receive(line: _Line, inbox: SimpleQueue[Message], place: Place) -> None:
    """Runs in a thread, so that an idle engine blocks on its inbox and a busy one never waits for the pipe."""
    try:
        while True:
            message = pipes.receive(line.connection)
            if message[0] == "ping":
                _answer(line, place, message[1])
            else:
                inbox.put(message)
    except (EOFError, OSError):
        line.lost = True
        if place.store:  # a parent that was killed leaves the directory
            shutil.rmtree(Path(place.store).parent, ignore_errors=True)
        inbox.put(("shutdown",))
    except Exception as error:  # what was sent cannot be read; without this thread every later request would wait for ever
        _report(error, line, "dead", f"The engine cannot read what it was sent: {_sentence(error)}")
    time.sleep(ORPHAN_GRACE)
    os._exit(1)  # a step that hangs must not hold the accelerator's memory


def _answer(line: _Line, place: Place, prints: bool) -> None:
    """Says how far the main thread has come, and where it is."""
    pulse = place.pulse
    steps, turns, exchanges = pulse.steps, pulse.turns, pulse.exchanges
    if prints:
        where = f"is in step {steps}, at exchange {exchanges} of turn {turns} with the others:"
        with suppress(OSError):  # nobody reads it
            print(f"octavo: rank {place.rank} of {place.size} {where}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
    line.send(("pong", steps, turns, exchanges))


def _load(config: EngineConfig, line: _Line, make_core: MakeCore, place: Place) -> Core | None:
    def progress(stage: str, fraction: float) -> None:
        if not place.rank:  # ranks load side by side, and one bar shows it
            line.send(("progress", stage, fraction))

    try:
        core = make_core(config, progress, place)
        place.wait_for_all()
    except (ConnectionError, EOFError):
        raise
    except Exception as error:
        if place.size > 1 and not isinstance(error, OctavoError):
            time.sleep(ALONE_SECONDS)
        _report(error, line, "failed", _sentence(error))
        return None
    if not place.rank:
        line.send(("ready", core.info))
    return core


def _follow(core: Core, place: Place) -> None:
    """The loop of ranks over 0: as `_serve`, with the messages that rank 0 hands on. Nobody reads their outputs."""
    while True:
        for message in place.share(NOTHING):
            if message[0] == "shutdown":
                return
            if message[0] in CONTROLS:
                _control(core, message, place)
            else:
                _handle(core, message)
        if core.has_work():
            _step(core, place)


def _serve(core: Core, inbox: SimpleQueue[Message], line: _Line, place: Place) -> None:
    while True:
        outputs: list[TokenOutput] = []
        for message in place.share(_drain(inbox) if core.has_work() else _wait(inbox)):
            if message[0] == "shutdown":
                return
            if message[0] in CONTROLS:
                line.send(("done", _control(core, message, place), core.info))
            else:
                outputs += _handle(core, message)
        stats = EngineStats()  # of an idle engine, so that no gauge stays at its last busy value
        if core.has_work():
            stepped, stats = _step(core, place)
            outputs += stepped
        line.send(("step", outputs, stats))


def _step(core: Core, place: Place) -> tuple[list[TokenOutput], EngineStats]:
    place.pulse.steps += 1
    return core.step()


def _wait(inbox: SimpleQueue[Message]) -> list[Message]:
    """Received messages, at least one. After IDLE_SECONDS without work the engine returns memory that its steps have freed:
    prompts of many lengths leave holes of many sizes, together as large as a small model."""
    try:
        first = inbox.get(timeout=IDLE_SECONDS)
    except Empty:
        release()
        first = inbox.get()
    return [first, *_drain(inbox)]


def _drain(inbox: SimpleQueue[Message]) -> list[Message]:
    messages: list[Message] = []
    try:
        while True:
            messages.append(inbox.get_nowait())
    except Empty:
        return messages


def _handle(core: Core, message: Message) -> list[TokenOutput]:
    """Handles a message. A request that the core refuses gets an error output and affects no other request."""
    if message[0] == "add":
        try:
            core.add(*message[1])
        except OctavoError as error:
            return [TokenOutput(request.request_id, [], "abort", error=str(error)) for request in message[1]]
    else:
        for request_id in message[1]:
            core.abort(request_id)
    return []


def _control(core: Core, message: Message, place: Place) -> str | None:
    """Reloads the engine's weights, or frees or restores them, once what was aborted has ended. An error, as a sentence."""
    while message[0] not in BESIDE_REQUESTS and core.has_work():
        _step(core, place)
    try:
        getattr(core, message[0])(*message[1:])
    except OctavoError as error:  # the same on every rank
        if message[0] == "wake" and place.size > 1:  # its memory is a rank's own: one that fails alone must end the others
            raise
        return str(error)
    return None


def _report(error: Exception, line: _Line, kind: str, sentence: str) -> None:
    """Tells the parent; prints the traceback first, unless the user can fix the error. An orphan's end is its parent's."""
    if line.lost:
        return
    if not isinstance(error, OctavoError) and shortage(error) is None:
        traceback.print_exc()
    with suppress(OSError):
        line.send((kind, sentence))


def _sentence(error: Exception) -> str:
    if isinstance(error, OctavoError):
        return str(error)
    if (sentence := shortage(error)) is not None:
        return sentence
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"
