"""Requests whose head has no end, with a real server process over the fake engine."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from cases import cases
from server.processes import Server

LINE = b"POST /v1/completions HTTP/1.1\r\n"
CHUNKED = LINE + b"Host: a\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"prompt": "a"}'
PIECE = 2**16
HEADS = {
    "header": (LINE + b"a: ", b"b" * PIECE),
    "name": (LINE, b"b" * PIECE),
    "headers": (LINE, b"a: b\r\n" * (PIECE // 6)),
    "path": (b"GET /", b"b" * PIECE),
    "blank lines": (b"", b"\r\n" * (PIECE // 2)),
    "trailers": (CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY), b"a: b\r\n" * (PIECE // 6)),
    "trailer": (CHUNKED + b"%x\r\n%b\r\n0\r\na: " % (len(BODY), BODY), b"b" * PIECE),
    "chunk extension": (CHUNKED + b"1;a=", b"b" * PIECE),
    "chunks of a byte": (CHUNKED, b"1;abcd\r\n \r\n" * (PIECE // 11)),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(fake=True)
    yield server
    server.stop()


def sent_until_closed(server: Server, start: bytes, piece: bytes, most: int) -> tuple[int, bytes]:
    """How many pieces the server takes, and what it answers if that is not lost to the reset of the connection."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(10)
        count = 0
        try:
            connection.sendall(start)
            while count < most:
                connection.sendall(piece)
                count += 1
        except OSError:
            pass
        try:
            return count, connection.recv(10_000)
        except OSError:
            return count, b""


@cases("name", HEADS)
def test_a_head_without_end(server: Server, name: str) -> None:
    """100 pieces are refused long before the end: what the two sockets hold may be some megabytes."""
    count, told = sent_until_closed(server, *HEADS[name], most=1600)
    assert count < 400
    assert not told or told.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
    assert server.get("/health")[0] == 200


def ask(server: Server, head: bytes, body: bytes = b"") -> tuple[bytes, bytes]:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(10)
        connection.sendall(head + body)
        found = b""
        while b"\r\n\r\n" not in found or (not found.partition(b"\r\n\r\n")[2]):
            part = connection.recv(65536)
            assert part, found
            found += part
    return found.partition(b"\r\n\r\n")[::2]


def test_a_long_head_is_told_so(server: Server) -> None:
    head, body = ask(server, LINE + b"a: " + b"b" * 70_000)
    assert head.startswith(b"HTTP/1.1 431 ")
    told = json.loads(body)["error"]["message"]
    assert told == "The request's head is over 64 KiB; send less in its line and headers."


def test_heads_and_bodies_within_the_bounds(server: Server) -> None:
    head = LINE + b"Host: a\r\nX-Long: " + b"b" * 50_000 + b"\r\nContent-Length: %d\r\n\r\n"
    body = json.dumps({"prompt": "a", "user": "b" * 2**20, "max_tokens": 1}).encode()
    assert ask(server, head % len(body), body)[0].startswith(b"HTTP/1.1 200 ")
    for size in (1, 40, 10_000):
        sent = body[: 100_000 * size] if size > 1 else json.dumps({"prompt": "a", "user": "b" * 9000, "max_tokens": 1}).encode()
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part := sent[i : i + size]), part) for i in range(0, len(sent), size))
        assert ask(server, CHUNKED, chunks + b"0\r\n\r\n")[0].startswith(b"HTTP/1.1 200 "), size


def test_requests_that_follow_each_other_at_once(server: Server) -> None:
    """Each has a bound of its own, though they come in one piece."""
    body = json.dumps({"prompt": "a", "user": "b" * 40_000, "max_tokens": 1}).encode()
    one = LINE + b"Host: a\r\nX-Long: " + b"b" * 20_000 + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(10)
        connection.sendall(one * 5)
        found = b""
        while found.count(b"HTTP/1.1 200 ") < 5:
            part = connection.recv(65536)
            assert part, found
            found += part
