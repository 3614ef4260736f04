"""How much later another client's tokens come while one request of a kind is in flight.

    python -m bench.stalls                  # every kind, 1,000 tokens of the bystander each
    python -m bench.stalls "stop strings" "a long prompt"

One server of the demo model on this machine's cores; for pictures, which no cache has seen, one of random weights with a tiny
vision tower. A client in a process of its own reads a stream; first alone, then beside one request of each kind, sent again as
soon as it is answered. The goal: at the 99th percentile 100 ms later than alone, and never 2 s.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import image_checkpoint
from bench.bystander import Bystander

GOAL, CEILING = 0.1, 2.0  # seconds: at the 99th percentile, and ever
FLAGS = ("--quantization", "ptpc_fp8", "--kv-cache-dtype", "fp8", "--cpu-kv-cache-gib", "0.3")
COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
MANY: dict[str, Any] = {"prompt": "def read(self", "max_tokens": 16, "n": 128, "ignore_eos": True}
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 16}


def one(**fields: Any) -> dict[str, Any]:
    return {"prompt": "def read(self", "max_tokens": 16, **fields}


def tool(number: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}}
    return {"type": "function", "function": {"name": f"tool_{number}", "parameters": parameters}}


KINDS: dict[str, tuple[str, Any]] = {
    "n = 128": (COMPLETIONS, MANY),
    "10,000 stop strings, n = 128": (COMPLETIONS, {**MANY, "stop": [f"never {i}" for i in range(10_000)]}),
    "256 stop strings, n = 128": (COMPLETIONS, {**MANY, "stop": [f"never {i}" for i in range(256)]}),
    "logit_bias of 4,096, n = 128": (COMPLETIONS, {**MANY, "logit_bias": {str(i): -1 for i in range(4096)}}),
    "allowed_token_ids of 4,096, n = 128": (COMPLETIONS, {**MANY, "allowed_token_ids": list(range(4096))}),
    "1,024 bad_words, n = 128": (COMPLETIONS, {**MANY, "bad_words": [f"never {i}" for i in range(1024)]}),
    "4,096 stop_token_ids, min_tokens, n = 128": (
        COMPLETIONS,
        {**MANY, "min_tokens": 16, "stop_token_ids": list(range(4096))},
    ),
    "20 logprobs, n = 128": (COMPLETIONS, {**MANY, "logprobs": 20}),
    "20 logprobs, n = 128, streamed": (COMPLETIONS, {**MANY, "logprobs": 20, "stream": True}),
    "20 prompt_logprobs of 1,000": (COMPLETIONS, one(prompt=[5] * 1000, prompt_logprobs=20)),
    "guided_choice of 50,000": (COMPLETIONS, one(guided_choice=[f"choice {i}" for i in range(50_000)])),
    "guided_choice of 25,000": (COMPLETIONS, one(guided_choice=[f"choice {i}" for i in range(25_000)])),
    "a schema's enum of 1 M": (COMPLETIONS, one(guided_json={"enum": list(range(1_000_000))})),
    "a schema of 3,000 properties": (
        COMPLETIONS,
        one(guided_json={"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}),
    ),
    "guided_regex a{300000}, n = 128": (COMPLETIONS, {**MANY, "guided_regex": "a{300000}"}),
    "guided_regex a{30000}, n = 128": (COMPLETIONS, {**MANY, "guided_regex": "a{30000}"}),
    "1,000 tools, required": (CHAT, {**HI, "tools": [tool(i) for i in range(1000)], "tool_choice": "required"}),
    "2,000 prompts, n = 128": (COMPLETIONS, {**MANY, "prompt": [[5]] * 2000, "max_tokens": 1}),
    "32 prompts, n = 128": (COMPLETIONS, {**MANY, "prompt": [[5]] * 32}),
    "1,000 prompts of 1,000 ids": (COMPLETIONS, one(prompt=[[i % 4000] * 1000 for i in range(1000)])),
    "50,000 prompts of text": (COMPLETIONS, one(prompt=["x"] * 50_000)),
    "100,000 messages": (CHAT, {**HI, "messages": HI["messages"] * 100_000}),
    "/detokenize of 131,072 ids": ("/detokenize", {"tokens": [70] * 2**17}),
    "a prompt of 1 MB": (COMPLETIONS, one(prompt="word " * 200_000)),
    "a prompt of 5 MB": (COMPLETIONS, one(prompt=" ".join(f"w{i}x" for i in range(600_000)))),
    "/tokenize of 1 MB": (TOKENIZE, {"prompt": "word " * 200_000}),
    "31 MB in an ignored field": (COMPLETIONS, one(user=[[]] * 10_000_000)),
    "a header of 100 MB": (COMPLETIONS, b"header"),
}


def pictures(side: int, count: int = 1) -> tuple[str, Any]:
    """A chat with photographs of side x side pixels: noise over a gradient, as a JPEG file."""
    rng = np.random.default_rng(0)
    base = np.linspace(0, 200, side)[:, None, None] * rng.random(3) + rng.integers(0, 50, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(base.astype(np.uint8)).save(file, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}] * count
    return CHAT, {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}], "max_tokens": 16}


PICTURES = {
    "a picture of 1024 x 1024": (1024, 1),
    "a picture of 2048 x 2048": (2048, 1),
    "8 pictures of 1024 x 1024": (1024, 8),
}


class Load:
    """Sends the same request again and again, one at a time; with `salted`, none finds anything of another in a cache."""

    def __init__(self, port: int, path: str, body: Any, salted: bool = False):
        self.answers: list[str] = []
        self.salted = salted
        self.port, self.path = port, path
        self.headers = {"Content-Type": "application/json"}
        if body == b"header":
            self.headers["X-Long"], body = "x" * 100_000_000, one()
        self.data = json.dumps(body, separators=(",", ":")).encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            start = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            try:
                data = self.data
                if self.salted:
                    data = data[:-1] + f',"cache_salt":"{random.random()}"}}'.encode()
                connection.request("POST", self.path, data, self.headers)
                response = connection.getresponse()
                response.read()
                told = str(response.status)
            except OSError as error:
                told = type(error).__name__
            connection.close()
            self.answers.append(f"{told} in {time.perf_counter() - start:.2f} s")

    def stop(self) -> None:
        self._over.set()
        self._thread.join(120)


def waits(
    port: int, tokens: int, kind: tuple[str, Any] | None, longest: float, salted: bool = False
) -> tuple[list[float], list[str]]:
    """The bystander's, at least `tokens` of them, and what the requests of the kind were answered."""
    bystander = Bystander(port)
    time.sleep(1.5)
    load = Load(port, *kind, salted) if kind else None
    start, gaps = time.perf_counter(), list[float]()
    while True:
        begun = time.perf_counter()
        time.sleep(tokens * 0.012)  # enough for most kinds
        while load and not load.answers and time.perf_counter() - start < longest:
            time.sleep(0.1)
        gaps += [wait for at, wait in bystander.stop() if begun <= at]
        if len(gaps) >= tokens or time.perf_counter() - start > longest:
            break
        bystander = Bystander(port)
        time.sleep(1.5)
    gaps.sort()
    if load:
        load.stop()
    return gaps, load.answers if load else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="parts of their names; default: all")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--longest", type=float, default=60, help="seconds that one kind may take")
    args = parser.parse_args()

    def asked(name: str) -> bool:
        return not args.kinds or any(part in name for part in args.kinds)

    if kinds := {name: kind for name, kind in KINDS.items() if asked(name)}:
        measure((), kinds, args)
    if shown := {name: pictures(*sizes) for name, sizes in PICTURES.items() if asked(name)}:
        with tempfile.TemporaryDirectory() as directory:
            image_checkpoint.write(Path(directory))
            measure(("--model", directory, "--load-format", "dummy"), shown, args, salted=True)


