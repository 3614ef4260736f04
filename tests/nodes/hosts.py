"""Hosts for tests: network namespaces of this machine with a link between them, and `octavo serve` in each.

Where the system gives none, hosts are processes that meet on the loopback.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from server.processes import free_port, hear_ctrl_c

PATHS = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parents[2])))
FLAGS = ("--device", "cpu", "--threads", "1", "--dtype", "float32", "--max-num-batched-tokens", "256")


class Node:
    """A command on one host. `log` has what it prints."""

    def __init__(self, words: Sequence[str], namespace: str | None = None, module_path: bool = False):
        where = [] if namespace is None else ["ip", "netns", "exec", namespace]
        self.process = subprocess.Popen(
            [*where, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hear_ctrl_c,
            env=os.environ | (dict(PYTHONPATH=PATHS) if module_path else {}),
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.log.extend(iter(self.process.stdout.readline, ""))

    @property
    def said(self) -> str:
        return "".join(self.log)

    def wait_for(self, text: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def end(self, seconds: float = 30) -> int:
        """Waits for it to end; the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def close(self) -> None:
        """Ends it whatever its state."""
        self.process.kill()
        self.process.wait()
        self._reader.join()  # its ranks have standard output, too, and end by themselves
        assert self.process.stdout is not None
        self.process.stdout.close()


def serve(node: int, address: str, port: int, *flags: str, namespace: str | None = None, http: int = 0) -> Node:
    """`octavo serve` as one of two hosts."""
    at = ("--nnodes", "2", "--node-rank", str(node), "--master-addr", address, "--master-port", str(port))
    words = [
        sys.executable,
        "-m",
        "octavo.cli",
        "serve",
        *FLAGS,
        *at,
        "--host",
        "127.0.0.1",
        "--port",
        str(http or free_port()),
    ]
    return Node([*words, *flags], namespace)


@contextmanager
def ended(*nodes: Node) -> Iterator[None]:
    """Afterwards none of them is left."""
    try:
        yield
    finally:
        for node in nodes:
            node.close()


def ip(*words: str) -> None:
    """Runs the command of that name."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class TwoHosts:
    """Two network namespaces with one link: addresses 10.77.0.1 and 10.77.0.2."""

    def __init__(self) -> None:
        self.names = [f"octavo-{os.getpid()}-{n}" for n in range(2)]
        self.links = [f"ov{os.getpid()}{end}" for end in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self) -> TwoHosts:
        for name in self.names:
            ip("netns", "add", name)
        self.connect()
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def connect(self) -> None:
        """Makes the ends of the link."""
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told."""
        ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def slow(self, megabits: int) -> None:
        """So many in a second, each way."""
        for name, link in zip(self.names, self.links, strict=True):
            limit = ["rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms"]
            words = ["ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", link, "root", "tbf", *limit]
            subprocess.run(words, check=True, capture_output=True)


@cache
def no_namespaces() -> str:
    """Why there can be none here; empty where there can."""
    try:
        with TwoHosts():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        TwoHosts().__exit__()
        said = getattr(error, "stderr", None) or str(error)
        return f"they take root and `ip`: {said.strip()}"
