"""The flags of `octavo serve` for operators: their endpoints, and the lines of the log."""

from __future__ import annotations

import argparse

__all__ = ["DEV_MODE", "add_endpoint_flags", "add_log_flags"]

DEV_MODE = "VLLM_SERVER_DEV_MODE"  # vLLM's variable for the same as --enable-admin-endpoints


def add_endpoint_flags(group: argparse._ArgumentGroup) -> None:
    """Adds those that open endpoints."""
    group.add_argument(
        "--enable-admin-endpoints",
        action="store_true",
        help="open the endpoints that reload weights, pause, empty the prefix cache and show the settings "
        f"(default: as {DEV_MODE}=1 says)",
    )
    group.add_argument("--enable-sleep-mode", action="store_true", help="open /sleep, /wake_up and /is_sleeping")


def add_log_flags(group: argparse._ArgumentGroup) -> None:
    """Adds those of the log."""
    group.add_argument(
        "--enable-log-requests",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="a line for each request: id, tokens, time, sampling parameters, and no text (default: none)",
    )
    group.add_argument("--disable-log-requests", dest="enable_log_requests", action="store_false", help="no such line")
    group.add_argument(
        "--max-log-len",
        type=_count,
        default=0,
        metavar="N",
        help="characters of its prompt in the line of a request (default: %(default)s)",
    )
    group.add_argument("--disable-log-stats", action="store_true", help="no line of throughput every 10 s while there is work")
    group.add_argument(
        "--disable-uvicorn-access-log",
        action="store_true",
        help="no line for each HTTP request, which --uvicorn-log-level info writes",
    )


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise ValueError
    return count


_count.__name__ = "number of characters"
