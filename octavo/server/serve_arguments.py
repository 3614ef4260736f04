"""The flags of `octavo serve` that are the server's own."""

from __future__ import annotations

import argparse
import textwrap

from octavo.config import IGNORED as IGNORED_FIELDS
from octavo.config import config_fields, flag_of
from octavo.server.operator_arguments import add_endpoint_flags, add_log_flags
from octavo.server.parsers.registry import REASONING_NAMES, TOOL_CALL_NAMES

__all__ = ["IGNORED", "add_arguments", "ignored_flags"]

# What the peer takes and Octavo decides by itself, does always or never needs: flag -> whether a value follows.
IGNORED = {
    "--enable-auto-tool-choice": False,
    "--enable-chunked-prefill": False,
    "--no-enable-chunked-prefill": False,
    "--async-scheduling": False,
    "--disable-custom-all-reduce": False,
    "--swap-space": True,
    "--tokenizer-mode": True,
    "--config-format": True,
    "--distributed-executor-backend": True,
    "--guided-decoding-backend": True,
    "--compilation-config": True,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The server's own flags; the engine's are added by the command line."""
    group = parser.add_argument_group("parsers and templates")
    group.add_argument(
        "--chat-template", metavar="FILE", help="a jinja file, or the template itself (default: the checkpoint's own)"
    )
    group.add_argument(
        "--chat-template-content-format",
        default="auto",
        metavar="{auto,string,openai}",
        help="of content that the template reads: text, a list of parts, or what it shows itself (default: %(default)s)",
    )
    group.add_argument(
        "--tool-call-parser",
        metavar=f"{{{','.join(TOOL_CALL_NAMES)}}}",
        help="the format of a model's tool calls (default: by its chat template or family)",
    )
    group.add_argument(
        "--reasoning-parser",
        metavar=f"{{{','.join(REASONING_NAMES)}}}",
        help="splits thinking from content; minimax_m2_append_think marks it there, none leaves it (default: by the model)",
    )
    http = parser.add_argument_group("HTTP and security")
    _add_http(http)
    add_endpoint_flags(http)
    ending = parser.add_argument_group("logging, timeouts and shutdown")
    add_log_flags(ending)
    _add_ending(ending)
    shown = textwrap.fill(
        f"{', '.join(_all_ignored())}. The server says at start which were given.", 76, break_on_hyphens=False
    )
    ignored = parser.add_argument_group(IGNORED_FIELDS, shown)
    for flag, takes_value in IGNORED.items():
        ignored.add_argument(flag, help=argparse.SUPPRESS, action="store" if takes_value else "store_true")


def ignored_flags(args: argparse.Namespace) -> list[str]:
    """Those of the command line that were taken from vLLM's and have no effect."""
    return [flag for flag in _all_ignored() if getattr(args, flag[2:].replace("-", "_")) not in (None, False)]


def _all_ignored() -> list[str]:
    fields = [flag_of(field.name) for field in config_fields() if field.metadata["group"] == IGNORED_FIELDS]
    return [*fields, *IGNORED]


def _add_http(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        default="0.0.0.0",
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s, all of this machine's)",
    )
    group.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="port to listen on; 0 takes a free one (default: %(default)s)"
    )
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="the model's names in the API (default: MODEL as it is given)"
    )
    group.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="a request must bring one of these (default: $VLLM_API_KEY; without either, anybody is served)",
    )
    group.add_argument(
        "--allowed-origins", nargs="+", default=["*"], metavar="ORIGIN", help="web pages that may call (default: all)"
    )
    group.add_argument(
        "--max-request-bytes",
        type=_bytes,
        default=32 * 2**20,
        metavar="N",
        help="longest body that is read (default: %(default)s)",
    )
    group.add_argument(
        "--client-timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="for a request to come whole, and for a client to read on; 0 waits for ever (default: %(default)s)",
    )


def _add_ending(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--uvicorn-log-level",
        type=str.lower,
        choices=("critical", "error", "warning", "info", "debug", "trace"),
        default="warning",
        help="least severity of uvicorn's messages that are shown (default: %(default)s)",
    )
    group.add_argument(
        "--engine-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="/health says 503 when a busy engine makes no step for so long; 0 never does (default: %(default)s)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="for running answers to end after a signal (default: %(default)s)",
    )


def _port(text: str) -> int:
    if not 0 <= (port := int(text)) <= 65535:  # the system would take 99999 for 34463
        raise ValueError
    return port


_port.__name__ = "port"  # argparse says "invalid port value"


def _seconds(text: str) -> float:
    if not 0 <= (seconds := float(text)) < float("inf"):
        raise ValueError
    return seconds


_seconds.__name__ = "number of seconds"


def _bytes(text: str) -> int:
    if (count := int(text)) <= 0:
        raise ValueError
    return count


_bytes.__name__ = "number of bytes"
