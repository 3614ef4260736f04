"""The flags of `octavo serve` that are the server's own."""

from __future__ import annotations

import argparse

__all__ = ["IGNORED", "add_arguments"]

# What the peer takes and Octavo decides by itself, does always or never needs: flag -> whether a value follows.
IGNORED = {
    "--disable-log-requests": False,
    "--no-enable-log-requests": False,
    "--enable-log-requests": False,
    "--disable-log-stats": False,
    "--disable-uvicorn-access-log": False,
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
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="0.0.0.0", help="address to listen on (%(default)s)")
    group.add_argument("--port", type=_port, default=8000, help="port to listen on (%(default)s); 0 takes a free one")
    group.add_argument(
        "--api-key", nargs="+", action="extend", default=None, metavar="KEY", help="one of these keys is asked for"
    )
    group.add_argument("--served-model-name", nargs="+", default=None, metavar="NAME", help="names of the model in the API")
    group.add_argument("--chat-template", metavar="FILE", help="a jinja file, or the template itself, for the checkpoint's own")
    group.add_argument(
        "--chat-template-content-format",
        default="auto",
        metavar="FORM",
        help="of content that the template reads: string, openai (a list of parts) or auto, which looks into it (%(default)s)",
    )
    group.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="hermes, llama3_json, mistral, qwen3_coder, glm45, minimax_m2, deepseek_v3, deepseek_v31, deepseek_v32 or "
        "kimi_k2; default: by the model",
    )
    group.add_argument(
        "--reasoning-parser",
        metavar="NAME",
        help="qwen3, deepseek_r1, deepseek_v3, kimi_k2, glm45 or minimax_m2 split thinking from content, "
        "minimax_m2_append_think marks it there, none leaves it; default: by the model",
    )
    group.add_argument(
        "--allowed-origins", nargs="+", default=["*"], metavar="ORIGIN", help="web pages that may call; default: all"
    )
    group.add_argument(
        "--shutdown-timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for running answers (%(default)s)"
    )
    group.add_argument(
        "--engine-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="/health says 503 when a busy engine makes no step for so long (%(default)s); 0 never does",
    )
    group.add_argument(
        "--client-timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="for a request to come whole, and for a client to read on (%(default)s); 0 waits for ever",
    )
    group.add_argument(
        "--max-request-bytes", type=_bytes, default=32 * 2**20, metavar="N", help="longest body that is read (%(default)s)"
    )
    levels = "critical", "error", "warning", "info", "debug", "trace"
    group.add_argument(
        "--uvicorn-log-level", type=str.lower, choices=levels, default="warning", metavar="LEVEL", help="%(default)s"
    )
    for flag, takes_value in IGNORED.items():
        group.add_argument(flag, help=argparse.SUPPRESS, action="store" if takes_value else "store_true")


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
