"""Replicas of an engine behind Ray Serve: `serve run deploy/ray-serve.yaml`.

Each `Engine` is a replica: the application of `octavo serve` over an engine whose ranks are Ray's actors. `Front` takes
requests from Serve's proxies and hands each, as it is, to the replica that has seen the longest part of its beginning, unless
that one has much more to do. A request whose answer has not begun when its replica is lost goes to another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import RequestRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from octavo.command_words import words_of_flags
from octavo.errors import OctavoError
from octavo.files import check_directory
from octavo.flags import engine_config, make_parser
from octavo.frontend.engine_start import EngineDead
from octavo.frontend.model_files import with_files
from octavo.frontend.router import MORE, Prefixes, start_engine
from octavo.server.error_responses import ApiError, error_body
from octavo.server.serve import add_arguments, api_keys, check_flags, prepared, read_template

__all__ = ["Engine", "Front", "PrefixRouter", "WrongArgs", "app", "by_waiting", "chunks_of_body"]

CHUNK = 256  # characters of a request that are remembered together
CHUNKS = 512  # of a request's beginning
WAITING = 16  # requests that wait in engines, for which one replica more is started
IDLE_PART = 0.4  # of the replicas that would be left: load below which one is ended
RETRY_SECONDS = 120.0  # for which a request whose answer has not begun is tried again
RETRY_PAUSE = 0.5
OF_HTTP_SERVER = (
    "host", "port", "uds", "client-timeout", "shutdown-timeout", "uvicorn-log-level", "disable-uvicorn-access-log",
    "ssl-certfile", "ssl-keyfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers",
)  # fmt: skip
SCOPE = (
    "type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client", "server",
)  # fmt: skip


def chunks_of_body(body: bytes) -> list[bytes]:
    """A hash for each chunk of what a request's body has as a prompt, of it and all before it."""
    try:
        read = json.loads(body)
        parts = [read.get(key) for key in ("cache_salt", "system", "instructions", "tools", "messages", "prompt", "input")]
    except (ValueError, AttributeError, RecursionError):
        return []
    text, found, parent = json.dumps([part for part in parts if part is not None]), list[bytes](), b""
    for start in range(0, min(len(text), CHUNK * CHUNKS) - CHUNK + 1, CHUNK):
        parent = hashlib.blake2b(parent + text[start : start + CHUNK].encode(), digest_size=16).digest()
        found.append(parent)
    return found


class PrefixRouter(RequestRouter):
    """Chooses as octavo.frontend.router does for engines of one server."""

    def initialize_state(self, **_: Any) -> None:
        self._seen: dict[Any, Prefixes] = {}

    async def choose_replicas(self, candidate_replicas: Sequence[Any], pending_request: Any = None) -> list[list[Any]]:
        """One replica a rank: those that have not much more to do than the idlest first, by what they have seen."""
        chunks = _chunks_of(pending_request)
        load = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        least = min(load.values(), default=0)
        alive = {one.replica_id for one in candidate_replicas}
        self._seen = {number: seen for number, seen in self._seen.items() if number in alive}

        def order(one: Any) -> tuple[bool, int, int]:
            seen = self._seen.get(one.replica_id)
            return load[one.replica_id] > least + MORE, -(seen.length(chunks) if seen else 0), load[one.replica_id]

        return [[one] for one in sorted(candidate_replicas, key=order)]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        self._seen.setdefault(replica_id, Prefixes()).add(_chunks_of(pending_request))


def _chunks_of(pending_request: Any) -> Sequence[bytes]:
    args: Sequence[Any] = () if pending_request is None else pending_request.args
    return args[2] if len(args) > 2 else ()


def by_waiting(context: Any) -> tuple[int, dict[str, Any]]:
    """How many replicas there should be: one more for each WAITING requests that wait in engines; one less where the others
    would be far from full. What was asked for and is still loading counts, and is not asked for again."""
    metrics, ready, target = context.aggregated_metrics or {}, len(context.running_replicas), context.target_num_replicas
    waiting, running, room = (sum(metrics.get(name, {}).values()) for name in ("waiting", "running", "room"))
    wanted = target
    if waiting >= 1:
        wanted = max(target, ready + math.ceil(waiting / WAITING))
    elif ready > 1 and ready == target and running < IDLE_PART * room * (ready - 1) / ready:
        wanted = target - 1
    return min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas), {}


