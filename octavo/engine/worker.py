"""The engine process: one loop that takes messages, steps, and sends back what each step brought."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Protocol

from octavo.config import EngineConfig
from octavo.errors import OctavoError, shortage
from octavo.host import release
from octavo.messages import EngineInfo, EngineRequest, EngineStats, Message, Progress, TokenOutput

__all__ = ["Core", "MakeCore", "engine_core", "run_engine"]

IDLE_SECONDS = 2.0  # without work, after which freed memory goes back to the system
ORPHAN_GRACE = 5.0  # seconds that a step or a load may take to end after the parent died


class Core(Protocol):
    """What this process needs of an EngineCore."""

    info: EngineInfo

    def add(self, *requests: EngineRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> tuple[list[TokenOutput], EngineStats]: ...


MakeCore = Callable[[EngineConfig, Progress], Core]


def engine_core(config: EngineConfig, progress: Progress) -> Core:
    """The real core. Imported here, for it brings torch."""
    imported = "octavo.engine.core" in sys.modules
    from octavo.engine.core import EngineCore

    if not imported:  # torch.fx leaves a frame that holds itself and all that called for it: what they made would stay
        gc.collect()
    return EngineCore(config, progress)


def run_engine(config: EngineConfig, connection: Connection, make_core: MakeCore | None = None) -> None:
    """The main function of the engine process. Ends when told to, when a step fails, or when the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and systemd reach the whole group; the parent decides what it means
        signal.signal(number, signal.SIG_IGN)
    inbox: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    try:
        core = _load(config, connection, make_core or engine_core)
        if core is None:
            sys.exit(1)
        gc.collect()
        gc.freeze()  # the model lives as long as the process; the collector need not walk it in the middle of a step
        _serve(core, inbox, connection)
    except BrokenPipeError:
        return  # the parent is gone; nobody is left to tell
    except Exception as error:
        _trace(error)
        connection.send(("dead", f"The engine stopped: {_sentence(error)}"))
        sys.exit(1)


def _receive(connection: Connection, inbox: SimpleQueue[Message]) -> None:
    """Runs in a thread, so that an idle engine sleeps in its inbox and a busy one never waits for the pipe."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(("shutdown",))
    time.sleep(ORPHAN_GRACE)
    os._exit(1)  # a step that never ends must not keep the accelerator's memory for nobody


def _load(config: EngineConfig, connection: Connection, make_core: MakeCore) -> Core | None:
    try:
        core = make_core(config, lambda stage, fraction: connection.send(("progress", stage, fraction)))
    except BrokenPipeError:
        raise
    except Exception as error:
        _trace(error)
        connection.send(("failed", _sentence(error)))
        return None
    connection.send(("ready", core.info))
    return core


def _serve(core: Core, inbox: SimpleQueue[Message], connection: Connection) -> None:
    while True:
        outputs: list[TokenOutput] = []
        for message in _drain(inbox) if core.has_work() else _wait(inbox):
            if message[0] == "shutdown":
                return
            outputs += _obey(core, message)
        stats = EngineStats()  # that of an idle engine, so that no gauge stays at its last busy value
        if core.has_work():
            stepped, stats = core.step()
            outputs += stepped
        connection.send(("step", outputs, stats))


def _wait(inbox: SimpleQueue[Message]) -> list[Message]:
    """What has come, at least one message. An engine that is idle for a while gives memory back that its steps have freed:
    prompts of many lengths leave holes of many sizes, in all as much as the rest of a small model."""
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


def _obey(core: Core, message: Message) -> list[TokenOutput]:
    """Does what a message asks. A request that the core refuses is answered; it harms no other."""
    if message[0] == "add":
        try:
            core.add(*message[1])
        except OctavoError as error:
            return [TokenOutput(request.request_id, [], "abort", error=str(error)) for request in message[1]]
    else:
        for request_id in message[1]:
            core.abort(request_id)
    return []


def _trace(error: Exception) -> None:
    """Prints where it happened, unless the user can mend it."""
    if not isinstance(error, OctavoError) and shortage(error) is None:
        traceback.print_exc()


def _sentence(error: Exception) -> str:
    if isinstance(error, OctavoError):
        return str(error)
    if (told := shortage(error)) is not None:
        return told
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"
