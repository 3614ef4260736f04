"""Clients that do not send, or do not read, with a real server process over the fake engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from server.processes import Server

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_WORDS", "3000")
        server = Server("--client-timeout", "1", fake=True)
    yield server
    server.stop()


def connect(server: Server) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(10)
    return connection


def ends(connection: socket.socket) -> tuple[bytes, float]:
    """What comes until the server closes the connection, and after how many seconds it does."""
    started, found = time.monotonic(), b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found, time.monotonic() - started


@pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", HEAD[:-2] % 100], ids=["nothing", "a line", "a head without end"])
def test_a_head_that_never_comes_whole(server: Server, sent: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        found, seconds = ends(connection)
    assert found == b""
    assert 0.5 < seconds < 4


def test_a_head_in_small_pieces(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /")
        connection.settimeout(0.1)
        for _ in range(40):
            try:
                assert connection.recv(100) == b"", "closed without an answer, for the request is not known yet"
                break
            except TimeoutError:
                connection.sendall(b"a")
            except ConnectionResetError:
                break
        else:
            pytest.fail("a head in small pieces is awaited for ever")


@pytest.mark.parametrize("pieces", [0, 100])
def test_a_body_that_never_comes_whole(server: Server, pieces: int) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD % 1000 + b'{"prompt": ')
        for _ in range(pieces):
            try:
                connection.sendall(b" ")
            except OSError:
                break
            time.sleep(0.02)
        found, _ = ends(connection)
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["message"].startswith("The request's body did not come whole in time; ")


def test_a_stream_that_is_never_read(server: Server) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 900, "n": 128, "stream": True}).encode()
    aborted = 'finished_reason="abort"'
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD % len(body) + body)
        deadline = time.monotonic() + 20
        while not any(aborted in line and not line.endswith(" 0.0") for line in server.get("/metrics")[1].splitlines()):
            assert time.monotonic() < deadline, "nobody reads, and the server still waits"
            time.sleep(0.1)


def test_slow_steps_and_pauses_between_requests_are_no_fault(server: Server) -> None:
    with connect(server) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.6)


def test_a_stream_may_take_longer_than_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DELAY", "0.05")
    server = Server("--client-timeout", "0.5", fake=True)
    try:
        body = json.dumps({"prompt": "a", "max_tokens": 60, "stream": True}).encode()
        with connect(server) as connection:
            connection.sendall(HEAD % len(body) + body)
            found = b""
            while not found.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                part = connection.recv(65536)
                assert part, found
                found += part
    finally:
        server.stop()
