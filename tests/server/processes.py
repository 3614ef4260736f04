"""`octavo serve` in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from octavo.demo import MODEL_DIR

FAKE = Path(__file__).with_name("fake_server.py")  # the same command line over the fake engine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def slowness() -> float:
    """How many times as long as alone on a core this process's work takes, now; at least 1. For limits in seconds."""
    start, used = time.perf_counter(), time.thread_time()
    while time.thread_time() - used < 0.05:
        pass
    return max(1.0, (time.perf_counter() - start) / (time.thread_time() - used))


def hear_ctrl_c() -> None:
    """In a new process: it ends by Ctrl-C, also where the tests run in a shell's background, whose jobs ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Server:
    """A server process. `log` grows with all that it prints."""

    def __init__(self, *flags: str, fake: bool = False, ready: bool = True, script: Path | None = None) -> None:
        """script: what is run for octavo's own command line."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [str(FAKE)] if fake else ["-m", "octavo.cli"] if script is None else [str(script)]
        flags = (str(MODEL_DIR), "--served-model-name", "model", *flags) if fake else flags
        self.process = subprocess.Popen(
            [sys.executable, *command, "serve", "--host", "127.0.0.1", "--port", str(self.port), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hear_ctrl_c,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if ready:
            self.wait_for("Octavo is ready")

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.log.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Returns when the server has printed `text`."""
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self.log):
            assert self.process.poll() is None, "".join(self.log)
            assert time.monotonic() < deadline, "".join(self.log)
            time.sleep(0.02)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 15) -> int:
        """Waits for the process to end; its exit code."""
        code = self.process.wait(seconds)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def stop(self) -> None:
        """Ends it whatever its state."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.end()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.end()
            raise
