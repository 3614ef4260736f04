"""The flags of `octavo serve` that are the server's own."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from octavo.config import IGNORED as IGNORED_FIELDS
from octavo.config import config_fields, flag_of
from octavo.errors import OctavoError
from octavo.peer_flags import PEER_FLAGS, PeerFlag, judge
from octavo.server.operator_arguments import add_endpoint_flags, add_log_flags
from octavo.server.parsers.registry import REASONING_NAMES, TOOL_CALL_NAMES

__all__ = ["add_arguments", "cross_origin", "ignored_flags"]

_CROSS_ORIGIN = ("origins", "methods", "headers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The server's own flags; the engine's are added by the command line."""
    parser.add_argument("--config", metavar="FILE", help="YAML whose keys are flags without dashes; the command line wins")
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
        "--default-chat-template-kwargs",
        type=_json_object,
        metavar="JSON",
        help="variables of the template that requests need not send, such as '{\"enable_thinking\": false}'",
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
    ignored = parser.add_argument_group(IGNORED_FIELDS, textwrap.fill(_ignored_help(), 76, break_on_hyphens=False))
    for peer in PEER_FLAGS:
        ignored.add_argument(*peer.spellings, help=argparse.SUPPRESS, dest="peers", action=_Peer, peer=peer)


class _Peer(argparse.Action):
    """Keeps one of vLLM's flags, as it was given, for `peer_flags` to judge."""

    def __init__(self, peer: PeerFlag, **how: Any):
        super().__init__(**how, nargs={"switch": 0, "value": None, "values": "*"}[peer.takes])
        self.peer = peer

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        spelled = str(option_string)
        given = values if isinstance(values, list) else [values]
        if self.peer.takes == "switch":
            given = ["off" if spelled not in self.peer.names else "on"]
        namespace.peers = [*(namespace.peers or ()), (self.peer, spelled, given)]


def ignored_flags(args: argparse.Namespace) -> list[str]:
    """Those of the command line that were taken from vLLM's and have no effect. Raises OctavoError for those not served."""
    named = [flag for flag in _own_ignored() if getattr(args, flag[2:].replace("-", "_")) not in (None, False)]
    refused = []
    for peer, spelled, values in args.peers or ():
        try:
            if judge(peer, spelled, values):
                named.append(spelled)
        except OctavoError as error:
            refused.append(str(error))
    if refused:
        raise OctavoError(" ".join(dict.fromkeys(refused)))
    return list(dict.fromkeys(named))


def _own_ignored() -> list[str]:
    fields = [flag_of(field.name) for field in config_fields() if field.metadata["group"] == IGNORED_FIELDS]
    return fields


def _ignored_help() -> str:
    peers = [name for peer in PEER_FLAGS if peer.ignored for name in peer.names if name.startswith("--")]
    return (
        f"{', '.join([*_own_ignored(), *peers])}. The server says at start which were given. Flags that ask for what is not "
        "here are answered in a sentence."
    )


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
    group.add_argument("--uds", metavar="PATH", help="Unix socket to listen on, in place of --host and --port")
    group.add_argument(
        "--root-path",
        type=_root_path,
        default="",
        metavar="PATH",
        help="where a proxy serves this server's paths, such as /llm",
    )
    group.add_argument("--disable-fastapi-docs", action="store_true", help="serve no description of the API")
    _add_cross_origin(group)
    _add_tls(group)
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


def _add_cross_origin(group: argparse._ArgumentGroup) -> None:
    helps = {
        "origins": "web pages that may call, as words or as a JSON list (default: all)",
        "methods": "methods that web pages may use (default: all)",
        "headers": "headers that web pages may send (default: all)",
    }
    for name, text in helps.items():
        group.add_argument(f"--allowed-{name}", nargs="+", default=["*"], metavar=name[:-1].upper(), help=text)
    group.add_argument("--allow-credentials", action="store_true", help="web pages may send cookies and credentials")


def cross_origin(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of Starlette's CORSMiddleware. Raises OctavoError for lists that are no lists of strings."""
    named = {f"allow_{name}": _words(f"--allowed-{name}", getattr(args, f"allowed_{name}")) for name in _CROSS_ORIGIN}
    return {**named, "allow_credentials": args.allow_credentials}


def _words(flag: str, given: list[str]) -> list[str]:
    """Words as they are, or each a JSON list, as vLLM takes them."""
    found: list[str] = []
    for word in given:
        if not word.lstrip().startswith("["):
            found.append(word)
            continue
        try:
            listed = json.loads(word)
        except ValueError as error:
            raise OctavoError(f"{flag} {word} is not a valid JSON list ({error}).") from None
        if not all(isinstance(one, str) for one in listed):
            raise OctavoError(f"{flag} {word} must list strings.")
        found += listed
    return found


def _add_tls(group: argparse._ArgumentGroup) -> None:
    helps = {
        "certfile": "certificate, with which the server speaks HTTPS",
        "keyfile": "the certificate's key (default: in the same file)",
        "ca-certs": "certificates of those who may sign clients' certificates",
    }
    for name, text in helps.items():
        group.add_argument(f"--ssl-{name}", metavar="FILE", help=text)
    group.add_argument(
        "--ssl-cert-reqs",
        type=int,
        choices=(0, 1, 2),
        help="whether clients need a certificate: 0 no, 1 if they have one, 2 yes",
    )
    group.add_argument("--ssl-ciphers", metavar="NAMES", help="cipher suites of TLS 1.2, in OpenSSL's form")


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


def _root_path(text: str) -> str:
    return "/" + path if (path := text.strip("/")) else ""


def _port(text: str) -> int:
    if not 0 <= (port := int(text)) <= 65535:  # the system would take 99999 for 34463
        raise ValueError
    return port


_port.__name__ = "port"  # argparse says "invalid port value"


def _json_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found


_json_object.__name__ = "JSON object"


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
