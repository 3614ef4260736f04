"""A host that computes for an engine whose API process is on another one: `octavo serve --node-rank 1`, or an actor of Ray.

It comes to that one (`octavo.frontend.nodes.Nodes`), says what it has, starts its ranks, and ends with the engine.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.files import check_directory
from octavo.frontend.engine_processes import EngineProcesses
from octavo.frontend.loading_bar import say
from octavo.frontend.model_files import with_files
from octavo.frontend.node_facts import facts
from octavo.frontend.node_line import NodeLine, write_line
from octavo.frontend.nodes import STOPPED, TOGETHER_SECONDS, accepted, greeted, listen, shown
from octavo.frontend.seat import Seat, connection_of, interface_of

if TYPE_CHECKING:
    from octavo.engine.worker import MakeCore

__all__ = ["Head", "run_node"]

RETRY_SECONDS = 0.5
CONNECT_SECONDS = 5.0
SAID = 2.0  # seconds to wait before it is said that node 0 is not there yet
Event = tuple[str, Any]


@dataclass
class Head:
    """Where host 0, or the API process, is. `reach` connects to it; each connection says first what it is."""

    address: str
    port: int
    node: int
    seconds: int
    stage: bool = False  # whether this host is an actor of Ray's, and the API process a command without ranks
    _began: float = field(default_factory=time.monotonic)

    @property
    def who(self) -> str:
        return f"{'Stage' if self.stage else 'Node'} {self.node} ({socket.gethostname()})"

    @property
    def other(self) -> str:
        return "the API process" if self.stage else "node 0"

    def lost(self, why: str) -> str:
        """A sentence. why: of NodeLine's."""
        return f"{self.other[0].upper()}{self.other[1:]} {why}"

    def reach(self, hello: dict[str, Any], at: tuple[str, int] | None = None) -> socket.socket:
        """Raises OctavoError where it cannot be reached in time. at: another address in its place."""
        address, told = at or (self.address, self.port), False
        while True:
            try:
                connected = socket.create_connection(address, CONNECT_SECONDS)
                write_line(connected, hello)
                return connected
            except OSError as error:
                waited, why = time.monotonic() - self._began, error.strerror or str(error)
            if waited > self.seconds:
                raise OctavoError(
                    f"{self.who} cannot reach {self.other} at {shown(*address)} ({why}; tried for {waited:.0f} s); is it "
                    "started there, and does a firewall let the port through?"
                )
            if waited > SAID and not told:
                say(f"octavo: {self.who} waits for {self.other} at {shown(*address)} ({why}).")
                told = True
            time.sleep(RETRY_SECONDS)


def run_node(config: EngineConfig, make_core: MakeCore | None = None, *, signals: bool = True, api: bool = False) -> int:
    """Runs this host's ranks until the engine ends. The exit code: 0 where it ended as it was asked to, or by a signal; 130
    where Ctrl-C came before its ranks were started.

    api: host 0 is one of Ray's, so that the API process is on another. Raises OctavoError where host 0 is not found.
    """
    head = Head(config.master_addr, config.master_port, config.node_rank, config.distributed_timeout_seconds, api)
    signalled = _Signals()
    for number in (signal.SIGINT, signal.SIGTERM) if signals else ():
        signal.signal(number, signalled.come)
    try:
        return _run_as(head, config, make_core, signalled, api)
    except _Stopped as stopped:
        say("octavo: stopped while loading.")
        return 130 if stopped.number == signal.SIGINT else 0


