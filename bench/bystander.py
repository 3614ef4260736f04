"""A client that reads streams beside whatever else a server gets, in a process of its own, and says when each token came.

    python -m bench.bystander PORT

It prints a JSON list for each stream that ends, and the last one when its standard input is closed: the times of the tokens, by
time.perf_counter, which on Linux is one clock for all processes. An error ends it, with a sentence on standard error.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

__all__ = ["Bystander"]

TOKENS = 900  # of one stream


class Bystander:
    """The process, from outside."""

    def __init__(self, port: int):
        command = [sys.executable, str(Path(__file__)), str(port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def stop(self) -> list[tuple[float, float]]:
        """Ends it: when each token came, and how long after the one before in its stream. Raises RuntimeError if it failed."""
        told, error = self._process.communicate(timeout=60)
        if self._process.returncode:
            raise RuntimeError(error.strip().splitlines()[-1] if error.strip() else "the bystander failed")
        streams = [json.loads(line) for line in told.splitlines()]
        return [(after, after - before) for stream in streams for before, after in pairwise(stream)]


def main() -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    while not over.is_set():
        print(json.dumps(stream(int(sys.argv[1]), over)), flush=True)


def stream(port: int, over: threading.Event) -> list[float]:
    """When the tokens of one stream came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": [5, 6], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response, times = connection.getresponse(), []
    if response.status != 200:
        sys.exit(f"the bystander got {response.status}: {response.read(300)!r}")
    while not over.is_set() and (line := response.readline()):
        if b'"error"' in line:
            sys.exit(f"the bystander got {line[:300]!r}")
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
    connection.close()
    return times


if __name__ == "__main__":
    main()