def measure(flags: Sequence[str], kinds: Mapping[str, tuple[str, Any]], args: argparse.Namespace, salted: bool = False) -> None:
    """Starts a server and prints a line for each kind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "octavo.cli", "serve", "--host", "127.0.0.1", "--port", str(port), *FLAGS, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        next(line for line in server.stdout if "Octavo is ready" in line)
        threading.Thread(target=server.stdout.read, daemon=True).start()
        alone, _ = waits(port, args.tokens, None, args.longest)
        idle = alone[int(0.99 * len(alone))]
        print(
            f"{len(os.sched_getaffinity(0))} cores; alone: p50 {1e3 * alone[len(alone) // 2]:.1f} ms, p99 {1e3 * idle:.1f} ms"
        )
        for name, kind in kinds.items():
            gaps, answers = waits(port, args.tokens, kind, args.longest, salted)
            late = gaps[int(0.99 * len(gaps))] - idle
            verdict = "ok  " if late <= GOAL and gaps[-1] <= CEILING else "MISS"
            few = "" if len(gaps) >= args.tokens else f", {len(gaps)} tokens only"
            found = f"p99 {1e3 * late:+8.1f} ms, longest {1e3 * gaps[-1]:8.1f} ms{few}"
            print(f"{verdict} {name:<42} {found}; {len(answers)} requests, the last {(answers or ['none'])[-1]}", flush=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
