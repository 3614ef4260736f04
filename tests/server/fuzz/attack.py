"""Requests that nobody should send, from several clients beside one that reads a stream."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from server.fuzz.generator import Sent
from server.processes import Server, slowness

from bench.bystander import Bystander

__all__ = ["attack"]

ERRORS = (b'{"error"', b'{"type":"error"', b'{"type":"response.failed"')  # how events begin that tell of one
CEILING = 2.0  # seconds that the bystander ever waits for a token, where nothing else runs


class Source(Protocol):
    """Of a client's requests."""

    def request(self) -> Sent: ...


def attack(server: Server, sources: Sequence[Source], requests: int, seconds: float, name: str) -> Counter[int]:
    """Sends `requests`, of each source one after the other, for at most `seconds`, and returns how often each status came.

    AssertionError, with `name`, for an answer with a fault, a stream that stood still, a server that died, complains in its log
    or keeps memory.
    """
    faults: list[str] = []
    statuses: Counter[int] = Counter()
    log: list[tuple[float, float, Sent]] = []
    bystander = Bystander(server.port)
    time.sleep(1)  # for its stream to be under way
    start, slow = time.perf_counter(), slowness()

    def client(source: Source) -> None:
        for _ in range(requests // len(sources)):
            if len(faults) > 9 or time.perf_counter() - start > seconds:
                return
            sent, begun = source.request(), time.perf_counter()
            try:
                status, body = send(server.port, sent)
            except (OSError, http.client.HTTPException) as error:
                faults.append(f"no answer ({error!r}) to {sent.what}")
                return
            statuses[status] += 1
            log.append((begun, time.perf_counter(), sent))
            if (told := fault(status, body)) is not None:
                faults.append(f"{told} for {sent.what}")

    clients = [threading.Thread(target=client, args=(source,)) for source in sources]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(seconds + 90)
    assert not any(thread.is_alive() for thread in clients), f"{name}: a request is never answered"
    gaps = [(at, wait) for at, wait in bystander.stop() if at >= start]
    waits = sorted(wait for _, wait in gaps)
    told = f"{name}: {dict(statuses)}, the bystander waited {waits[-1]:.3f} s at most, 99 of 100 times under "
    print(told + f"{waits[int(len(waits) * 0.99)]:.3f} s; {time.perf_counter() - start:.0f} s")
    assert not faults, f"{name}: {len(faults)}, the first {faults[0]}"
    assert statuses[200] > 20, told
    assert statuses[400] > 20, told
    assert waits[-1] < CEILING * max(slow, slowness()), told + culprits(gaps, log)
    assert idle(server), f"{name}: blocks are not given back"
    assert server.process.poll() is None, "".join(server.log)
    assert not any("Traceback" in line for line in server.log), "".join(server.log)
    return statuses


def send(port: int, sent: Sent) -> tuple[int, bytes]:
    """Status and body. A stream is left in the middle by one client of three."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", sent.path, sent.body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        streamed = response.headers.get("content-type", "").startswith("text/event-stream")
        if streamed and len(sent.body) % 3 == 0:
            return response.status, response.readline()
        return response.status, response.read()
    finally:
        connection.close()


def fault(status: int, body: bytes) -> str | None:
    """What is wrong with an answer."""
    if status == 200:
        events = [line[6:] for line in body.splitlines() if line.startswith(b"data: {")] or [body]
        errors = [event for event in events if event.startswith(ERRORS)]
    elif 400 <= status < 500:
        errors = [body]
    else:
        return f"status {status}: {body[:300]!r}"
    for error in errors:
        try:
            told = json.loads(error)
            message = told.get("response", told)["error"]["message"]
        except (ValueError, KeyError, TypeError) as problem:
            return f"an error that is no JSON object with a message ({problem!r}): {error[:300]!r}"
        if not isinstance(message, str) or not message.endswith((".", "?")) or "\n" in message or "Traceback" in message:
            return f"an error that is no sentence: {message[:300]!r}"
        if "The server failed" in message:
            return f"an unexpected error in a stream: {error[:300]!r}"
        if len(message) > 1000:
            return f"an error of {len(message)} characters: {message[:300]!r}"
        if '"code":500' in error.decode("utf-8", "replace"):
            return f"a server error in a stream: {error[:300]!r}"
    return None


def culprits(gaps: list[tuple[float, float]], log: list[tuple[float, float, Sent]]) -> str:
    """What was in flight when the bystander waited longest."""
    at, wait = max(gaps, key=lambda gap: gap[1])
    beside = [sent.what for begun, ended, sent in log if begun < at and ended > at - wait]
    return "".join(f"\n  in flight: {what}" for what in beside)


def idle(server: Server) -> bool:
    """Whether the engine comes to run nothing and to hold no block, within some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        values: dict[str, Any] = {}
        for line in server.get("/metrics")[1].splitlines():
            name, _, value = line.rpartition(" ")
            values[name.partition("{")[0]] = value
        wanted = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        if all(float(values[name]) == 0 for name in wanted):
            return True
        time.sleep(0.1)
    return False
