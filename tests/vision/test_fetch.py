"""Fetching: what may not be reached is never connected to, by any name, redirect or change of a name."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import InvalidRequest, OctavoError
from octavo.vision import FetchRules, ImagePart, fetch_parts, public_http
from octavo.vision.fetch import fetch
from octavo.vision.public_http import is_public

PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::1"
RULES = FetchRules(max_bytes=1 << 20, seconds=20)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nimage"


def moved(to: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


ANSWERS = {
    "/ok": OK,
    "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nim\r\n3\r\nage\r\n0\r\n\r\n",
    "/to-the-end": b"HTTP/1.0 200 OK\r\n\r\nimage",
    "/hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
    "/relative": moved("ok?a=b c#d", 308),
    "/absolute": moved("http://other.test/ok", 301),
    "/thrice": moved("/twice"), "/twice": moved("/relative", 307),
    "/four": moved("/thrice"), "/circle": moved("/circle"),
    "/to-loopback": moved("http://127.0.0.1:{port}/ok"), "/to-localhost": moved("http://localhost:{port}/ok"),
    "/to-private": moved("//private.test/ok"), "/to-metadata": moved("http://169.254.169.254/latest/meta-data"),
    "/to-file": moved("file:///etc/passwd"), "/to-data": moved("data:image/png;base64,AAAA"), "/to-nothing": moved("http://["),
    "/to-rebinding": moved("http://rebinding.test/ok"),
    "/short": OK[:-2], "/short-chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nim",
    "/garbage": b"\x00\x01 no HTTP at all\r\n\r\n", "/nothing": b"",
    "/missing": b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "/nowhere": b"HTTP/1.1 302 Found\r\n\r\n",
    "/gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nimage",
    "/large": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999999\r\n\r\n" + bytes(9),
    "/stated-large": b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n",
    "/streamed": b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2 << 20),
    "/crumbs": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 500_000,
    "/headers": b"HTTP/1.1 200 OK\r\n" + b"A: " + b"b" * 300_000 + b"\r\n\r\n",
}  # fmt: skip


class Internet:
    """Names, and a server on loopback that stands for every public address. It notes who is asked for what."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.names: dict[str, list[list[str]]] = {
            "pictures.test": [[PUBLIC]], "other.test": [[OTHER, PUBLIC]], "private.test": [["10.0.0.7"]],
            "loopback.test": [["127.0.0.1"]], "mixed.test": [[PUBLIC, "192.168.1.1"]], "six.test": [["fd00::1"]],
            "mapped.test": [["::ffff:127.0.0.1"]], "none.test": [[]], "down.test": [["8.8.4.4"]],
            "rebinding.test": [[PUBLIC], ["127.0.0.1"]], "xn--bcher-kva.test": [[PUBLIC]],
        }  # fmt: skip
        self.resolved, self.connected = list[str](), list[tuple[str, int]]()
        self.requests, self.tls = list[bytes](), list[tuple[Any, str]]()
        self.writers, self.port = list[asyncio.StreamWriter](), 0
        self._resolve, self._connect = socket.getaddrinfo, asyncio.open_connection
        patch.setattr(socket, "getaddrinfo", self.getaddrinfo)
        patch.setattr(asyncio, "open_connection", self.open_connection)

    def getaddrinfo(self, host: Any, port: Any, *args: Any, **given: Any) -> Any:
        if not str(host).endswith((".test", "unknown")):
            return self._resolve(host, port, *args, **given)
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses
        ]

    async def open_connection(self, host: str, port: int, *, ssl: Any = None, server_hostname: str | None = None) -> Any:
        self.connected.append((host, port))
        if host == "8.8.4.4" or host == OTHER:
            raise ConnectionRefusedError
        assert host == PUBLIC, f"a connection to {host}"
        if ssl is not None:
            assert server_hostname is not None
            self.tls.append((ssl, server_hostname))
        return await self._connect("127.0.0.1", self.port)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            request = await reader.readuntil(b"\r\n\r\n")
        except (EOFError, ConnectionError):  # whoever asked has been cancelled
            return writer.transport.abort()
        self.requests.append(request)
        path = request.split()[1].decode().partition("?")[0]
        try:
            if path in ("/silent", "/slow"):
                for byte in OK:
                    await asyncio.sleep(0.1)
                    writer.write(bytes([byte]) * (path == "/slow"))
            writer.write(ANSWERS.get(path, b"").replace(b"{port}", str(self.port).encode()))
            await writer.drain()
            if path != "/stated-large":
                writer.close()
            else:
                await asyncio.sleep(9)
        except (ConnectionError, asyncio.CancelledError):
            writer.transport.abort()

    def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def all_of_it() -> None:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            await work()
            await asyncio.sleep(0.1)  # a server that closes while it accepts forgets the connection
            server.close()
            for writer in self.writers:
                writer.transport.abort()
            await asyncio.sleep(0.1)

        asyncio.run(all_of_it())


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Internet:
    return Internet(monkeypatch)


