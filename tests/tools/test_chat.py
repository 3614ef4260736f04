"""`octavo chat` fed by a pipe, at servers that are none, or that end in the middle."""

from __future__ import annotations

import io
import json
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from cases import cases

from octavo.cli import main

CERTIFICATES = Path(__file__).parents[1] / "data/tls"
TOLD = b'data: {"choices":[{"index":0,"delta":{"content":"h\xc3\xa9"}}]}\n\n'


class Handler(BaseHTTPRequestHandler):
    models: ClassVar[bytes] = b'{"data": [{"id": "m"}]}'
    answer: ClassVar[bytes] = TOLD + b": a comment\n\ndata: [DONE]\n\n"
    asked: ClassVar[list[dict[str, object]]] = []
    keys: ClassVar[set[str | None]] = set()

    def do_GET(self) -> None:
        self.send(self.models)

    def do_POST(self) -> None:
        self.keys.add(self.headers["Authorization"])
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send(self.answer)

    def send(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(Handler, "keys", set())
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_pipe_holds_one_prompt(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(monkeypatch, "Grüße\nan alle\n".encode())
    assert main(["chat", url]) == 0
    assert Handler.asked[0]["messages"] == [{"role": "user", "content": "Grüße\nan alle"}]
    assert capsys.readouterr().out == "hé\n"


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", "Grüße".encode("latin-1")])
def test_bytes_that_are_no_text(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    pipe(monkeypatch, data)
    assert main(["chat", url]) == 1
    assert "no UTF-8" in capsys.readouterr().err


def test_words_at_the_prompt(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A path is for the model, and so is a sentence that begins as a command does."""
    said = iter(["one", "/help", "two", "/clear", "/nope", "/etc/hosts", "/clear me up", " /quit ", "three"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["chat", url.replace("http://127.0.0.1", "localhost"), "--system", "Be brief."]) == 0
    asked = [[m["content"] for m in body["messages"] if m["role"] != "assistant"] for body in Handler.asked]  # type: ignore[attr-defined]
    first = "Be brief."
    assert asked == [[first, "one"], [first, "one", "two"], [first, "/etc/hosts"], [first, "/etc/hosts", "/clear me up"]]
    out = capsys.readouterr().out
    assert out.count("/quit or Ctrl-D leaves") == 2
    assert "/nope is not known." in out
    assert next(said) == "three"


def test_no_standard_input(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", url]) == 0
    assert not Handler.asked


def test_a_scheme_in_capitals(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"hi")
    assert main(["chat", url.replace("http", "HTTP")]) == 0
    assert len(Handler.asked) == 1


@cases("key", ["a\r\nHost: b", "a\nb", "sch\u00f6n", "\u2026", "a\x7f", "a\udc80"])
def test_a_key_that_no_header_holds(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """It is not printed: whoever sees the terminal need not see it."""
    for words in (["chat", url], ["bench", "serve", "--base-url", url]):
        for flags, variable in ((["--api-key", key], "fine"), ([], key)):
            monkeypatch.setenv("OPENAI_API_KEY", variable)
            pipe(monkeypatch, b"hi")
            assert main([*words, *flags]) == 1
            told = capsys.readouterr().err
            assert "a header holds printable ASCII alone; look at --api-key or $OPENAI_API_KEY." in told
            assert told.count("\n") == 1
            assert key not in told


def test_white_space_around_a_key_is_no_part_of_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"hi")
    assert main(["chat", url, "--api-key", " secret\n"]) == 0
    assert Handler.keys == {"Bearer secret"}


@cases("models", [b"<html>", b"", b"[]", b'{"data": []}', b'{"data": 5}', b"\xff"])
def test_no_server_of_this_api(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: bytes
) -> None:
    monkeypatch.setattr(Handler, "models", models)
    pipe(monkeypatch, b"hi")
    assert main(["chat", url]) == 1
    assert "is no server of OpenAI's API" in capsys.readouterr().err


@pytest.fixture
def tls(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATES / "cert.pem", CERTIFICATES / "key.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_http_where_https_is_and_the_other_way(
    url: str, tls: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = url.removeprefix("http://")
    told = {
        f"https://{plain}/v1": f"The server at {plain} speaks HTTP, without TLS; use http://{plain}.",
        f"http://127.0.0.1:{tls}": f"The server at 127.0.0.1:{tls} speaks HTTPS; use https://127.0.0.1:{tls}.",
        f"https://127.0.0.1:{tls}": f"The certificate of the server at https://127.0.0.1:{tls} is not trusted (self-sig",
    }
    for address, sentence in told.items():
        for words in (["chat", address], ["bench", "serve", "--base-url", address]):
            pipe(monkeypatch, b"hi")
            assert main(words) == 1
            assert capsys.readouterr().err.startswith(f"octavo: {sentence}")


def test_what_speaks_neither(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It reads what it is sent, and says something else."""

    class Smtp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"220 hello\r\n")
            self.request.recv(1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Smtp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        for scheme, sentence in (
            ("http", "No server answers at"),
            ("https", f"The server at https://127.0.0.1:{port} and this"),
        ):
            pipe(monkeypatch, b"hi")
            assert main(["chat", f"{scheme}://127.0.0.1:{port}"]) == 1
            assert capsys.readouterr().err.startswith(f"octavo: {sentence}")
        server.shutdown()


def test_a_server_that_says_that_it_speaks_https(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As nginx's and Go's do, by an answer to plain HTTP."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATES / "cert.pem", CERTIFICATES / "key.pem")

    class Either(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(1, socket.MSG_PEEK) == b"\x16":
                context.wrap_socket(self.request, server_side=True).close()
            else:
                self.request.recv(1 << 16)
                self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\nTLS!")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Either) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        pipe(monkeypatch, b"hi")
        assert main(["chat", f"http://{address}"]) == 1
        assert capsys.readouterr().err == f"octavo: The server at {address} speaks HTTPS; use https://{address}.\n"
        server.shutdown()


@pytest.mark.parametrize("wrong", ["http://[::1", "http://127.0.0.1:port", "http://"])
def test_no_url(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    pipe(monkeypatch, b"hi")
    assert main(["chat", wrong]) == 1
    assert capsys.readouterr().err.startswith("octavo: ")


@pytest.mark.parametrize("answer", [TOLD, TOLD + b'data: {"choi', TOLD + b"data: <html>\n"])
def test_an_answer_that_breaks_off(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: bytes
) -> None:
    monkeypatch.setattr(Handler, "answer", answer)
    pipe(monkeypatch, b"hi")
    assert main(["chat", url]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("hé")
    assert "broke off" in told.err
