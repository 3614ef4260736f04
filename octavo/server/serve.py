"""`octavo serve`: from the command line to a server that is ready, and from a signal to a clean end."""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.config import EngineConfig, unknown_environment
from octavo.errors import OctavoError
from octavo.server.console import LoadingBar, greet, say
from octavo.server.parsers.reasoning import check_reasoning_parser
from octavo.server.parsers.tools import choose_parser
from octavo.server.process_limits import set_limits
from octavo.server.shutdown import Ending
from octavo.text.chat_messages import check_content_format

if TYPE_CHECKING:
    from octavo.frontend.async_engine import AsyncEngine
    from octavo.server.serving import Served

__all__ = ["DEMO_NAME", "add_arguments", "loop_factory", "run"]

DEMO_NAME = "octavo-demo"
KNOWN_VARIABLES = ("VLLM_API_KEY",)  # ignoring this one would open a server that its owner believes closed
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
    group.add_argument("--tool-call-parser", metavar="NAME", help="hermes, llama3_json or mistral; default: by the model")
    group.add_argument("--reasoning-parser", metavar="NAME", help="qwen3 or deepseek_r1: split thinking from content")
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
    group.add_argument("--uvicorn-log-level", default="warning", metavar="LEVEL", help="%(default)s; info or debug show more")
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


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Serves until a signal; `started` is when the process did, by time.time()."""
    set_limits()
    choose_parser(args.tool_call_parser, None, "")  # a misspelt name should not wait for the model to load
    check_reasoning_parser(args.reasoning_parser)
    check_content_format(args.chat_template_content_format)
    if unknown := unknown_environment(KNOWN_VARIABLES):
        say(f"octavo: ignoring the environment variables {', '.join(unknown)}, which mean nothing here.")
    template = read_template(args.chat_template)
    keys = api_keys(args.api_key)
    listener = bind(args.host, args.port)
    if not keys and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        say(
            f"octavo: no API key is asked for, and {args.host} can be reached from other machines; "
            "give --api-key KEY, or --host 127.0.0.1 to serve this machine alone."
        )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(serve(args, config, listener, keys, template, started))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed: it takes half the time a token."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, taken before the model is loaded: whoever must wait should not wait in vain.

    Clients that connect while the model is loading wait for it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # bound alone, the port would still be free for a second server that is starting too
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OctavoError(f"Port {port} is in use; stop what uses it, or choose another with --port.") from error
        raise OctavoError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from error
    return listener


def api_keys(given: Sequence[str] | None) -> list[str]:
    """The keys of --api-key, or else of VLLM_API_KEY. Raises OctavoError for one that is empty: it would lock nothing."""
    variable = os.environ.get("VLLM_API_KEY")
    keys = list(given if given is not None else [] if variable is None else [variable])
    if any(not key.strip() for key in keys):
        name = "VLLM_API_KEY" if given is None else "--api-key"
        raise OctavoError(f"{name} is empty, which would leave the server open; give a key, or leave {name} out.")
    return [key.strip() for key in keys]


def read_template(given: str | None) -> str | None:
    """The text of --chat-template, which names a file or is the template."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise OctavoError(f"--chat-template {given} cannot be read: {error}.") from error


async def serve(
    args: argparse.Namespace,
    config: EngineConfig,
    listener: socket.socket,
    keys: Sequence[str],
    template: str | None,
    started: float,
) -> int:
    """Loads, serves and ends. The exit code."""
    from octavo.frontend.async_engine import AsyncEngine

    progress = LoadingBar()
    loading = asyncio.ensure_future(AsyncEngine.start(config, progress.update))
    ending = Ending(loading, args.shutdown_timeout)
    await asyncio.sleep(0)  # the engine process starts here, and loads while this one imports the server
    import octavo.server.app  # noqa: F401

    try:
        engine = await loading
    except asyncio.CancelledError:
        say("octavo: stopped while loading.")
        return 0
    finally:
        progress.close()
    try:
        await _serve(args, engine, listener, keys, template, ending, started)
        return ending.exit_code
    finally:
        ending.close()
        await engine.shutdown(0)


async def _serve(
    args: argparse.Namespace,
    engine: AsyncEngine,
    listener: socket.socket,
    keys: Sequence[str],
    template: str | None,
    ending: Ending,
    started: float,
) -> None:
    import uvicorn

    from octavo.server.app import make_app
    from octavo.server.connections import protocol_class

    served = make_served(
        engine, args.served_model_name or [args.model or DEMO_NAME], template, args.tool_call_parser, args.reasoning_parser
    )
    served.engine_timeout = args.engine_timeout
    served.gate.body_seconds = args.client_timeout or None
    served.gate.body_bytes = args.max_request_bytes
    served.content_format = args.chat_template_content_format
    app = make_app(served, keys, args.allowed_origins)
    settings = uvicorn.Config(
        app,
        http=protocol_class(args.client_timeout),
        log_level=args.uvicorn_log_level,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        ws="none",
    )
    server = uvicorn.Server(settings)
    if served.engine.tokenizer and served.template_for(tools=False):
        served.side.start()  # the first chat should not wait for it
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    ending.begin_with(server, served)
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    greeting = asyncio.ensure_future(greet(served, lambda: server.started, address, not args.model, started))
    try:
        await server.serve(sockets=[listener])
    finally:
        greeting.cancel()
        served.side.close()
        await asyncio.gather(greeting, return_exceptions=True)


def make_served(
    engine: AsyncEngine,
    names: Sequence[str],
    template: str | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Served:
    """The engine with its names and the parsers that it is given, or that its family needs."""
    from octavo.server.metrics import Metrics
    from octavo.server.serving import Served

    metrics = Metrics(names[0])
    engine.add_stats_listener(metrics.on_step)
    served = Served(engine, names, metrics, template)
    known = served.template_for(tools=True) if engine.tokenizer else template
    served.tool_parser = choose_parser(tool_parser, known, engine.info.model_type)
    served.reasoning_parser = check_reasoning_parser(reasoning_parser)
    return served


@contextmanager
def _no_signals() -> Generator[None, None, None]:
    """In place of uvicorn's own signal handlers: Ending has taken the signals."""
    yield