async def refusal_of(url: str, rules: FetchRules) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await fetch(url, rules)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 300  # noqa: PT018
    return sentence


def test_which_addresses_are_public() -> None:
    public = ["8.8.8.8", PUBLIC, "1.1.1.1", "172.15.0.1", "2606:4700::1111", "2a00:1450:4001::200e"]
    public += ["192.88.98.255", "192.88.100.0", "2606:4700::400:5efe:a00:1", "2606:4700::5eff:a00:1"]
    others = [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254",
        "100.64.0.1",
        "192.0.0.1", "192.0.0.192", "168.63.129.16",
        "198.18.0.1", "192.0.2.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "fe80::1",
        "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1",
        "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "100::1",
        "2606:4700::1111%lo", "localhost", "", "8.8.8.8.8",
        "192.88.99.1", "192.88.99.255", "3fff::1", "3fff:fff:ffff::1",
        *(f"2606:4700::{bits}5efe:a00:1" for bits in ("", "200:", "100:", "300:")),  # ISATAP: 10.0.0.1
    ]  # fmt: skip
    assert [one for one in public if not is_public(one)] == []
    assert [one for one in others if is_public(one)] == []


def test_what_is_answered_is_read(internet: Internet) -> None:
    async def work() -> None:
        good = ("/ok", "/chunks", "/to-the-end", "/hints", "/relative", "/absolute", "/thrice", "/ok?q=ü \r\nX: y#part")
        for path in good:
            assert await fetch(f"http://pictures.test{path}", RULES) == b"image", path
        assert await fetch("HTTP://Bücher.test./ok", RULES) == b"image"
        assert await fetch("https://pictures.test:8443/ok", RULES) == b"image"
        parts = [ImagePart(f"http://pictures.test{path}", path) for path in good] * 4
        assert await fetch_parts(parts, RULES) == [b"image"] * len(parts)
        with pytest.raises(InvalidRequest, match="HTTP status 404") as caught:
            await fetch_parts([*parts, ImagePart("http://pictures.test/missing", "messages.0.content.9")], RULES)
        assert caught.value.param == "messages.0.content.9"

    internet.run(work)
    assert all(request.count(b"\r\n") == 7 for request in internet.requests), "a URL made a header"
    assert b"GET /ok?q=%C3%BC%20X:%20y HTTP/1.1\r\nHost: pictures.test\r\n" in b"".join(internet.requests)
    assert b"Host: xn--bcher-kva.test\r\n" in b"".join(internet.requests)
    assert b"Host: pictures.test:8443\r\n" in b"".join(internet.requests)
    ((context, name),) = internet.tls
    assert (context.check_hostname, context.verify_mode, name) == (True, 2, "pictures.test")
    assert (PUBLIC, 8443) in internet.connected
    assert internet.connected.index((OTHER, 80)) < len(internet.connected) - 1, (
        "an address that refuses is followed by the next"
    )


def test_what_is_not_public_is_never_connected_to(internet: Internet) -> None:
    async def work() -> None:
        hosts = ["private.test", "loopback.test", "mixed.test", "six.test", "mapped.test", "none.test", "localhost"]
        hosts += [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "0.0.0.0",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::]",
        ]
        for host in hosts:
            for scheme in ("http", "https"):
                told = await refusal_of(f"{scheme}://{host}:{internet.port}/ok", RULES)
                assert "no public address" in told or "cannot be found" in told, (host, told)
        assert "cannot be found" in await refusal_of("http://unknown/ok", RULES)
        assert internet.connected == []
        assert internet.requests == []
        for path in ("/to-loopback", "/to-localhost", "/to-private", "/to-metadata"):
            assert "no public address" in await refusal_of(f"http://pictures.test{path}", RULES)
        assert [request.split()[1][:4] for request in internet.requests] == [b"/to-"] * 4
        # The name's second answer is loopback: it is asked once, and what was checked is what is connected to.
        assert await fetch("http://rebinding.test/ok", RULES) == b"image"
        assert internet.resolved.count("rebinding.test") == 1
        assert internet.connected[-1] == (PUBLIC, 80)
        assert "no public address" in await refusal_of("http://pictures.test/to-rebinding", RULES)
        assert {host for host, _ in internet.connected} == {PUBLIC}

    internet.run(work)


