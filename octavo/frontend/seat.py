"""Which ranks of an engine are processes of this host, and what connects them to those of others."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

__all__ = ["Seat", "connection_of", "interface_of"]


@dataclass(frozen=True)
class Seat:
    """Ranks [first, first + count) of `size`, of which the first hands messages on to the others here.

    links: of rank 0, to the first rank of each other host. source: of another host's first rank, to rank 0. api: of rank 0, to
    the API process where that is on another host. address: this host's, as rank 0 is reached by others; empty where all ranks
    are here. interface: the network interface over which hosts exchange tensors.
    """

    first: int
    count: int
    size: int
    links: Sequence[Connection] = ()
    source: Connection | None = None
    api: Connection | None = None
    address: str = ""
    interface: str = ""

    @property
    def over_network(self) -> list[Connection]:
        """The connections that a process here gets."""
        return [end for end in (*self.links, self.source, self.api) if end is not None]


def connection_of(connected: socket.socket) -> Connection:
    """A socket as a pipe. That the other end is lost while nothing is sent, the control line notices, or TCP's keepalive."""
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(connected.detach())


def _ipv6_lines() -> list[str]:
    """The system's table: address in hexadecimal digits, four numbers, interface."""
    try:
        return Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []


def interface_of(address: str) -> str:
    """The network interface that has this address; empty where none has, and the libraries must find one."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        return next((line.split()[-1] for line in _ipv6_lines() if line.startswith(packed)), "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = array.array("B", struct.pack("256s", name[:15].encode()))
            try:
                fcntl.ioctl(probe, 0x8915, asked)  # SIOCGIFADDR
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(asked[20:24].tobytes()) == address:
                return name
    return ""
