"""Drives a running server with streams, and measures throughput and latency as clients see them.

The client may share the server's cores, so it does almost no work: its protocol counts bytes and parses one number.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, cast
from urllib.parse import urlsplit

from octavo.errors import OctavoError
from octavo.server.serve import loop_factory
from octavo.tools.bench.workloads import GREEDY, Workload, prompts
from octavo.tools.client_headers import client_headers
from octavo.tools.no_answer import no_answer

__all__ = ["Server", "bench", "measure"]

VOCABULARY = 1000  # token ids are below this; every vocabulary is larger, and the ids do not change the work
EVENT = b"data: {"
TAIL = 2048  # bytes that contain the last event, which has the usage
SPENT = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True)
class Server:
    """The server under test. Raises OctavoError if it does not answer, or not as OpenAI's API would."""

    host: str
    port: int
    secure: bool
    prefix: str
    url: str
    key: str | None
    model: str = ""

    @classmethod
    def at(cls, url: str, key: str | None) -> Server:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OctavoError(f"--base-url '{url}' is no URL; give one such as http://localhost:8000.")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        server = cls(parts.hostname, parts.port or (443 if secure else 80), secure, prefix, url, key)
        return replace(server, model=server._first_model())

    @property
    def headers(self) -> dict[str, str]:
        return client_headers(self.key)

    def _first_model(self) -> str:
        make = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        try:
            with closing(make(self.host, self.port, timeout=30)) as connection:
                connection.request("GET", f"{self.prefix}/v1/models", headers=self.headers)
                response = connection.getresponse()
                answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            none = f"No server answers at {self.url}; start one with `octavo serve`."
            raise OctavoError(no_answer(self.url, error) or none) from error
        try:
            if response.status != 200:
                raise ValueError(response.status)
            return str(json.loads(answer)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise OctavoError(f"{self.url} answered /v1/models with {response.status}, and not as OpenAI's API does.") from None

    def request(self, prompt: Sequence[int], w: Workload) -> bytes:
        """One streaming completion request as bytes, with the workload's sampling parameters."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": w.output_len, **w.sampling,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        data = json.dumps(body).encode()
        lines = [f"POST {self.prefix}/v1/completions HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


class Stream(asyncio.Protocol):
    """One request. `done` is set when the connection ends. Times are of events, by time.perf_counter()."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.done = asyncio.get_running_loop().create_future()
        self.start = self.first = self.last = 0.0
        self.head, self.tail = b"", b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.start = time.perf_counter()
        cast("asyncio.Transport", transport).write(self._request)  # uvloop's transport does not subclass asyncio.Transport

    def data_received(self, data: bytes) -> None:
        if len(self.head) < TAIL:
            self.head += data[:TAIL]
        if EVENT in data:
            if not self.first:
                self.first = time.perf_counter()
            # The event after the last token, with the usage and no choices, is not a token.
            if b'"choices":[{' in data or b'"choices": [{' in data:
                self.last = time.perf_counter()
        self.tail = (self.tail + data)[-TAIL:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def tokens(self) -> int:
        """The number of generated tokens. Raises OctavoError with the server's message if it refused the request."""
        status = self.head.split(b"\r\n", 1)[0].split(b" ")[1:2]
        if status != [b"200"] or not self.first:
            said = re.search(rb'"message":\s*"((?:[^"\\]|\\.)*)"', self.head)
            what = said[1].decode(errors="replace") if said else " ".join(map(bytes.decode, status)) or "nothing"
            raise OctavoError(f"the server refused a request: {what}")
        spent = SPENT.findall(self.tail)
        if not spent:
            raise OctavoError("the server ended a stream before it was whole; see what it printed.")
        return int(spent[-1])


async def _stream(server: Server, request: bytes, turn: asyncio.Semaphore) -> Stream:
    async with turn:
        loop = asyncio.get_running_loop()
        try:
            transport, stream = await loop.create_connection(
                lambda: Stream(request), server.host, server.port, ssl=server.secure or None
            )
        except OSError as error:
            raise OctavoError(f"{server.url} takes no more connections ({error}); lower --max-concurrency.") from error
        try:
            await stream.done
        finally:
            transport.close()
        return stream


async def _drive(server: Server, requests: Sequence[bytes], most: int) -> tuple[float, list[Stream]]:
    """Seconds from the first request sent to the last token received, and the streams."""
    turn = asyncio.Semaphore(most)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_stream(server, request, turn)) for request in requests]
    streams = [task.result() for task in tasks]
    for stream in streams:
        stream.tokens()
    return max(s.last for s in streams) - min(s.start for s in streams), streams


