"""Signals, with a real server process over the fake engine."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from server.processes import Server

MakeServer = Callable[..., Server]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeServer]:
    servers = []

    def make(*flags: str, delay: float = 0.0, load: float = 0.0, ready: bool = True) -> Server:
        monkeypatch.setenv("FAKE_DELAY", str(delay))
        monkeypatch.setenv("FAKE_LOAD", str(load))
        servers.append(Server("model", *flags, fake=True, ready=ready))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            server.stop()


class Stream:
    """A streaming completion of 60 words, of which the first has come."""

    def __init__(self, server: Server) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port)
        self.connection.request("POST", "/v1/completions", json.dumps({"prompt": "a", "stream": True, "max_tokens": 100}))
        self.response = self.connection.getresponse()
        assert self.response.readline().startswith(b"data: ")

    def rest(self) -> bytes:
        with self.response:
            return self.response.read()


def test_sigterm_lets_a_stream_finish_and_refuses_new_ones(serve: MakeServer) -> None:
    server = serve(delay=0.02)
    stream = Stream(server)
    server.signal()
    server.wait_for("finishing 1 running")
    assert server.get("/health")[0] == 503
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", '{"prompt": "a"}')
    with connection.getresponse() as refused:
        assert refused.status == 503
        assert json.loads(refused.read())["error"]["code"] == "shutting_down"
    assert stream.rest().endswith(b"data: [DONE]\n\n")
    assert server.end() == 0


def test_an_idle_server_ends_at_once(serve: MakeServer) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        server = serve()
        with socket.create_connection(("127.0.0.1", server.port)):  # an open connection holds nothing up
            started = time.monotonic()
            server.signal(number)
            assert server.end() == 0
            assert time.monotonic() - started < 4


def test_the_timeout_ends_what_takes_too_long(serve: MakeServer) -> None:
    server = serve("--shutdown-timeout", "0.3", delay=5)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", '{"prompt": "a"}')
    time.sleep(0.3)
    server.signal()
    assert server.end(10) == 0
    connection.close()


def test_a_second_signal_ends_at_once(serve: MakeServer) -> None:
    server = serve(delay=0.2)
    stream = Stream(server)
    server.signal(signal.SIGINT)
    server.wait_for("finishing 1 running")
    server.signal(signal.SIGINT)
    assert server.end(5) == 0
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        stream.rest()


def test_a_signal_while_loading(serve: MakeServer) -> None:
    server = serve(load=60, ready=False)
    server.wait_for("octavo: loading")
    server.signal()
    assert server.end(10) == 0
    assert server.log[-1] == "octavo: stopped while loading.\n"


def test_unknown_variables_are_named_once(serve: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V1", "1")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "X")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = serve()
    lines = [line for line in server.log if "VLLM_" in line]
    assert len(lines) == 1
    assert "VLLM_ATTENTION_BACKEND, VLLM_USE_V1" in lines[0]
    assert server.get("/v1/models")[0] == 401  # the one variable that must not be ignored
    assert os.environ["VLLM_API_KEY"] not in "".join(server.log)
