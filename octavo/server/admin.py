"""Endpoints for operators: they show the server's settings, or change its state for all users.

They are open where the command line or VLLM_SERVER_DEV_MODE=1 says so. Paths and fields are vLLM's;
/update_weights_from_disk is SGLang's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.engine_start import EngineDead
from octavo.frontend.operations import Mode, Operations
from octavo.messages import KV_CACHE, WEIGHTS
from octavo.server.error_responses import ApiError
from octavo.server.http import LEFT, Answer, JsonEndpoint, refuse_page, while_connected
from octavo.server.protocol import ApiModel
from octavo.server.serving import Served
from octavo.server.settings import flags_of, vllm_config
from octavo.version import __version__

__all__ = ["Allowed", "CollectiveRpc", "Operation", "UpdateWeights", "operator_routes"]

Group = Literal["sleep", "admin"]
R = TypeVar("R", bound=ApiModel)
_running: set[asyncio.Task[Any]] = set()


@dataclass(frozen=True)
class Allowed:
    """Which operators' endpoints are open."""

    sleep: bool = False
    admin: bool = False

    def opens(self, group: Group) -> bool:
        return self.admin or (self.sleep and group == "sleep")


@dataclass(frozen=True)
class Operation:
    """A route without a body. parameters: JSON schemas of those of its query."""

    path: str
    method: Literal["GET", "POST"]
    group: Group
    handle: Callable[[Served, Request], Awaitable[Response]]
    parameters: Mapping[str, Any] = field(default_factory=dict)


class UpdateWeights(ApiModel):
    """POST /update_weights_from_disk: loads the weights of another checkpoint directory of the same model.

    The fields of SGLang's that are not here say how memory and graphs are treated meanwhile, which Octavo decides.
    """

    model_path: Annotated[str, Field(min_length=1)]
    abort_all_requests: bool = False  # instead of completing those that run
    load_format: Literal["auto", "safetensors"] = "auto"
    flush_cache: Literal[True] = True  # prefixes of the old weights are of no use
    is_async: Literal[False] = False
    keep_pause: Literal[False] = False


class ReloadArguments(ApiModel):
    """The keyword arguments of `reload_weights`."""

    model_config = ConfigDict(extra="forbid")

    weights_path: Annotated[str, Field(min_length=1)] | None = None  # None: the present directory, whose files may be new
    is_checkpoint_format: Literal[True] = True


class CollectiveRpc(ApiModel):
    """POST /collective_rpc. Of vLLM's methods `reload_weights` is served."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["reload_weights"]
    args: Annotated[tuple[Any, ...], Field(max_length=0)] = ()
    kwargs: ReloadArguments = ReloadArguments()
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None  # seconds


async def update_weights(served: Served, request: UpdateWeights, _: str) -> Answer:
    """Reloads, as SGLang does it."""
    seconds = await _reload(served, request.model_path, "abort" if request.abort_all_requests else "wait")
    return {"success": True, "message": f"The weights were loaded in {seconds:.2f} s.", "num_paused_requests": 0}


async def collective_rpc(served: Served, request: CollectiveRpc, _: str) -> Answer:
    """Reloads, as vLLM does it."""
    operations = _operations(served)
    working = _kept(_reload(served, request.kwargs.weights_path, "wait"))
    try:
        await asyncio.wait((working,), timeout=request.timeout)
    except asyncio.CancelledError:  # the caller has left
        working.cancel()
        raise
    if not working.done():
        raise ApiError(504, f"The weights were not loaded within {request.timeout:g} s; loading goes on.")
    await working
    return {"results": [None] * operations.config.num_devices}


async def _reload(served: Served, directory: str | None, mode: Mode) -> float:
    operations = _operations(served)
    try:
        seconds: float = await _operated(mode, operations.reload(directory, mode))
    except EngineDead:
        raise
    except OctavoError as error:
        raise InvalidRequest(str(error), "model_path") from error
    return seconds


async def _operated(mode: Mode, work: Coroutine[Any, Any, Any]) -> Any:
    """Awaits an operation. While it waits for answers that run, it is taken back if its caller leaves: it would refuse requests
    until the last of them ends, at a time that nobody knows.
    """
    return await (work if mode == "wait" else _to_its_end(work))


async def _to_its_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Awaits what goes on even if the caller leaves."""
    return await asyncio.shield(_kept(work))