def test_what_goes_wrong_is_one_sentence(internet: Internet) -> None:
    wrong = {
        "/four": "redirected more than 3 times", "/circle": "redirected more than 3 times", "/to-file": "not an http(s) URL",
        "/to-data": "not an http(s) URL", "/to-nothing": "not a valid URL", "/short": "only in part",
        "/short-chunks": "only in part", "/garbage": "not answered as HTTP", "/nothing": "only in part",
        "/missing": "HTTP status 404", "/nowhere": "HTTP status 302", "/gzip": "compressed", "/large": "not answered as HTTP",
        "/stated-large": "more than 1 MiB", "/streamed": "more than 1 MiB", "/crumbs": "more than 1 MiB",
        "/headers": "headers of more than 64 KiB",
    }  # fmt: skip
    urls = {
        "ftp://pictures.test/ok": "should begin with", "pictures.test/ok": "should begin with", "": "should begin with",
        "http:///ok": "not a valid URL", "http://[::1/ok": "not a valid URL",
        "http://pictures.test:99999/ok": "not a valid URL", "http://pictures.test:0/ok": "not a valid URL",
        "http://a b/ok": "not a valid URL", "http://" + "a" * 5000: "not a valid URL",
        "http://pictures.test/" + "ü" * 20_000: "has 20021 characters", "file:///" + "a" * 20_000: "has 20008 characters",
        "http://me:secret@pictures.test/": "password",
        "http://pictures.test\\@other.test/ok": "password", "http://down.test/ok": "cannot be reached",
    }  # fmt: skip

    async def work() -> None:
        for path, sentence in wrong.items():
            assert sentence in await refusal_of(f"http://pictures.test{path}", RULES), path
        for url, sentence in urls.items():
            assert sentence in await refusal_of(url, RULES), url
        for path in ("/silent", "/slow"):
            start = time.monotonic()
            assert "within 0.5 seconds" in await refusal_of(f"http://pictures.test{path}", FetchRules(seconds=0.5))
            assert time.monotonic() - start < 2
        few = FetchRules.of_options(None, ["Pictures.test"])
        assert await fetch("http://pictures.test/ok", few) == b"image"
        for url in ("http://other.test/ok", "http://pictures.test/absolute", "http://a.pictures.test/ok"):
            assert "--allowed-media-domains" in await refusal_of(url, few)
        for domains, good, bad in (
            (["BÜCHER.test"], ["http://bücher.test/ok", "http://xn--bcher-kva.test:81/ok"], ["http://pictures.test/ok"]),
            (["xn--bcher-kva.test."], ["http://Bücher.test./ok"], ["http://xn--bcher.test/ok"]),
            (
                ["pictures.test:8080"],
                ["http://pictures.test:8080/ok"],
                ["http://pictures.test/ok", "http://pictures.test:81/ok"],
            ),
            (["a.test", "pictures.test:443"], ["https://pictures.test/ok"], ["http://pictures.test/ok"]),
        ):
            rules = FetchRules.of_options(None, domains)
            for url in good:
                assert await fetch(url, rules) == b"image", (domains, url)
            for url in bad:
                assert "--allowed-media-domains" in await refusal_of(url, rules), (domains, url)
        for domains, url in (
            (["private.test", "127.0.0.1:80"], "http://private.test/ok"), (["127.0.0.1"], "http://127.0.0.1/ok"),
            (["[fd00:0::1]:80"], "http://[fd00::1]/ok"), (["fd00::1"], "http://[FD00:0:0::1]:81/ok"),
        ):  # fmt: skip
            told = await refusal_of(url, FetchRules.of_options(None, domains))
            assert "no public address" in told, "an allowed host must be public too"

    internet.run(work)