@serve.deployment(
    max_ongoing_requests=4096,  # an engine has a queue of its own
    ray_actor_options={"num_cpus": 1},  # the API process; ranks have placement groups of their own
    autoscaling_config=AutoscalingConfig(
        min_replicas=1, max_replicas=4, policy=AutoscalingPolicy(policy_function="octavo.ray_serve:by_waiting")
    ),
    request_router_config=RequestRouterConfig(request_router_class="octavo.ray_serve:PrefixRouter"),
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=60,
)
class Engine:
    """A replica. words: of the command line of `octavo serve`."""

    async def __init__(self, words: Sequence[str]):  # type: ignore[misc]  # Serve waits for it
        args = make_parser("serve", add_arguments).parse_intermixed_args(list(words))
        config = await asyncio.to_thread(with_files, engine_config(args))
        check_directory(Path(config.model))
        config = replace(config, distributed_executor_backend="ray")
        self._room, self._stats = config.max_num_seqs, (0, 0)
        self._engine = await start_engine(config)
        self._engine.add_stats_listener(self._heard)
        made = prepared(args, config, self._engine, api_keys(args.api_key), read_template(args.chat_template))
        self._app, self._served, self._writing = await made

    def _heard(self, stats: Any, _: int = 0) -> None:
        self._stats = stats.num_running, stats.num_waiting + stats.num_deferred

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `by_waiting`."""
        running, waiting = self._stats
        return {"running": running, "waiting": waiting, "room": self._room}

    def check_health(self) -> None:
        """Raises EngineDead where Serve should replace this replica."""
        if not self._engine.healthy:
            raise EngineDead("The engine is dead.")
        if self._served.stalled:
            raise EngineDead(f"The engine has had work for {self._engine.silent_seconds:.0f} s and made no step.")

    async def handle(self, scope: dict[str, Any], body: bytes, _: Sequence[bytes]) -> AsyncIterator[dict[str, Any]]:
        """The application's messages for a request. Raises EngineDead in place of an answer that says only this."""
        sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        given = iter([{"type": "http.request", "body": body, "more_body": False}])
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if (message := next(given, None)) is None:
                await gone.wait()
            return message or {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.put_nowait(dict(message))

        task = asyncio.ensure_future(self._app({**scope, "asgi": {"version": "3.0"}}, receive, send))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message.get("status", 200) >= 500 and not self._engine.healthy:
                    raise EngineDead("The engine is dead.")
                yield message
            await task
        finally:
            gone.set()
            if not task.done():
                task.cancel()

    async def __del__(self) -> None:
        """Serve calls it once running requests have ended, or may take no longer."""
        with suppress(AttributeError):  # loading has failed
            if self._writing is not None:
                self._writing.cancel()
            self._served.side.close()
            self._served.images.side.close()
            await self._engine.shutdown()


@serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0.1})
class Front:
    """Hands requests on, and those that a lost replica has not begun to answer, again."""

    def __init__(self, engine: Any):
        self._engine = engine.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        scope = {key: request.scope[key] for key in SCOPE if key in request.scope}
        chunks, deadline = await asyncio.to_thread(chunks_of_body, body), time.monotonic() + RETRY_SECONDS
        while True:
            messages = self._engine.handle.remote(scope, body, chunks)
            try:
                return await _answer(messages, request.url.path)
            except (EngineDead, RayActorError):
                if time.monotonic() > deadline:
                    lost = ApiError(503, "No replica could answer; send the request again.", code="engine_unavailable")
                    return JSONResponse(error_body(lost, request.url.path), 503)
            await asyncio.sleep(RETRY_PAUSE)


async def _answer(messages: Any, path: str) -> Response:
    """The response that an application's messages make. Raises what ends them before it has begun or, of one that is no
    stream, before it is whole."""
    start = await anext(messages)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    if headers.get("content-type", "").startswith("text/event-stream"):
        return StreamingResponse(_events(messages, path), start["status"], headers)
    return Response(b"".join([message.get("body", b"") async for message in messages]), start["status"], headers)


async def _events(messages: Any, path: str) -> AsyncIterator[bytes]:
    """A stream's bytes; where its replica is lost, an event that says so."""
    try:
        async for message in messages:
            yield message.get("body", b"")
    except (OctavoError, RayActorError, RayTaskError):
        lost = ApiError(500, "The replica that wrote this answer is lost; send the request again.", code="engine_unavailable")
        yield b"data: " + json.dumps(error_body(lost, path)).encode() + b"\n\n"


class WrongArgs(OctavoError, RayServeException):
    """Flags of a Serve config that are wrong. Of Ray's kind, which Serve says as it is and does not try again."""


def app(args: Mapping[str, Any]) -> Any:
    """The application of a Serve config's import_path. args: flags of `octavo serve` without their dashes, as in its --config
    file; `deployments`: options of Engine and Front, for callers that have no such file. Raises WrongArgs, one sentence."""
    options = {name: dict(args.get("deployments", {}).get(name, {})) for name in ("Engine", "Front")}
    parser = make_parser("serve", add_arguments)
    try:
        words = words_of_flags(parser, {key: value for key, value in args.items() if key != "deployments"}, "args")
        if own := [key for key in args if str(key).replace("_", "-") in OF_HTTP_SERVER]:
            raise OctavoError(f"args: {own[0]} is for octavo serve's own HTTP server; Ray Serve's has http_options.")
        parsed = parser.parse_intermixed_args(words)
        check_flags(parsed, engine_config(parsed, downloads=False))
    except OctavoError as error:
        raise WrongArgs(str(error)) from None
    front: Any = Front  # deployments, of which mypy sees the classes
    engine: Any = Engine
    return front.options(**options["Front"]).bind(engine.options(**options["Engine"]).bind(words))
