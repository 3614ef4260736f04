"""What a token costs the API process: CPU time of `octavo serve` while engines that compute nothing send tokens.

    python -m bench.api_process                        # every endpoint and kind of answer, one engine
    python -m bench.api_process completions --engines 2 --streams 512

No GPU is needed. The engines are processes as always, behind the real pipes; each step they send one token for every request,
every --step-ms or, if that is 0, as fast as the pipe takes them. Clients are processes of their own with a bare protocol over
real sockets. Printed is CPU time of all of the API process's threads: microseconds a token, by which a long run takes longer
than one of SHORT tokens, the part of them within the kernel, and what a request takes besides.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.demo import MODEL_DIR
from octavo.messages import EngineInfo, EngineRequest, EngineStats, Logprob, Logprobs, TokenOutput

ROOT = Path(__file__).parents[1]
CONTEXT = 1 << 20
SHORT = 2  # tokens
PROMPT = {"prompt": "def read(self"}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {**PROMPT, **STREAM}),
    "chat": ("/v1/chat/completions", {**MESSAGES, **STREAM}),
    "completions, 2 stop strings": ("/v1/completions", {**PROMPT, **STREAM, "stop": ["never one", "never two"]}),
    "completions, 1 logprob": ("/v1/completions", {**PROMPT, **STREAM, "logprobs": 1}),
    "completions, whole": ("/v1/completions", PROMPT),
    "chat, whole": ("/v1/chat/completions", MESSAGES),
}


class FloodCore:
    """In the engine's place: one token a step for every request."""

    def __init__(self, config: Any, progress: Any, place: Any = None):
        from octavo.text.tokenizer import Tokenizer

        self.info = EngineInfo(CONTEXT, 4096, 1 << 16, 16, "llama")
        text = (MODEL_DIR.parent / "heldout.txt").read_text(encoding="utf-8")[:20_000]
        self._ids = Tokenizer(MODEL_DIR).encode(text, False)
        self._logprobs = (Logprob(5, -0.5, 1), Logprob(6, -1.5, 2))
        self._running: dict[str, list[int]] = {}  # request id -> its place in the text, tokens left, whether logprobs are asked
        self._seconds, self._due = float(os.environ["FLOOD_STEP_MS"]) / 1e3, 0.0
        self._random = random.Random(0)

    def add(self, *requests: EngineRequest) -> None:
        for one in requests:
            begin = self._random.randrange(len(self._ids))
            self._running[one.request_id] = [begin, one.params.max_tokens or CONTEXT, one.params.logprobs is not None]

    def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._running)

    def step(self) -> tuple[list[TokenOutput], EngineStats]:
        self._due = max(self._due + self._seconds, time.monotonic())
        time.sleep(max(0.0, self._due - time.monotonic()))
        outputs = []
        for request_id, state in self._running.items():
            state[0], state[1] = (state[0] + 1) % len(self._ids), state[1] - 1
            logprobs: list[Logprobs] | None = [self._logprobs] if state[2] else None
            outputs.append(TokenOutput(request_id, [self._ids[state[0]]], None if state[1] else "length", logprobs=logprobs))
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        return outputs, EngineStats(len(self._running), iteration_tokens=len(outputs))


def serve() -> None:
    """`octavo serve` with FloodCore."""
    from octavo.cli import main
    from octavo.frontend.async_engine import AsyncEngine

    before = AsyncEngine.start

    async def start(config: Any, on_progress: Any = None, make_core: Any = None, replica: int = 0) -> AsyncEngine:
        return await before(config, on_progress, FloodCore, replica)

    AsyncEngine.start = start  # type: ignore[method-assign]
    sys.exit(main())


class Answer(asyncio.Protocol):
    """One request. `done`: how many events and bytes came, once the connection ends."""

    def __init__(self, request: bytes):
        self._request, self._events, self._bytes, self._head = request, 0, 0, b""
        self.done: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._head:
            self._head = data
        self._bytes += len(data)
        self._events += data.count(b"data: ")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._head.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(f"the server answered {self._head[:300]!r}"))
        else:
            self.done.set_result((self._events, self._bytes))


