"""`octavo serve`: from the command line to a server that is ready, and from a signal to a clean end."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.config import EngineConfig, unknown_environment
from octavo.errors import OctavoError
from octavo.server.reader import check_reasoning_parser
from octavo.server.tool_calls import choose_parser

if TYPE_CHECKING:
    import uvicorn

    from octavo.engine.client import AsyncEngine
    from octavo.server.served import Served

__all__ = ["DEMO_NAME", "add_arguments", "run"]

DEMO_NAME = "octavo-demo"
DEMO_PROMPT = "def read(self"
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
    group.add_argument("--api-key", nargs="+", action="extend", default=None, metavar="KEY", help="keys that /v1 asks for")
    group.add_argument("--served-model-name", nargs="+", default=None, metavar="NAME", help="names of the model in the API")
    group.add_argument("--chat-template", metavar="FILE", help="a jinja file, or the template itself, for the checkpoint's own")
    group.add_argument("--tool-call-parser", metavar="NAME", help="hermes, llama3_json or mistral; default: by the model")
    group.add_argument("--reasoning-parser", metavar="NAME", help="qwen3 or deepseek_r1: split thinking from content")
    group.add_argument(
        "--allowed-origins", nargs="+", default=["*"], metavar="ORIGIN", help="web pages that may call; default: all"
    )
    group.add_argument(
        "--shutdown-timeout", type=float, default=30.0, metavar="SECONDS", help="for running answers (%(default)s)"
    )
    group.add_argument("--uvicorn-log-level", default="warning", metavar="LEVEL", help="%(default)s; info or debug show more")
    for flag, takes_value in IGNORED.items():
        group.add_argument(flag, help=argparse.SUPPRESS, action="store" if takes_value else "store_true")


def _port(text: str) -> int:
    if not 0 <= (port := int(text)) <= 65535:  # the system would take 99999 for 34463
        raise ValueError
    return port


_port.__name__ = "port"  # argparse says "invalid port value"


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Serves until a signal; `started` is when the process did, by time.time()."""
    choose_parser(args.tool_call_parser, None, "")  # a misspelt name should not wait for the model to load
    check_reasoning_parser(args.reasoning_parser)
    if unknown := unknown_environment(KNOWN_VARIABLES):
        say(f"octavo: ignoring the environment variables {', '.join(unknown)}, which mean nothing here.")
    template = read_template(args.chat_template)
    listener = bind(args.host, args.port)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve(args, config, listener, template, started))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed: it takes half the time a token."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, taken before the model is loaded: whoever must wait should not wait in vain."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OctavoError(f"Port {port} is in use; stop what uses it, or choose another with --port.") from error
        raise OctavoError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from error
    return listener


def read_template(given: str | None) -> str | None:
    """The text of --chat-template, which names a file or is the template."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise OctavoError(f"--chat-template {given} cannot be read: {error}.") from error


async def serve(
    args: argparse.Namespace, config: EngineConfig, listener: socket.socket, template: str | None, started: float
) -> int:
    """Loads, serves and ends. The exit code."""
    from octavo.engine.client import AsyncEngine
    from octavo.server.progress import Progress

    loop = asyncio.get_running_loop()
    progress = Progress()
    loading = asyncio.ensure_future(AsyncEngine.start(config, progress.update))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, loading.cancel)
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
        return await _serve(args, config, engine, listener, template, started)
    finally:
        await engine.shutdown(0)


async def _serve(
    args: argparse.Namespace,
    config: EngineConfig,
    engine: AsyncEngine,
    listener: socket.socket,
    template: str | None,
    started: float,
) -> int:
    import uvicorn

    from octavo.server.app import make_app

    served = make_served(
        engine, args.served_model_name or [args.model or DEMO_NAME], template, args.tool_call_parser, args.reasoning_parser
    )
    keys = args.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    app = make_app(served, keys, args.allowed_origins)
    settings = uvicorn.Config(
        app, log_level=args.uvicorn_log_level, access_log=False, lifespan="off", timeout_graceful_shutdown=1, ws="none"
    )
    server = uvicorn.Server(settings)
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    ending = Ending(server, served, args.shutdown_timeout)
    try:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        greeting = asyncio.ensure_future(_greet(args, config, served, listener, started))
        await asyncio.wait((serving, greeting), return_when=asyncio.FIRST_EXCEPTION)
        greeting.cancel()
        await serving
    except OSError as error:  # another process began to listen while the model was loading
        raise OctavoError(f"Cannot listen on port {args.port}: {error.strerror or error}.") from error
    await ending.wait()
    return 0


def make_served(
    engine: AsyncEngine,
    names: Sequence[str],
    template: str | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Served:
    """The engine with its names and the parsers that it is given, or that its family needs."""
    from octavo.server.metrics import Metrics
    from octavo.server.served import Served

    metrics = Metrics(names[0])
    engine.add_stats_listener(metrics.on_step)
    served = Served(engine, names, metrics, template)
    known = served.template_for(tools=True) if engine.tokenizer else template
    served.tool_parser = choose_parser(tool_parser, known, engine.info.model_type)
    served.reasoning_parser = check_reasoning_parser(reasoning_parser)
    return served


class Ending:
    """What SIGTERM and SIGINT do: refuse what is new, let running answers end, and on a second signal stop at once."""

    def __init__(self, server: uvicorn.Server, served: Served, timeout: float):
        self._server, self._served, self._timeout = server, served, timeout
        self._draining: asyncio.Task[None] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        if self._draining is None:
            self._served.closing = True
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self._server.force_exit = self._server.should_exit = True

    async def _drain(self) -> None:
        if self._served.running:
            say(f"octavo: finishing {self._served.running} running requests; Ctrl-C again stops at once.")
        deadline = time.monotonic() + self._timeout
        while self._served.running and time.monotonic() < deadline and not self._server.should_exit:
            await asyncio.sleep(0.02)
        self._server.should_exit = True

    async def wait(self) -> None:
        """Returns when the draining has, if there was one."""
        if self._draining is not None:
            await self._draining


async def _greet(
    args: argparse.Namespace, config: EngineConfig, served: Served, listener: socket.socket, started: float
) -> None:
    for line in served.engine.info.report:
        print(line)
    port = listener.getsockname()[1]
    if not args.model and served.engine.tokenizer is not None:
        await _show_demo(served)
        print(
            f"\nTry it:\n  curl http://localhost:{port}/v1/completions -H 'Content-Type: application/json' "
            f'-d \'{{"model": "{served.names[0]}", "prompt": "class Stack:", "max_tokens": 64}}\'\n'
        )
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"Octavo is ready on http://{host}:{port} ({time.time() - started:.1f} s)", flush=True)


async def _show_demo(served: Served) -> None:
    from octavo.engine.request import SamplingParams

    print(f"\nA first completion:\n\n{DEMO_PROMPT}", end="", flush=True)
    params = SamplingParams(max_tokens=64, temperature=0.0, repetition_penalty=1.05)
    began, tokens = time.monotonic(), 0
    async with aclosing(served.engine.generate(await served.encode(DEMO_PROMPT), params, "demo")) as deltas:
        async for delta in deltas:
            tokens += len(delta.token_ids)
            print(delta.text, end="", flush=True)
    print(f"\n\n({tokens} tokens in {time.monotonic() - began:.2f} s)")


def say(line: str) -> None:
    """A line for the person at the terminal, beside the output proper."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _no_signals() -> Generator[None, None, None]:
    """In place of uvicorn's own signal handlers: Ending has taken the signals."""
    yield
