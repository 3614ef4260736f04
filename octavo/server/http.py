"""HTTP around the handlers: reads bodies, answers with JSON or server-sent events, and detects that a client disconnected.

Streams are raw ASGI messages, and most tokens not even those (octavo.server.events.Writer): under load every token of every
request passes here.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.error_responses import ApiError, error_response
from octavo.server.events import Event, EventStream, stream
from octavo.server.freed_memory import release_soon
from octavo.server.json_pieces import json_body
from octavo.server.protocol import ApiModel
from octavo.server.request_body import SMALL_BODY, ClientLeft, as_request, read_body
from octavo.server.side_processes import SideProcesses

__all__ = ["LEFT", "Answer", "Gate", "GateState", "JsonEndpoint", "merge", "refuse_page", "while_connected"]

LEFT = 499  # nginx's status of a client that did not wait for the answer
# They need no key, and stay open during shutdown.
OPEN_PATHS = frozenset(("/health", "/ping", "/version", "/metrics", "/load", "/openapi.json", "/docs"))
HUGE = 2**20  # bytes of a body or answer after which memory is released
R = TypeVar("R", bound=ApiModel)
Answer = dict[str, Any] | EventStream | AsyncGenerator[Event, None]  # a JSON object, or the events of a stream


class JsonEndpoint(Generic[R]):
    """An ASGI endpoint: validates the body as `model`, calls `handle(request, request_id)` and sends its answer."""

    refuses_pages = False  # whether requests of web pages are refused

    def __init__(self, model: type[R], handle: Callable[[R, str], Awaitable[Answer]], side: SideProcesses):
        self.model, self.handle, self.side = model, handle, side

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        huge = False
        try:
            if self.refuses_pages:
                refuse_page(Headers(scope=scope))
            gate: GateState = scope["state"]["gate"]
            async with asyncio.timeout(gate.body_seconds):
                body = await read_body(scope, receive, gate.body_bytes)
            huge = len(body) > HUGE
            request = await self._request(body)
            del body  # otherwise it would stay in memory while the answer is written
        except TimeoutError:
            late = ApiError(408, "The request's body did not come whole in time; send it faster, or again.", code="timeout")
            await error_response(late, scope["path"])(scope, receive, send)
            return
        except ClientLeft:
            return
        finally:
            if huge:
                release_soon()
        await while_connected(receive, self._serve(request, scope, receive, send))

    async def _request(self, body: bytearray) -> R:
        if len(body) <= SMALL_BODY:
            return as_request(self.model, body)
        return await self.side.run("Reading the body", as_request, self.model, body)

    async def _serve(self, request: R, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self.handle(request, scope["state"]["request_id"])
            if not isinstance(answer, dict):
                await stream(answer, scope, send)
                return
            encoded = await json_body(answer)
            if len(encoded) > HUGE:
                release_soon()
            response = Response(encoded, media_type="application/json")
        except Exception as error:
            response = error_response(error, scope["path"])
        await response(scope, receive, send)


def refuse_page(headers: Headers) -> None:
    """Raises ApiError for a request that a web page sent."""
    if "origin" in headers:
        raise ApiError(403, "This path is for operators and answers no web page; send the request without Origin.")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` and cancels it when the client disconnects. Closing its generators aborts them in the engine."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
    if not task.cancelled() and (error := task.exception()):
        raise error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass
class GateState:
    """Whether new requests are accepted, and how many are running."""

    closing: bool = False
    running: int = 0
    body_seconds: float | None = None  # time limit for receiving a body
    body_bytes: int = 32 * 2**20  # size limit of a body


class Gate:
    """Middleware before every endpoint: sets the request id, checks the API key, answers 503 during shutdown.

    root_path: what a proxy may have left before a path. on_answer: is called with each request's scope, status (499: the client
    left before) and seconds once it is answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: GateState,
        api_keys: Sequence[str] = (),
        root_path: str = "",
        on_answer: Callable[[Scope, int, float], None] = lambda scope, status, seconds: None,
    ):
        self.app, self.state, self._root, self._on_answer = app, state, root_path, on_answer
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._root:
            scope["root_path"] = self._root  # which Starlette takes off a path that begins with it
        headers = Headers(scope=scope)
        request_id = _clean(headers.get("x-request-id", "")) or secrets.token_hex(16)
        scope.setdefault("state", {}).update(request_id=request_id, gate=self.state)

        began, status = time.perf_counter(), LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await error_response(refusal, self._within(scope["path"]))(scope, receive, send_with_id)
            self._on_answer({**scope, "path": self._within(scope["path"])}, status, time.perf_counter() - began)
            return
        self.state.running += 1
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            self.state.running -= 1
            self._on_answer({**scope, "path": self._within(scope["path"])}, status, time.perf_counter() - began)

    def _within(self, path: str) -> str:
        """The path without the root that a proxy may have left in it."""
        return path.removeprefix(self._root) if path.startswith(f"{self._root}/") else path

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if self._within(scope["path"]) in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = [key if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]  # the second is Anthropic's clients'
        # Every key is compared, in constant time, so that the delay reveals nothing. Latin-1: the headers' raw bytes.
        matches = [hmac.compare_digest(one.strip().encode("latin-1"), known) for one in sent if one for known in self._keys]
        if self._keys and not any(matches):
            return ApiError(401, "The API key is missing or wrong; send Authorization: Bearer KEY.", code="invalid_api_key")
        if self.state.closing and scope["method"] == "POST":
            return ApiError(503, "The server is shutting down; try another one.", code="shutting_down")
        return None


def _clean(request_id: str) -> str:
    """A client's id, reduced to characters that are safe in a header and a log."""
    return re.sub(r"[^\x21-\x7e]", "", request_id)[:128]


async def merge(
    streams: Sequence[AsyncGenerator[Any, None]], costs: Sequence[int], most: int
) -> AsyncGenerator[tuple[int, Any], None]:
    """The items of several generators as they come, each with its generator's number. Closing it closes them all.

    A generator is started only if it and the started ones without items so far cost at most `most` together. Otherwise all
    would enter the engine's queue ahead of the requests that other clients send meanwhile.
    """
    if len(streams) == 1:  # the common case needs no queue
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Any, BaseException | None]] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []
    silent: dict[int, int] = {}  # number -> cost of started generators without items so far
    room = asyncio.Event()

    def produced(number: int) -> None:
        if silent.pop(number, None) is not None:
            room.set()

    async def pump(number: int, items: AsyncGenerator[Any, None]) -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    produced(number)
                    queue.put_nowait((number, item, None))
            queue.put_nowait((number, None, None))
        except Exception as error:
            queue.put_nowait((number, None, error))
        produced(number)

    async def begin() -> None:
        for number, items in enumerate(streams):
            while silent and sum(silent.values()) + costs[number] > most:
                room.clear()
                await room.wait()
            silent[number] = costs[number]
            tasks.append(asyncio.create_task(pump(number, items)))
            await asyncio.sleep(0)  # starting hundreds takes time that other streams need

    tasks.append(asyncio.create_task(begin()))
    running = len(streams)
    try:
        while running:
            number, item, error = await queue.get()
            if error is not None:
                raise error
            if item is None:
                running -= 1
            else:
                yield number, item
    finally:
        tasks[0].cancel()  # first, because it adds the others
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