class _Stopped(BaseException):
    """A signal came before this host's ranks were started. It ends whatever the main thread waits for."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class _Signals:
    """What SIGINT and SIGTERM do: while `raising` the first raises _Stopped, later ones are events."""

    def __init__(self) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.raising = True

    def come(self, number: int, _: object) -> None:
        if not self.raising:
            self.events.put(("stopped", None))
            return
        self.raising = False
        raise _Stopped(number)


def _run_as(head: Head, config: EngineConfig, make_core: MakeCore | None, signalled: _Signals, api: bool) -> int:
    events = signalled.events
    connected = head.reach({"node": config.node_rank, "name": socket.gethostname()})
    local = connected.getsockname()[0]
    line = NodeLine(connected, lambda message, why: events.put(("lost", why) if message is None else ("told", message)))
    line.begin()
    ended = threading.Event()
    processes: EngineProcesses | None = None
    try:
        try:
            config = with_files(config)
            check_directory(Path(config.model))
            listener = listen(local, 0) if api and not config.node_rank else None
            found = None if listener is None else greeted(listener, ended)
            line.send({"facts": facts(config), "links": None if listener is None else list(listener.getsockname())})
            seat = _seat(config, head, local, _begin(events, head, line), found, ended, api)
            processes = EngineProcesses(config, make_core, seat=seat)
        except OctavoError as error:
            line.send({"dead": str(error)})
            raise
        except _Stopped:
            line.send({"stopped": True})
            raise
        signalled.raising = False
        say(f"octavo: {head.who} computes for {head.other} at {shown(head.address, head.port)}.")
        return _run(processes, events, line, head)
    except _Ended as end:
        return _said(head, str(end), events)
    finally:
        signalled.raising = False
        ended.set()
        if processes is not None:
            processes.kill()
        line.close()


class _Ended(Exception):
    """Host 0 said that the engine ends, and why; empty where nothing is wrong."""


def _begin(events: SimpleQueue[Event], head: Head, line: NodeLine) -> dict[str, Any]:
    """Waits until all hosts have come."""
    while True:
        kind, what = events.get()
        if kind == "lost":
            other = f"; something other than Octavo may answer at {shown(head.address, head.port)}"
            raise _Ended(head.lost(f"{what}{'' if line.heard else other}."))
        if "end" in what:
            raise _Ended(what["end"])
        if "begin" in what:
            return dict(what)


def _seat(
    config: EngineConfig,
    head: Head,
    local: str,
    begin: dict[str, Any],
    found: Any,
    ended: threading.Event,
    api: bool,
) -> Seat:
    """This host's ranks, connected to those of others."""
    node, each = config.node_rank, config.num_ranks // config.nnodes
    key, at = begin["begin"], begin["links"]
    address = local if api and not node else at[0] if at else head.address
    how: dict[str, Any] = {}
    if node:
        link = head.reach({"link": node, "key": key}, tuple(at) if at else None)
        how["source"] = connection_of(link)
    else:
        how["api"] = connection_of(head.reach({"link": 0, "key": key}))
        how["links"] = [connection_of(one) for one in accepted(found, key, range(1, config.nnodes), ended)]
    return Seat(node * each, each, config.num_ranks, address=address, interface=interface_of(local), **how)


def _run(processes: EngineProcesses, events: SimpleQueue[Event], line: NodeLine, head: Head) -> int:
    """Waits for the end."""
    for n in range(len(processes.connections)):
        threading.Thread(target=_read, args=(processes, n, events), name="octavo-read", daemon=True).start()
    if not processes.connections:  # of rank 0 alone, which talks to the API process
        threading.Thread(target=lambda: _tell(processes, processes.how_it_ended(None), events), daemon=True).start()
    while True:
        kind, what = events.get()
        if kind == "told" and "ask" in what:
            threading.Thread(target=_ask, args=(processes, what["ask"], line), daemon=True).start()
        elif kind == "told" and "end" in what:
            if not what["end"]:
                processes.wait()
            return _said(head, what["end"], events)
        elif kind == "lost":
            return _said(head, head.lost(f"{what}."), events)
        elif kind == "stopped":
            line.send({"stopped": True})
            return 0
        elif kind == "ended":
            line.send({"dead": what})
            return _answered(events, what, head)


def _answered(events: SimpleQueue[Event], sentence: str, head: Head) -> int:
    """After this host's ranks have ended: what host 0 says, which may have asked them to."""
    while True:
        kind, what = events.get()
        if kind == "stopped":
            return 0
        if kind == "lost":
            return _said(head, sentence, events)
        if kind == "told" and "end" in what:
            return _said(head, what["end"], events)


def _said(head: Head, sentence: str, events: SimpleQueue[Event]) -> int:
    if sentence.endswith(STOPPED) and _stopped_too(events):
        return 0
    if sentence:
        say(f"octavo: {head.who} ends: {sentence}")
    return int(bool(sentence))


def _stopped_too(events: SimpleQueue[Event]) -> bool:
    """Whether this host gets a signal as well as the one that ended the engine: someone stops all of them."""
    deadline = time.monotonic() + TOGETHER_SECONDS
    with contextlib.suppress(Empty):
        while events.get(timeout=max(0.0, deadline - time.monotonic()))[0] != "stopped":
            pass
        return True
    return False


def _read(processes: EngineProcesses, n: int, events: SimpleQueue[Event]) -> None:
    try:
        while (message := processes.receive(n))[0] == "pong":
            pass
        events.put(("ended", message[1]))
    except (EOFError, OSError):
        _tell(processes, processes.how_it_ended(), events)


def _tell(processes: EngineProcesses, sentence: str, events: SimpleQueue[Event]) -> None:
    """A rank has ended; where it was asked to, host 0 knows."""
    if not processes.ended_well:
        events.put(("ended", sentence))


def _ask(processes: EngineProcesses, prints: bool, line: NodeLine) -> None:
    with contextlib.suppress(OSError):
        line.send({"pulses": {str(rank): list(pulse) for rank, pulse in processes.ask(prints).items()}})
