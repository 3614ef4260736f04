"""The hosts of one engine, as the one with the API process sees them: they come, say what they have, and are watched.

Every other host runs `octavo.frontend.node.run_node`. It connects to this one, its control line (`NodeLine`), and once all have
come its first rank's process gets a second connection, to rank 0, over which messages go on (`octavo.engine.place.Place`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from queue import Empty, SimpleQueue
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.loading_bar import say
from octavo.frontend.node_facts import are_facts, difference, facts
from octavo.frontend.node_line import NodeLine, read_line
from octavo.frontend.seat import Seat, connection_of, interface_of

__all__ = ["ANSWER_SECONDS", "STOPPED", "TOGETHER_SECONDS", "Nodes", "accepted", "greeted", "listen", "shown"]

POLL_SECONDS = 0.1
LINK_SECONDS = 30.0  # for which a host that has come may take to connect again
ANSWER_SECONDS = 15.0  # for which a host may take to ask its ranks how far they are
STOPPED = "was stopped by a signal."  # how the sentence ends that says why the engine does
TOGETHER_SECONDS = 1.0  # within which signals to several hosts count as one that stops all
Pulses = dict[int, tuple[int, int, int]]


class Nodes:
    """The other hosts, from `gather` to `end`.

    alarm: a pipe from which ("dead", sentence) comes when a host is lost or says that its ranks end. closing: called at the
    end. here: whether this host has ranks, too, and is host 0; otherwise host 0 is one of the others.
    """

    def __init__(
        self, config: EngineConfig, *, address: str = "", here: bool = True, closing: Callable[[], None] | None = None
    ):
        """Listens. Raises OctavoError where the address or port cannot be had. address: in place of --master-addr, any port."""
        self._config, self._here, self._closing = config, here, closing
        self._listener = listen(address or config.master_addr, 0 if address else config.master_port)
        self.address, self.port = self._listener.getsockname()[:2]
        self._key = secrets.token_hex(16)
        self._lines: dict[int, NodeLine] = {}
        self._names: dict[int, str] = {0: socket.gethostname()} if here else {}
        self._inbox: SimpleQueue[tuple[int, dict[str, Any] | None, str]] = SimpleQueue()
        self._pulses: Pulses = {}
        self._ended = threading.Event()
        self.alarm, self._ring = Pipe(duplex=False)
        self.seat: Seat | None = None

    def gather(self) -> None:
        """Waits until all hosts are there and ready. Raises OctavoError, which names one, where they do not fit together."""
        try:
            self._gather()
        except OctavoError as error:
            self.end(str(error))
            raise
        threading.Thread(target=self._watch, name="octavo-nodes", daemon=True).start()

    def _gather(self) -> None:
        config, own = self._config, facts(self._config)
        expected = set(range(int(self._here), config.nnodes))
        deadline = time.monotonic() + config.distributed_timeout_seconds
        found, ports = self._accepted(), dict[int, Any]()
        told, ready = False, set[int]()
        while ready < expected:
            if self._ended.is_set():
                raise OctavoError("The start was stopped.")
            if (missing := sorted(expected - self._lines.keys())) and time.monotonic() > deadline:
                raise OctavoError(self._absent(missing))
            if missing and not told and self._here:
                say(f"octavo: waiting at {shown(config.master_addr, self.port)} for {_listed(missing)}.")
                told = True
            with contextlib.suppress(Empty):
                self._meet(*found.get(timeout=POLL_SECONDS))
            with contextlib.suppress(Empty):
                node, message, why = self._inbox.get_nowait()
                if message is None or not message.keys().isdisjoint(("dead", "stopped")):
                    raise OctavoError(self._how_ended(node, message, why))
                if "facts" in message and not are_facts(message["facts"]):
                    self._leave_out(node)
                elif "facts" in message:
                    if (sentence := difference(self._who(node), message["facts"], own)) is not None:
                        raise OctavoError(sentence)
                    ready.add(node)
                    ports[node] = message.get("links")
        for node, line in self._lines.items():
            line.send({"begin": self._key, "links": ports[0] if not self._here and node else None})
        address = config.master_addr
        wanted = range(1, config.nnodes) if self._here else range(1)
        links = [connection_of(one) for one in accepted(found, self._key, wanted, self._ended)]
        if self._here:
            each = config.num_ranks // config.nnodes
            local = self._listener.getsockname()[0]
            self.seat = Seat(0, each, config.num_ranks, links, address=address, interface=interface_of(local))
        else:
            self.seat = Seat(0, 0, config.num_ranks, api=links[0])
        self._listener.close()

    def _accepted(self) -> SimpleQueue[tuple[socket.socket, dict[str, Any]]]:
        return greeted(self._listener, self._ended)

    def _meet(self, connected: socket.socket, hello: dict[str, Any]) -> None:
        """Takes a host that says who it is."""
        node, name = hello.get("node"), str(hello.get("name"))[:80]
        if type(node) is not int:  # which a bool is not
            with contextlib.suppress(OSError):
                say(f"octavo: what came from {connected.getpeername()[0]} is no node of this engine, and is ignored.")
            connected.close()
            return
        line = NodeLine(connected, lambda message, why: self._inbox.put((node, message, why)))
        nodes = self._config.nnodes
        first = int(self._here)
        refusal = None
        if not first <= node < nodes:
            refusal = f"{name} came as node {node}, and --nnodes {nodes} has nodes {first} to {nodes - 1}."
        elif node in self._lines:
            refusal = f"{name} came as node {node}, which {self._names[node]} is already; give each host its own --node-rank."
        if refusal is not None:
            line.send({"end": refusal})
            line.close()
            say(f"octavo: {refusal}")
            return
        self._lines[node], self._names[node] = line, name
        line.begin()

    def _leave_out(self, node: int) -> None:
        """Forgets one that came as a node and says what none would."""
        say(f"octavo: {self._who(node)} did not say what it has, as a node does, and is ignored.")
        self._lines.pop(node).close()
        del self._names[node]

    def _how_ended(self, node: int, message: dict[str, Any] | None, why: str) -> str:
        if message is None:
            return f"{self._who(node)} {why}."
        return f"{self._who(node)} {STOPPED}" if "stopped" in message else f"{self._who(node)}: {message.get('dead')}"

    def _absent(self, missing: Sequence[int]) -> str:
        seconds, where = self._config.distributed_timeout_seconds, shown(self._config.master_addr, self.port)
        return (
            f"{_listed(missing).capitalize()} did not come to {where} within {seconds} s; start octavo serve there with "
            f"--nnodes {self._config.nnodes} and its own --node-rank, and let the port through."
        )

    def _who(self, node: int) -> str:
        kind = "Node" if self._here else "Stage"  # one of Ray's
        return f"{kind} {node} ({self._names[node]})" if node in self._names else f"{kind} {node}"

    def report(self, node: int, sentence: str) -> None:
        """As if the host had said that it ends, and why."""
        self._inbox.put((node, {"dead": sentence}, ""))

    def _watch(self) -> None:
        """Runs in a thread: tells of the first host that ends."""
        while True:
            node, message, why = self._inbox.get()
            if message is not None and "pulses" in message:
                self._pulses |= {int(rank): tuple(pulse) for rank, pulse in message["pulses"].items()}
                continue
            sentence = self._how_ended(node, message, why)
            with contextlib.suppress(OSError):
                self._ring.send(("dead", sentence))
            self.end(sentence)
            return

    def ask(self, prints: bool) -> Pulses:
        """How far each rank of the other hosts that answers has come."""
        self._pulses = {}
        for line in self._lines.values():
            line.send({"ask": prints})
        ranks = self._config.num_ranks - (self.seat.count if self.seat and self._here else 1)
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(self._pulses) < ranks and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return dict(self._pulses)

    def end(self, sentence: str = "") -> None:
        """Lets every other host end its ranks: with an error where there is a sentence, else once they have ended."""
        if self._ended.is_set():
            return
        self._ended.set()
        for line in self._lines.values():
            line.send({"end": sentence})
            line.close()
        self._listener.close()
        if self._closing is not None:
            self._closing()


def listen(address: str, port: int) -> socket.socket:
    """A socket at which other hosts come. Raises OctavoError where there can be none."""
    try:
        families = {found[0] for found in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)}
        family = socket.AF_INET6 if families == {socket.AF_INET6} else socket.AF_INET
        found = socket.create_server((address, port), family=family, backlog=64)
    except OSError as error:  # whose own sentence repeats the address
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise OctavoError(
            f"Node 0 ({socket.gethostname()}) cannot listen at {shown(address, port)} ({why}); give an address "
            "of this host with --master-addr, and a free port with --master-port."
        ) from None
    found.settimeout(POLL_SECONDS)
    return found


def shown(address: str, port: int) -> str:
    """As a URL has them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def greeted(listener: socket.socket, ended: threading.Event) -> SimpleQueue[tuple[socket.socket, dict[str, Any]]]:
    """Where those that connect come with their first message, until the listener is closed or `ended` is set."""
    queue: SimpleQueue[tuple[socket.socket, dict[str, Any]]] = SimpleQueue()

    def read(connected: socket.socket) -> None:
        connected.settimeout(LINK_SECONDS)
        if (message := read_line(connected)) is None:
            connected.close()
        else:
            queue.put((connected, message))

    def accept() -> None:
        while not ended.is_set():
            try:
                connected, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            threading.Thread(target=read, args=(connected,), daemon=True).start()

    threading.Thread(target=accept, name="octavo-nodes-come", daemon=True).start()
    return queue


def accepted(
    found: SimpleQueue[tuple[socket.socket, dict[str, Any]]], key: str, nodes: Sequence[int], ended: threading.Event
) -> list[socket.socket]:
    """The second connections of these hosts, in this order. Raises OctavoError where one does not come."""
    links: dict[int, socket.socket] = {}
    deadline = time.monotonic() + LINK_SECONDS
    while missing := [node for node in nodes if node not in links]:
        if time.monotonic() > deadline or ended.is_set():
            raise OctavoError(
                f"{_listed(missing).capitalize()} came, and did not connect a second time; is a firewall between?"
            )
        with contextlib.suppress(Empty):
            connected, message = found.get(timeout=POLL_SECONDS)
            if message.get("key") == key:
                links[message["link"]] = connected
            else:
                connected.close()
    return [links[node] for node in nodes]


def _listed(nodes: Sequence[int]) -> str:
    return f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {', '.join(map(str, nodes))}"
