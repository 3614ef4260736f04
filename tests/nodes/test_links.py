"""One engine over two hosts whose link is slow, late, stalls or is cut: tokens, or a sentence that names the host."""

from __future__ import annotations

import json
import socket
import time

import pytest
from nodes.hosts import TwoHosts, ended, no_namespaces, serve
from nodes.relay import RelayedHosts
from nodes.test_nodes import PROMPT, READY, answer, asked, expected, first_token
from server.processes import free_port

from octavo.frontend.node_line import SILENT_SECONDS

__all__ = ["expected"]  # a fixture


def test_a_link_between_hosts_is_slow_and_then_cut(expected: str) -> None:
    """Namespaces with their own loopbacks, so that nothing passes but by the link; layers are split over it."""
    if reason := no_namespaces():
        pytest.skip(f"needs network namespaces: {reason}")
    with TwoHosts() as hosts:
        hosts.slow(20)
        http = free_port()
        head = serve(0, hosts.addresses[0], 29501, "-tp", "2", namespace=hosts.names[0], http=http)
        other = serve(1, hosts.addresses[0], 29501, "-tp", "2", namespace=hosts.names[1])
        with ended(head, other):
            head.wait_for(READY)
            assert answer(http, PROMPT, namespace=hosts.names[0]) == expected
            with asked(http, PROMPT, 700, hosts.names[0], stream=True) as client:
                first_token(client)
                began = time.monotonic()
                hosts.cut()
                rest, _ = client.communicate(timeout=60)
            assert "has not been heard of for 10 s" in rest, rest
            assert time.monotonic() - began < 30
            assert (head.end(), other.end()) == (1, 1)
        assert "Node 0 has not been heard of for 10 s" in other.said, other.said


def test_a_link_delays_every_packet_and_then_stalls(expected: str) -> None:
    """By 100 ms each way tokens are the same, and signs of life are heard. A stall shorter than a lost host is given does
    no harm, and a longer one names the host."""
    if reason := no_namespaces():
        pytest.skip(f"needs network namespaces: {reason}")
    with RelayedHosts(delay=0.1) as hosts:
        http = free_port()
        head = serve(0, hosts.addresses[0], 29501, "-pp", "2", namespace=hosts.names[0], http=http)
        other = serve(1, hosts.addresses[0], 29501, "-pp", "2", namespace=hosts.names[1])
        with ended(head, other):
            head.wait_for(READY)
            began = time.monotonic()
            assert answer(http, PROMPT, namespace=hosts.names[0]) == expected
            assert time.monotonic() - began > 12 * 0.2  # a token goes there and back
            with asked(http, PROMPT, 12, hosts.names[0]) as client:
                hosts.stalled.set()
                time.sleep(SILENT_SECONDS / 2)
                hosts.stalled.clear()
                said, _ = client.communicate(timeout=60)
            assert json.loads(said)["choices"][0]["text"] == expected
            with asked(http, PROMPT, 700, hosts.names[0], stream=True) as client:
                first_token(client)
                hosts.stalled.set()
                rest, _ = client.communicate(timeout=60)
            assert f"Node 1 ({socket.gethostname()}) has not been heard of for 10 s" in rest, rest
            assert (head.end(), other.end()) == (1, 1)
        assert "Node 0 has not been heard of for 10 s" in other.said, other.said
