"""`octavo serve`: from the command line to a server that is ready, and from a signal to a clean end."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.files import check_directory, read_text
from octavo.frontend.loading_bar import LoadingBar
from octavo.frontend.model_files import with_files
from octavo.frontend.node import run_node
from octavo.frontend.text_sources import check_named, check_text
from octavo.server.console import greet, say
from octavo.server.listening import address_of, bind, bind_unix, tls_settings, unlink_unix
from octavo.server.operator_arguments import DEV_MODE
from octavo.server.parsers.registry import choose_parser, choose_reasoning_parser
from octavo.server.process_limits import collect_rarely, set_limits
from octavo.server.serve_arguments import add_arguments, cross_origin, ignored_flags
from octavo.server.shutdown import Ending
from octavo.text.chat_messages import check_content_format
from octavo.text.checkpoint_text import check_templates, no_tokenizer, stand_in_note

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from octavo.frontend.router import Engine
    from octavo.server.admin import Allowed
    from octavo.server.serving import Served

__all__ = ["DEMO_NAME", "add_arguments", "api_keys", "check_flags", "loop_factory", "prepared", "read_template", "run"]

DEMO_NAME = "octavo-demo"
KNOWN_VARIABLES = ("VLLM_API_KEY", DEV_MODE)  # ignoring the first one would open a server that its owner believes closed


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Serves until a signal; `started` is when the process did, by time.time()."""
    set_limits()
    check_flags(args, config)
    template, keys, tls = read_template(args.chat_template), api_keys(args.api_key), tls_settings(args)
    check_named(config)
    if config.node_rank:
        return run_node(config)
    listener = bind(args.host, args.port) if args.uds is None else bind_unix(args.uds)
    try:
        return _run(args, config, listener, keys, template, tls, started)
    finally:
        listener.close()
        unlink_unix(args)


def _run(
    args: argparse.Namespace,
    config: EngineConfig,
    listener: socket.socket,
    keys: Sequence[str],
    template: str | None,
    tls: dict[str, Any],
    started: float,
) -> int:
    """`run`, once it is known where the server listens."""
    config = with_files(config)
    check_directory(Path(config.model))
    check_text(config)
    check_templates(config.text_directory, template)
    if (lacking := no_tokenizer(config.text_directory)) is not None:
        say(f"octavo: {lacking}")
    if not keys and args.uds is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        say(
            f"octavo: no API key is asked for, and {args.host} can be reached from other machines; "
            "give --api-key KEY, or --host 127.0.0.1 to serve this machine alone."
        )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(serve(args, config, listener, keys, template, tls, started))


def check_flags(args: argparse.Namespace, config: EngineConfig) -> None:
    """Raises OctavoError for flags that are wrong or not served, which should not wait for a model to load. Says which flags
    and variables have no effect.
    """
    choose_parser(args.tool_call_parser, None, "")
    choose_reasoning_parser(args.reasoning_parser, "")
    check_content_format(args.chat_template_content_format)
    check_media(config)
    cross_origin(args)
    if unknown := unknown_environment():
        say(f"octavo: ignoring the environment variables {', '.join(unknown)}, which mean nothing here.")
    if ignored := ignored_flags(args):
        say(f"octavo: taken without effect: {', '.join(ignored)}.")


def unknown_environment() -> list[str]:
    """Names of vLLM's environment variables, and of AITER's, that are set and have no effect here."""
    return sorted(name for name in os.environ if name.startswith(("VLLM_", "AITER_")) and name not in KNOWN_VARIABLES)


def check_media(config: EngineConfig) -> None:
    """Raises OctavoError for wrong flags of what images may be fetched, before the model is loaded."""
    if config.allowed_local_media_path is not None or config.allowed_media_domains:
        from octavo.vision import FetchRules

        FetchRules.of_options(config.allowed_local_media_path, config.allowed_media_domains)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed: it takes half the time a token."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def api_keys(given: Sequence[str] | None) -> list[str]:
    """The keys of --api-key, or else of VLLM_API_KEY. Raises OctavoError where that is empty: it would lock nothing."""
    variable = os.environ.get("VLLM_API_KEY")
    if given is None and variable is not None and not variable.strip():
        raise OctavoError("VLLM_API_KEY is empty, which would leave the server open; give it a key, or unset it.")
    return [key.strip() for key in (given if given is not None else [] if variable is None else [variable])]


def read_template(given: str | None) -> str | None:
    """The text of --chat-template, which names a file or is the template."""
    if given is None or "{" in given:
        return given
    if Path(given).exists() and not Path(given).is_file():
        raise OctavoError(f"--chat-template {given} is no file; give a file, or the template itself.")
    if (text := read_text(Path(given))) is None:
        raise OctavoError(f"--chat-template {given} cannot be read: there is no such file; or give the template itself.")
    return text


