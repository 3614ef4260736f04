"""How commands of one engine over several hosts end: exit codes, what is printed, and strangers at the master port."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from nodes.hosts import FLAGS, Node, ended, serve
from nodes.test_nodes import asked, fake, first_token
from server.processes import free_port

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.node_line import LONGEST, read_line
from octavo.frontend.nodes import Nodes, listen

READY = "Octavo is ready"
HOST = socket.gethostname()


@cases(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_a_host_that_waits_for_node_0(number: signal.Signals, code: int) -> None:
    other = fake(1, free_port())
    with ended(other):
        other.wait_for("waits for node 0")
        other.process.send_signal(number)
        assert other.end(5) == code, other.said
        assert other.log[-1] == "octavo: stopped while loading.\n"


def stop_other(head: Node, other: Node) -> None:
    other.process.terminate()


def stop_both(head: Node, other: Node) -> None:
    other.process.terminate()
    time.sleep(0.3)
    head.process.terminate()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def lose_head(head: Node, other: Node) -> None:
    head.process.kill()


@cases(
    ("end", "codes", "said"),
    [
        (stop_other, (1, 0), f"octavo: Node 1 ({HOST}) was stopped by a signal. The server ends with exit code 1"),
        (stop_both, (0, 0), ""),
        (lose_head, (-9, 1), ""),
    ],
)
def test_ends_are_sentences_and_codes_for_a_restart_policy(end: Any, codes: tuple[int, int], said: str) -> None:
    """A rank that is killed: test_nodes.py. Two hosts meet over IPv6, where this machine has it."""
    port, http = free_port(), free_port()
    address = "::1" if end is stop_both and has_ipv6() else "127.0.0.1"
    other, head = serve(1, address, port, "-tp", "2"), serve(0, address, port, "-tp", "2", http=http)
    with ended(head, other):
        head.wait_for(READY)
        assert f"node 0 at {f'[{address}]' if ':' in address else address}:{port}" in other.said
        with asked(http, list(range(5, 50)), 900, stream=True) as client:
            first_token(client)
            end(head, other)
            client.communicate(timeout=30)
        assert (head.end(), other.end()) == codes, head.said + other.said
    assert said in head.said
    for node in (head, other):
        assert "Traceback" not in node.said, node.said
        assert not said or "start it again" in head.said


@cases(
    ("messages", "said"),
    [
        ([{"node": None}], "what came from 127.0.0.1 is no node of this engine, and is ignored."),
        ([{"node": True}], "what came from 127.0.0.1 is no node of this engine, and is ignored."),
        ([{"node": 1, "name": "x"}, {"facts": 3}], "Node 1 (x) did not say what it has, as a node does, and is ignored."),
        ([{"node": 1, "name": "x"}, {"facts": {"flags": 3}}], "Node 1 (x) did not say what it has"),
    ],
)
def test_what_a_stranger_sends_is_ignored(messages: list[Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The node of that number may still come."""
    nodes = Nodes(EngineConfig(nnodes=2, master_port=free_port(), tensor_parallel_size=2, distributed_timeout_seconds=2))
    with socket.create_connection((nodes.address, nodes.port)) as stranger:
        stranger.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
        with pytest.raises(OctavoError, match=r"^Node 1 did not come to "):
            nodes.gather()
    assert f"octavo: {said}" in capsys.readouterr().err


@cases("piece", [1 << 20, 999, 1])
def test_a_first_message_is_read_in_linear_time_and_not_a_byte_more(piece: int) -> None:
    """However it comes: a megabyte of names of files, and what a node says behind it."""
    message = {"files": "x" * (LONGEST - 100 if piece > 1 else 2000)}
    one, other = socket.socketpair()

    def send() -> None:
        data = json.dumps(message).encode() + b"\n\nmore"
        for at in range(0, len(data), piece):
            one.sendall(data[at : at + piece])

    sending = threading.Thread(target=send)
    with one, other:
        sending.start()
        began = time.process_time()
        assert read_line(other) == message
        assert time.process_time() - began < 3  # it took 40
        sending.join()
        assert other.recv(10) == b"\nmore"
        one.sendall(b"x" * 10)
        one.shutdown(socket.SHUT_WR)
        assert read_line(other) is None


def test_a_stranger_at_the_master_port_is_suspected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer_as_http() -> None:
            connected, _ = server.accept()
            connected.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            time.sleep(1)
            connected.close()

        threading.Thread(target=answer_as_http, daemon=True).start()
        other = fake(1, port)
        with ended(other):
            assert other.end() == 1
    assert f"something other than Octavo may answer at 127.0.0.1:{port}." in other.said, other.said


def test_that_a_port_is_in_use_is_said_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OctavoError, match=rf"cannot listen at 127.0.0.1:{port} \(Address already in use\); give"):
            listen("127.0.0.1", port)


def test_ranks_of_a_command_that_is_killed_leave_no_files(tmp_path: Path) -> None:

    words = ["env", f"TMPDIR={tmp_path}", sys.executable, "-m", "octavo.cli", "serve", *FLAGS, "-pp", "2"]
    server = Node([*words, "--host", "127.0.0.1", "--port", str(free_port())])
    with ended(server):
        server.wait_for(READY)
        assert list(tmp_path.glob("octavo-*"))
        server.process.kill()
        server.end()
        deadline = time.monotonic() + 10
        while list(tmp_path.glob("octavo-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not list(tmp_path.glob("octavo-*"))
    assert "Traceback" not in server.said, server.said