def test_a_lookup_that_stalls_holds_no_other_up(internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled, resolve = threading.Event(), socket.getaddrinfo

    def slow(host: Any, *args: Any, **given: Any) -> Any:
        if str(host).startswith("slow"):
            stalled.wait(20)
            return resolve("pictures.test", *args, **given)
        return resolve(host, *args, **given)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    rules, free = replace(RULES, lookup_seconds=1), public_http.MAX_LOOKUPS

    async def work() -> None:
        waiting = [asyncio.ensure_future(refusal_of(f"http://slow{i}.test/ok", rules)) for i in range(free - 1)]
        await asyncio.sleep(0)
        start = time.monotonic()
        for _ in range(3):
            assert await fetch("http://pictures.test/ok", rules) == b"image"
        assert time.monotonic() - start < 0.9
        last = asyncio.ensure_future(refusal_of("http://slow.test/ok", rules))
        await asyncio.sleep(0)
        assert "Too many hosts" in await refusal_of("http://pictures.test/ok", rules)
        for told in await asyncio.gather(last, *waiting):
            assert "was not found within 1 seconds" in told
        stalled.set()
        while any(thread.name == "lookup" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
        assert await fetch("http://slow.test/ok", rules) == b"image"  # all threads are free again

    try:
        internet.run(work)
    finally:
        stalled.set()


def test_data_urls_and_files(tmp_path: Path) -> None:
    root = tmp_path / "media"
    (root / "below").mkdir(parents=True)
    (root / "below" / "a b.png").write_bytes(b"image")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "c").write_bytes(b"secret")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to(root / "below" / "a b.png")
    (root / "circle").symlink_to(root / "circle")
    (root / "large").write_bytes(bytes((1 << 20) + 1))
    os.mkfifo(root / "pipe")
    rules = replace(FetchRules.of_options(str(root), None), max_bytes=1 << 20)
    encoded = base64.b64encode(b"image").decode()
    good = [
        f"data:image/png;base64,{encoded}", f"DATA:;BASE64,{encoded}",
        f"data:image/png;charset=x;base64,{encoded[:3]}\n {encoded[3:]}",
        f"data:image/png;base64,{encoded.replace('=', '%3D')}", f"file://{root}/below/a%20b.png", f"file://localhost{root}/in",
        f"file://{root}/below/../in",
    ]  # fmt: skip
    wrong = {
        "data:image/png,abcd": "base64", "data:": "base64", "data:image/png;base64,abc": "not valid base64",
        "data:image/png;base64,ab-_": "not valid base64", "data:image/png;base64,é": "not valid base64",
        "data:image/png;base64," + "A" * 2_000_000: "more than 1 MiB", f"file://{tmp_path}/secret": "not below",
        f"file://{root}/../secret": "not below", f"file://{root}/%2e%2e/secret": "not below",
        f"file://{root}/out": "not below",
        f"file://{tmp_path}/media2/c": "not below", f"file://{tmp_path}/missing": "not below",
        "file:///etc/passwd": "not below",
        f"file://host{root}/in": "not below", "file://%00": "not below", f"file://{root}/%00": "not below",
        f"file://{root}/missing": "No such file", f"file://{root}/below": "Is a directory", f"file://{root}/pipe": "not a file",
        f"file://{root}/circle": "", f"file://{root}/large": "more than 1 MiB", f"file://{root}/{'a' * 400}": "",
    }  # fmt: skip

    async def work() -> None:
        for url in good:
            assert await fetch(url, rules) == b"image", url
        for url, sentence in wrong.items():
            assert sentence in await refusal_of(url, rules), url[:99]
        assert "--allowed-local-media-path" in await refusal_of(f"file://{root}/in", FetchRules())

    asyncio.run(work())
    with pytest.raises(OctavoError, match="must be a directory"):
        FetchRules.of_options(str(root / "in"), None)
    for domain in (
        "*.test",
        "http://a.test",
        "a.test/b",
        "",
        "a.test:0",
        "a.test:99999",
        "a.test:x",
        "a@b.test",
        "a.test?b",
        ":80",
    ):
        with pytest.raises(OctavoError, match="names of hosts"):
            FetchRules.of_options(None, [domain])