def bench(
    url: str,
    key: str | None,
    workloads: Sequence[Workload],
    most: int | None,
    repeats: int,
    offline_json: str | None,
    seed: int | None,
) -> dict[str, Any]:
    """Measures every workload against the server, the best of `repeats`, beside the offline figures if given."""
    if most is not None and most <= 0:
        raise OctavoError(f"--max-concurrency must be positive, not {most}.")
    if decode := next((w for w in workloads if w.part == "decode"), None):
        raise OctavoError(f"workload {decode.name} times decoding alone, which a client cannot see; leave it out.")
    offline = _offline(offline_json, workloads)
    server = Server.at(url, key)
    # Random without --seed, because the server's prefix cache may hold the prompts of an earlier run.
    fresh = f"{seed}" if seed is not None else os.urandom(8).hex()
    found: dict[str, Any] = {"model": server.model, "machine": platform.node() or "this machine", "workloads": {}}
    for w in workloads:
        together = min(w.num_requests, most or w.num_requests)
        short = replace(w, num_requests=together, input_len=min(32, w.input_len), output_len=min(8, w.output_len))
        measure(server, short, together, f"warm-up {fresh}")
        runs = [measure(server, w, together, f"{fresh} {r}") for r in range(repeats)]
        best = min(runs, key=lambda figures: figures["wall_s"])
        best["walls_s"] = [figures["wall_s"] for figures in runs]
        best["of_offline"] = best["out_tok_s"] / offline[w.name]["out_tok_s"] if w.name in offline else None
        found["workloads"][w.name] = best
    return found


def measure(server: Server, w: Workload, together: int, seed: str) -> dict[str, Any]:
    """The figures of one run of a workload with at most `together` streams at a time. Raises OctavoError where a request is
    refused or cut short."""
    requests = [server.request(ids, w) for ids in prompts(w, VOCABULARY, seed)]
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            wall, streams = runner.run(_drive(server, requests, together))
    except* OctavoError as group:
        raise OctavoError(str(group.exceptions[0])) from None
    counts = [stream.tokens() for stream in streams]
    if wrong := [count for count in counts if count != w.output_len]:
        raise OctavoError(f"workload {w.name}: a request brought {wrong[0]} tokens instead of {w.output_len}.")
    ttft = [s.first - s.start for s in streams]
    tpot = [(s.last - s.first) / (w.output_len - 1) for s in streams] if w.output_len > 1 else []
    return w.figures(wall, w.num_requests * w.input_len, sum(counts), ttft, tpot) | {"max_concurrency": together}


def _offline(path: str | None, workloads: Sequence[Workload]) -> dict[str, Any]:
    """The workloads' results from a file that throughput mode wrote. Workloads of the same name must be equal."""
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            found = dict(json.load(file)["workloads"])
        both = {w.name: (w.as_json, found[w.name]) for w in workloads if w.name in found}
        for name, (now, then) in both.items():
            if any(now[key] != then[key] for key in ("num_requests", "input_len", "output_len")):
                raise OctavoError(f"--offline-json {path}: its workload {name} is of another size; run both with the same.")
            if now["sampling"] != then.get("sampling", GREEDY):
                raise OctavoError(f"--offline-json {path}: its tokens are chosen otherwise; run both with the same --sampling.")
        return {name: {"out_tok_s": float(then["out_tok_s"])} for name, (_, then) in both.items()}
    except OSError as error:
        raise OctavoError(f"--offline-json {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise OctavoError(f"--offline-json {path} is not what `octavo bench throughput --json` writes.") from None