async def drive(port: int, path: str, body: dict[str, Any], streams: int) -> tuple[int, int]:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Answer(request), "127.0.0.1", port) for _ in range(streams)]
    found = await asyncio.gather(*(answer.done for _, answer in made))
    return sum(events for events, _ in found), sum(size for _, size in found)


def client() -> None:
    """In a process of its own: `drive` by the arguments, its result as a line of JSON."""
    from octavo.server.serve import loop_factory

    port, path, body, streams = sys.argv[1:]
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(json.dumps(runner.run(drive(int(port), path, json.loads(body), int(streams)))))


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Of all threads of a process: in all, and within the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    user, kernel = int(fields[11]) / tick, int(fields[12]) / tick
    return user + kernel, kernel


def python(function: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"from bench.api_process import {function}; {function}()", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


def wait_for(port: int, server: subprocess.Popen[str]) -> None:
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as probe:
                probe.sendall(b"GET /health HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
                if probe.recv(100):
                    return
        except OSError:
            time.sleep(0.05)
        if server.poll() is not None:
            sys.exit("the server ended")


def run(kind: str, port: int, args: argparse.Namespace, tokens: int) -> tuple[int, int]:
    """Sends all requests, each for so many tokens. The events and bytes that came."""
    path, fields = KINDS[kind]
    body = json.dumps({**fields, "max_tokens": tokens, "ignore_eos": True, "temperature": 0})
    shares = [args.streams // args.clients + (n < args.streams % args.clients) for n in range(args.clients)]
    drivers = [python("client", port, path, body, share, stdout=subprocess.PIPE) for share in shares]
    told = [driver.communicate()[0] for driver in drivers]
    if any(driver.returncode for driver in drivers):
        sys.exit(1)
    events, sizes = zip(*map(json.loads, told), strict=True)
    return sum(events), sum(sizes)


def measure(kind: str, port: int, args: argparse.Namespace, cpu: Callable[[], tuple[float, float]]) -> None:
    run(kind, port, args, SHORT)  # the warm-up
    spent = [cpu()]
    for tokens in (SHORT, args.tokens):
        began = time.perf_counter()
        events, size = run(kind, port, args, tokens)
        seconds = time.perf_counter() - began
        spent.append(cpu())
    sent, more = args.streams * args.tokens, args.streams * (args.tokens - SHORT)
    whole, kernel = ((after - between - (between - before)) / more * 1e6 for before, between, after in zip(*spent, strict=True))
    request = (spent[1][0] - spent[0][0]) / args.streams * 1e6 - SHORT * whole
    print(
        f"{kind:28} {whole:6.1f} us a token, {kernel:4.1f} in the kernel; {request:6,.0f} us a request; "
        f"{sent / seconds:8,.0f} tokens/s; {events / sent:.2f} chunks and {size / sent:.0f} bytes a token",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {'; '.join(KINDS)} (default: all)")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=1, help="processes that send the requests")
    args, flags = parser.parse_known_args()
    if unknown := [kind for kind in args.kinds if kind not in KINDS]:
        parser.error(f"{unknown[0]} is none of {'; '.join(KINDS)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (
        "serve",
        "--port",
        port,
        "--host",
        "127.0.0.1",
        "--data-parallel-size",
        args.engines,
        "--disable-log-stats",
        *flags,
    )
    server = python(
        "serve", *command, env=os.environ | {"FLOOD_STEP_MS": str(args.step_ms)}, stdout=subprocess.DEVNULL, stderr=None
    )
    try:
        wait_for(port, server)
        print(f"{args.engines} engines, {args.streams} streams of {args.tokens} tokens, a step every {args.step_ms:g} ms")
        for kind in args.kinds or KINDS:
            measure(kind, port, args, lambda: cpu_seconds(server.pid))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
