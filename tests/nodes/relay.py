"""Two hosts between which a thread of this process carries every packet: late, or for a while not at all.

The kernels of test machines have no netem. All connections between hosts pass, whatever their ports: those of the control line,
of messages, of the store and of gloo.
"""

from __future__ import annotations

import select
import socket
import subprocess
import threading
import time
from collections import deque

from nodes.hosts import TwoHosts, ip

ANY_PROTOCOL = 3  # ETH_P_ALL
SOL_PACKET, PACKET_VNET_HDR, PACKET_OUTGOING = 263, 15, 4
LONGEST = 1 << 17  # bytes of a frame; the kernel leaves segments of a TCP stream together
POLL_SECONDS = 0.05


class RelayedHosts(TwoHosts):
    """As TwoHosts, with `delay` seconds from one host to the other. `stalled`: nothing arrives until that is over."""

    def __init__(self, delay: float):
        super().__init__()
        self.delay, self.stalled, self._ended = delay, threading.Event(), threading.Event()
        self._relayed = [f"{link}r" for link in self.links]

    def connect(self) -> None:
        for link, here in zip(self.links, self._relayed, strict=True):
            ip("link", "add", link, "type", "veth", "peer", "name", here)
            ip("link", "set", here, "up")

    def __enter__(self) -> RelayedHosts:
        super().__enter__()
        self._sockets = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW) for _ in self._relayed]
        for one, link in zip(self._sockets, self._relayed, strict=True):
            one.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)  # what the sender's kernel left to a card goes along
            one.bind((link, ANY_PROTOCOL))
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for one in self._sockets:
            one.close()
        for link in self._relayed:  # a namespace lives on with what its kernel still tries to send
            subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)
        super().__exit__()

    def _carry(self) -> None:
        others = dict(zip(self._sockets, reversed(self._sockets), strict=True))
        underway: deque[tuple[float, socket.socket, bytes]] = deque()  # when it arrives, where, a frame
        while not self._ended.is_set():
            patience = POLL_SECONDS
            if underway and not self.stalled.is_set():
                patience = min(max(0.0, underway[0][0] - time.monotonic()), POLL_SECONDS)
            for source in select.select(self._sockets, [], [], patience)[0]:
                frame, sender = source.recvfrom(LONGEST)
                if sender[2] != PACKET_OUTGOING:
                    underway.append((time.monotonic() + self.delay, others[source], frame))
            while underway and not self.stalled.is_set() and underway[0][0] <= time.monotonic():
                _, to, frame = underway.popleft()
                to.send(frame)