def _kept(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.ensure_future(work)
    _running.add(task)  # the loop itself holds it weakly
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled():
        task.exception()  # otherwise it would be printed where no client was left to be told


async def _sleep(served: Served, request: Request) -> Response:
    _check_words(request, "level", "mode")
    level, mode, operations = _choice(request, "level", ("1", "2"), "1"), _mode(request), _operations(served)

    async def fall_asleep() -> None:
        try:
            await operations.sleep(mode)
        finally:
            if operations.asleep:
                served.metrics.sleeps(int(level))

    await _operated(mode, fall_asleep())
    return JSONResponse({"status": "sleeping", "level": int(level)})


async def _wake_up(served: Served, request: Request) -> Response:
    _check_words(request, "tags")
    operations, tags = _operations(served), request.query_params.getlist("tags")
    if wrong := [tag for tag in tags if tag not in (WEIGHTS, KV_CACHE)]:
        raise InvalidRequest(f"tags must be {WEIGHTS} or {KV_CACHE}, not '{wrong[0]}'.", "tags")
    if tags == [KV_CACHE] and WEIGHTS not in operations.awake:
        raise InvalidRequest(f"The size of the cache follows from what the weights leave; wake {WEIGHTS} first.", "tags")

    async def wake_up() -> None:
        try:
            await operations.wake(tags or (WEIGHTS, KV_CACHE))
        finally:
            if not operations.asleep:
                served.metrics.sleeps(0)

    await _to_its_end(wake_up())
    return JSONResponse({"status": "sleeping" if operations.asleep else "awake", "tags_woken": tags or None})


async def _is_sleeping(served: Served, _: Request) -> Response:
    return JSONResponse({"is_sleeping": _operations(served).asleep})


async def _pause(served: Served, request: Request) -> Response:
    _check_words(request, "mode", "clear_cache")
    clear = _choice(request, "clear_cache", ("true", "false"), "true") == "true"
    mode = _mode(request)
    await _operated(mode, _operations(served).pause(mode, clear))
    return JSONResponse({"status": "paused"})


async def _resume(served: Served, _: Request) -> Response:
    await _to_its_end(_operations(served).resume())
    return JSONResponse({"status": "resumed"})


async def _is_paused(served: Served, _: Request) -> Response:
    return JSONResponse({"is_paused": _operations(served).paused})


async def _reset_prefix_cache(served: Served, _: Request) -> Response:
    await _to_its_end(_operations(served).reset_prefix_cache())
    return Response()


async def _server_info(served: Served, request: Request) -> Response:
    operations, info = _operations(served), served.engine.info
    as_text = _choice(request, "config_format", ("text", "json"), "text") == "text"
    config = flags_of(operations.config) if as_text else vllm_config(operations.config, info, served.names)
    more = {"version": __version__, "weights": operations.directory, "model_type": info.model_type, "report": info.report}
    return JSONResponse({"vllm_config": config, **more})


def _operations(served: Served) -> Operations:
    assert served.operations is not None, "a server over an engine has its operations"
    return served.operations


def _check_words(request: Request, *known: str) -> None:
    """Raises InvalidRequest for a word of the query that would be ignored."""
    if wrong := next((name for name in request.query_params if name not in known), None):
        raise InvalidRequest(f"{request.url.path} takes {' and '.join(known)} in its query, and not {wrong[:80]}.", wrong[:80])


def _mode(request: Request) -> Mode:
    if request.query_params.get("mode") == "keep":
        raise InvalidRequest(
            "mode=keep is not served, because an answer would go on with other weights; use wait or abort.", "mode"
        )
    return "wait" if _choice(request, "mode", ("abort", "wait"), "abort") == "wait" else "abort"


def _choice(request: Request, name: str, known: tuple[str, ...], default: str) -> str:
    value = request.query_params.get(name, default)
    if value.lower() not in known:
        raise InvalidRequest(f"{name} must be {' or '.join(known)}, not '{value[:80]}'.", name)
    return value.lower()


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


_MODE = _one_of("abort", "wait")
OPERATIONS = (
    Operation("/sleep", "POST", "sleep", _sleep, {"level": _one_of("1", "2"), "mode": _MODE}),
    Operation("/wake_up", "POST", "sleep", _wake_up, {"tags": {"type": "array", "items": _one_of(WEIGHTS, KV_CACHE)}}),
    Operation("/is_sleeping", "GET", "sleep", _is_sleeping),
    Operation("/pause", "POST", "admin", _pause, {"mode": _MODE, "clear_cache": {"type": "boolean"}}),
    Operation("/resume", "POST", "admin", _resume),
    Operation("/is_paused", "GET", "admin", _is_paused),
    Operation("/reset_prefix_cache", "POST", "admin", _reset_prefix_cache),
    Operation("/server_info", "GET", "admin", _server_info, {"config_format": _one_of("text", "json")}),
)


class _OperatorEndpoint(JsonEndpoint[R]):
    refuses_pages = True


def operator_routes(served: Served, allowed: Allowed) -> tuple[list[Route], list[Route]]:
    """The routes that are open, and those of the others, which say how they are opened."""
    every = [(one.path, one.group, _route(served, one)) for one in OPERATIONS]
    for path, model, handle in (
        ("/update_weights_from_disk", UpdateWeights, update_weights),
        ("/collective_rpc", CollectiveRpc, collective_rpc),
    ):
        endpoint = _OperatorEndpoint(model, partial(handle, served), served.side)
        every.append((path, "admin", Route(path, endpoint, methods=["POST"])))
    opened = [route for _, group, route in every if allowed.opens(group)]
    return opened, [_closed(path, group) for path, group, _ in every if not allowed.opens(group)]


def _route(served: Served, operation: Operation) -> Route:
    async def endpoint(request: Request) -> Response:
        refuse_page(request.headers)
        answered: list[Response] = []

        async def answer() -> None:
            answered.append(await operation.handle(served, request))

        await while_connected(request.receive, answer())
        return answered[0] if answered else Response(status_code=LEFT)

    endpoint.parameters = operation.parameters  # type: ignore[attr-defined]
    return Route(operation.path, endpoint, methods=[operation.method])


def _closed(path: str, group: Group) -> Route:
    async def endpoint(_: Request) -> Response:
        flags = "--enable-admin-endpoints" + " or --enable-sleep-mode" * (group == "sleep")
        raise ApiError(404, f"{path} is for operators and closed; start the server with {flags} to open it.")

    return Route(path, endpoint, methods=["GET", "POST"])
