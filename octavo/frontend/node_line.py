"""A TCP connection between two hosts of one engine, over which they say that they are there, and when they end.

Messages are lines of JSON. Each end sends an empty line now and then, since a host that is cut off or lost closes nothing.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["BEAT_SECONDS", "SILENT_SECONDS", "NodeLine", "read_line", "write_line"]

BEAT_SECONDS = 1.0  # between two signs of life
SILENT_SECONDS = 10.0  # without any after which the other end counts as lost
LONGEST = 1 << 20  # bytes of a message: names of thousands of files

Message = dict[str, Any]


def write_line(to: socket.socket, message: Message) -> None:
    """Sends one message. Raises OSError if the other end is gone."""
    to.sendall(json.dumps(message).encode() + b"\n")


def read_line(source: socket.socket) -> Message | None:
    """The first message of a new connection, and not a byte more; None where it is none, such as a port scanner's."""
    data = bytearray()
    try:
        while not data.endswith(b"\n") and len(data) < LONGEST:
            if not (there := source.recv(1 << 16, socket.MSG_PEEK)):
                return None
            data += source.recv(there.find(b"\n") + 1 or len(there))
        message = json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


class NodeLine:
    """One end. on_message: is called, in a thread, with each message; once with None and why, when the other end is lost."""

    def __init__(self, connection: socket.socket, on_message: Callable[[Message | None, str], None]):
        self._socket, self._on_message = connection, on_message
        self._sending, self._closed = threading.Lock(), threading.Event()
        self.heard = False  # whether the other end has sent what an end of a line would
        connection.settimeout(SILENT_SECONDS)

    def begin(self) -> None:
        """Starts to listen, and to say that this end is there."""
        threading.Thread(target=self._read, name="octavo-node-read", daemon=True).start()
        threading.Thread(target=self._beat, name="octavo-node-beat", daemon=True).start()

    def send(self, message: Message) -> None:
        """Sends a message. That the other end is gone, the reading thread says."""
        with suppress(OSError), self._sending:
            write_line(self._socket, message)

    def close(self) -> None:
        """Ends the connection. `on_message` is called no more."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reading thread, which closes

    def _beat(self) -> None:
        with suppress(OSError):
            while not self._closed.wait(BEAT_SECONDS):
                with self._sending:
                    self._socket.sendall(b"\n")

    def _read(self) -> None:
        data, why = b"", "has ended or is unreachable"
        try:
            while chunk := self._socket.recv(1 << 16):
                *lines, data = (data + chunk).split(b"\n")
                for message in [json.loads(line) for line in lines if line]:
                    if not isinstance(message, dict):
                        raise ValueError("not a message")
                    if not self._closed.is_set():
                        self._on_message(message, "")
                self.heard |= bool(lines)
                if len(data) > LONGEST:
                    break
        except TimeoutError:
            why = f"has not been heard of for {SILENT_SECONDS:.0f} s"
        except (OSError, ValueError, RecursionError):
            pass
        ended = self._closed.is_set()
        self._closed.set()
        self._socket.close()
        if not ended:
            self._on_message(None, why)
