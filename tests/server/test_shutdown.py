"""Signals, with a real server process over the fake engine."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from server.processes import Server

MakeServer = Callable[..., Server]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeServer]:
    servers = []

    def make(*flags: str, delay: float = 0.0, load: float = 0.0, ready: bool = True) -> Server:
        monkeypatch.setenv("FAKE_DELAY", str(delay))
        monkeypatch.setenv("FAKE_LOAD", str(load))
        servers.append(Server(*flags, fake=True, ready=ready))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@contextmanager
def post(server: Server, **body: Any) -> Iterator[http.client.HTTPResponse]:
    """The response to a completion request of 60 words."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 100, **body}))
        with connection.getresponse() as response:
            yield response


def test_sigterm_lets_a_stream_finish_and_refuses_new_ones(serve: MakeServer) -> None:
    server = serve(delay=0.02)
    with post(server, stream=True) as stream:
        assert stream.readline().startswith(b"data: ")
        server.signal()
        server.wait_for("finishing 1 running")
        assert server.get("/health")[0] == 503
        with post(server) as refused:
            assert refused.status == 503
            assert json.loads(refused.read())["error"]["code"] == "shutting_down"
        *events, done, _ = stream.read().split(b"\n\n")
        choices = [json.loads(event.strip().removeprefix(b"data: "))["choices"] for event in events]  # an error has none
        assert (choices[-1][0]["finish_reason"], done) == ("stop", b"data: [DONE]")
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
    server = serve("--shutdown-timeout", "0.3", delay=0.2)
    with post(server, stream=True) as stream:
        server.signal()
        assert server.end(8) == 0  # the whole stream would take 12 s
        _ends_with_an_error(stream.read())


def _ends_with_an_error(stream: bytes) -> None:
    *_, last, done, end = stream.split(b"\n\n")
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "shutting_down"
    assert "could not wait" in error["message"]
    assert (done, end) == (b"data: [DONE]", b"")


def test_the_timeout_ends_a_whole_answer_with_a_status(serve: MakeServer) -> None:
    server = serve("--shutdown-timeout", "0.3", delay=0.2)
    threading.Timer(0.5, server.signal).start()
    with post(server) as answer:
        assert answer.status == 503
        assert json.loads(answer.read())["error"]["code"] == "shutting_down"
    assert server.end(8) == 0


def test_a_second_signal_ends_at_once(serve: MakeServer) -> None:
    server = serve(delay=0.2)
    with post(server, stream=True) as stream:
        server.signal(signal.SIGINT)
        server.wait_for("finishing 1 running")
        server.signal(signal.SIGINT)
        assert server.end(5) == 0
        _ends_with_an_error(stream.read())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_loading(serve: MakeServer, number: signal.Signals, code: int) -> None:
    server = serve(load=60, ready=False)
    server.wait_for("octavo: loading")
    server.signal(number)
    assert server.end(10) == code
    assert server.log[-1] == "octavo: stopped while loading.\n"


def test_a_dead_engine_ends_the_server_with_an_exit_code_to_act_on(serve: MakeServer) -> None:
    server = serve(delay=0.02)
    with post(server, stream=True) as stream:
        assert stream.readline().startswith(b"data: ")
        server.signal(signal.SIGUSR1)  # this kills the fake engine
        assert server.end(5) == 1
    assert server.log[-1] == "octavo: The fake engine died. The server ends with exit code 1; start it again.\n"


class Unread(Server):
    """One whose output nobody reads behind the line that has `last`: of `octavo serve | tee log`, a Ctrl-C ends tee first."""

    last = "Octavo is ready"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in iter(self.process.stdout.readline, ""):
            self.log.append(line)
            if self.last in line:
                break
        self.process.stdout.close()


@pytest.mark.parametrize("how", ["a signal", "two signals", "the engine's death"])
def test_a_server_whose_output_nobody_reads_ends_as_any_other(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DELAY", "0.02" if how == "a signal" else "0.2")
    server = Unread("--enable-log-requests", fake=True)
    try:
        server._reader.join()
        for _ in range(2):  # each has a line of the log
            with post(server, max_tokens=1) as response:
                assert response.status == 200
        if how == "the engine's death":
            server.signal(signal.SIGUSR1)
            assert server.end() == 1
            return
        with post(server, stream=True) as stream:
            assert stream.readline().startswith(b"data: ")
            server.signal(signal.SIGINT)
            if how == "two signals":
                time.sleep(0.2)
                server.signal(signal.SIGINT)
            rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert (b'"error"' in rest) == (how == "two signals")
        assert server.end() == 0
    finally:
        server.stop()


def test_a_start_whose_output_nobody_reads_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unread, "last", "loading")
    monkeypatch.setenv("FAKE_LOAD", "0.5")
    server = Unread(fake=True, ready=False)
    try:
        server._reader.join()
        assert server.get("/health")[0] == 200  # the port is taken first, so this waits
        server.signal()
        assert server.end() == 0
    finally:
        server.stop()


def test_a_second_server_on_a_port_is_refused_while_the_first_is_loading(serve: MakeServer) -> None:
    first = serve(load=60, ready=False)
    first.wait_for("octavo: loading")
    for host in ("127.0.0.1", "0.0.0.0"):
        second = serve("--host", host, "--port", str(first.port), ready=False)
        assert second.end() == 1
        assert second.log == [f"octavo: Port {first.port} is in use; stop what uses it, or choose another with --port.\n"]
    assert first.process.poll() is None


def test_two_servers_that_start_together_are_one(serve: MakeServer) -> None:
    first = serve(load=1, ready=False)
    second = serve("--port", str(first.port), load=1, ready=False)
    deadline = time.monotonic() + 20
    while (ended := [s for s in (first, second) if s.process.poll() is not None]) == [] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(ended) == 1
    assert ended[0].end() == 1
    (other,) = {first, second} - {*ended}
    other.wait_for("Octavo is ready")


def test_an_open_server_says_so(serve: MakeServer) -> None:
    sentence = "octavo: no API key is asked for, and 0.0.0.0 can be reached from other machines; "
    for flags, said in (
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "secret"], False),
        (["--host", "127.0.0.1"], False),
    ):
        server = serve(*flags, load=60, ready=False)
        server.wait_for("octavo: loading")
        assert any(line.startswith(sentence) for line in server.log) == said
        server.stop()


@pytest.mark.parametrize("flags", [[""], [" "], ["good", ""], None], ids=str)
def test_an_empty_key_is_refused(serve: MakeServer, monkeypatch: pytest.MonkeyPatch, flags: list[str] | None) -> None:
    if flags is None:
        monkeypatch.setenv("VLLM_API_KEY", "")
    server = serve(*(["--api-key", *flags] if flags else []), ready=False)
    told = "VLLM_API_KEY is empty, which would leave the server open; give it a key, or unset it."
    assert server.end() == 1
    assert server.log == [f"octavo: {'--api-key is empty; give it a value, or leave it out.' if flags else told}\n"]


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