async def serve(
    args: argparse.Namespace,
    config: EngineConfig,
    listener: socket.socket,
    keys: Sequence[str],
    template: str | None,
    tls: Mapping[str, Any],
    started: float,
) -> int:
    """Loads, serves and ends. The exit code."""
    from octavo.frontend.router import start_engine

    progress = LoadingBar()
    loading = asyncio.ensure_future(start_engine(config, progress.update))
    ending = Ending(loading, args.shutdown_timeout)
    await asyncio.sleep(0)  # the engine process starts here, and loads while this one imports the server
    import octavo.server.app  # noqa: F401
    from octavo.server.side_processes import side_processes

    side_processes().start()  # neither being ready, which tries the chat template, nor the first chat should wait for it

    try:
        engine = await loading
    except (asyncio.CancelledError, OctavoError) as error:
        if isinstance(error, OctavoError) and not await ending.stopped_together(str(error)):
            raise
        say("octavo: stopped while loading.")
        return ending.exit_code
    finally:
        progress.close()
    try:
        await _serve(args, config, engine, listener, keys, template, tls, ending, started)
        return ending.exit_code
    finally:
        ending.close()
        await engine.shutdown(0)


async def _serve(
    args: argparse.Namespace,
    config: EngineConfig,
    engine: Engine,
    listener: socket.socket,
    keys: Sequence[str],
    template: str | None,
    tls: Mapping[str, Any],
    ending: Ending,
    started: float,
) -> None:
    import uvicorn

    from octavo.server.connections import protocol_class

    app, served, writing = await prepared(args, config, engine, keys, template)
    settings = uvicorn.Config(
        app,
        http=protocol_class(args.client_timeout),
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log and args.uvicorn_log_level in ("info", "debug", "trace"),
        lifespan="off",
        timeout_graceful_shutdown=1,
        ws="none",
        **tls,
    )
    server = uvicorn.Server(settings)
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    ending.begin_with(server, served)
    address = address_of(args, listener)
    collect_rarely()
    greeting = asyncio.ensure_future(greet(served, lambda: server.started, address, not args.model, started, bool(keys)))
    try:
        await server.serve(sockets=[listener])
    finally:
        greeting.cancel()
        if writing is not None:
            writing.cancel()
        served.side.close()
        served.images.side.close()
        await asyncio.gather(greeting, return_exceptions=True)


async def prepared(
    args: argparse.Namespace, config: EngineConfig, engine: Engine, keys: Sequence[str], template: str | None
) -> tuple[Starlette, Served, asyncio.Task[None] | None]:
    """The HTTP application over a ready engine, what it serves, and the task that writes lines of throughput."""
    from octavo.server.app import make_app
    from octavo.server.chat_images import ChatImages, image_note

    served = make_served(
        engine,
        args.served_model_name or [args.model or DEMO_NAME],
        template,
        args.tool_call_parser,
        args.reasoning_parser,
        config,
    )
    allowed, writing = operate(args, config, served)
    served.engine_timeout = args.engine_timeout
    served.gate.body_seconds = args.client_timeout or None
    served.gate.body_bytes = args.max_request_bytes
    served.content_format = args.chat_template_content_format
    served.images = ChatImages.of(config, engine.info, engine.images, engine.tokenizer)
    if (note := image_note(config, engine.images)) is not None:
        say(f"octavo: {note}")
    for note in (stand_in_note(served.template_for(tools=True) if engine.tokenizer else None), await served.tools_note()):
        if note is not None:
            say(f"octavo: {note}")
    served.template_kwargs = args.default_chat_template_kwargs or {}
    described = not args.disable_fastapi_docs
    return make_app(served, keys, cross_origin(args), args.root_path, allowed, described=described), served, writing


def operate(args: argparse.Namespace, config: EngineConfig, served: Served) -> tuple[Allowed, asyncio.Task[None] | None]:
    """Sets `served` up for operators: which of their endpoints are open, and the task that writes lines of throughput."""
    from octavo.frontend.operations import Operations
    from octavo.server.admin import Allowed
    from octavo.server.log_lines import LineWriter, RequestLines, throughput_lines

    served.operations, writer = Operations(served.engine, config), LineWriter()
    if args.enable_log_requests:
        served.log_request = RequestLines(writer, served.engine.tokenizer, args.max_log_len).write
    writing = None if args.disable_log_stats else asyncio.ensure_future(throughput_lines(served.metrics, writer))
    admin = args.enable_admin_endpoints or os.environ.get(DEV_MODE, "0") not in ("", "0")
    return Allowed(args.enable_sleep_mode, admin), writing


def make_served(
    engine: Engine,
    names: Sequence[str],
    template: str | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    config: EngineConfig | None = None,
) -> Served:
    """The engine with its names and the parsers that it is given, or that its family needs."""
    from octavo.server.metrics import Metrics
    from octavo.server.serving import Served
    from octavo.server.settings import cache_config

    known_cache = cache_config(config, engine.info) if config is not None else None
    metrics = Metrics(names[0], engine.count, known_cache, engine.info.weights)
    engine.add_stats_listener(metrics.on_step)
    served = Served(engine, names, metrics, template)
    known = served.template_for(tools=True) if engine.tokenizer else template
    served.tool_parser = choose_parser(tool_parser, known, engine.info.model_type)
    served.reasoning_parser = choose_reasoning_parser(reasoning_parser, engine.info.model_type)
    return served


@contextmanager
def _no_signals() -> Generator[None, None, None]:
    """In place of uvicorn's own signal handlers: Ending has taken the signals."""
    yield
