"""The routes. They use Starlette alone: the endpoints read and validate their bodies themselves, and Starlette imports in a
third of the time of frameworks built on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from octavo.errors import InvalidRequest
from octavo.server.admin import Allowed, operator_routes
from octavo.server.anthropic.answer import answer_message, count_message_tokens
from octavo.server.anthropic.message_request import CountTokensRequest, MessagesRequest
from octavo.server.chat import chat, read_chat
from octavo.server.completions import complete
from octavo.server.error_responses import HANDLERS, ApiError
from octavo.server.http import Answer, Gate, JsonEndpoint
from octavo.server.json_pieces import json_body
from octavo.server.metrics import Metrics
from octavo.server.openapi import describing_routes
from octavo.server.protocol import ApiModel, ChatRequest, CompletionRequest, DetokenizeRequest, Invocation, TokenizeRequest
from octavo.server.responses.respond import cancel_response, delete_response, get_response, respond
from octavo.server.responses.response_request import ResponsesRequest
from octavo.server.serving import Served
from octavo.version import __version__

__all__ = ["make_app"]

R = TypeVar("R", bound=ApiModel)


ALL_ORIGINS: Mapping[str, Any] = {"allow_origins": ["*"], "allow_methods": ["*"], "allow_headers": ["*"]}


def make_app(
    served: Served,
    api_keys: Sequence[str] = (),
    cross_origin: Mapping[str, Any] = ALL_ORIGINS,
    root_path: str = "",
    allowed: Allowed | None = None,
    described: bool = True,
) -> Starlette:
    """The HTTP application over one engine.

    root_path: where a proxy serves it; requests may have it before their path. allowed: which endpoints for operators are open.
    described: whether there are /openapi.json and /docs.
    """

    def post(path: str, model: type[R], handle: Callable[[Served, R, str], Awaitable[Answer]]) -> Route:
        return Route(path, JsonEndpoint(model, lambda request, id: handle(served, request, id), served.side), methods=["POST"])

    def get(path: str, handle: Callable[[Served, Request], Response], methods: Sequence[str] = ("GET",)) -> Route:
        async def endpoint(request: Request) -> Response:
            return handle(served, request)

        return Route(path, endpoint, methods=list(methods))

    routes = [
        post("/v1/completions", CompletionRequest, complete),
        post("/v1/chat/completions", ChatRequest, chat),
        post("/v1/responses", ResponsesRequest, respond),
        Route("/v1/responses/{id}", partial(_response, served), methods=["GET", "DELETE"]),
        get("/v1/responses/{id}/cancel", _cancel_response, ("POST",)),
        post("/v1/messages", MessagesRequest, answer_message),
        post("/v1/messages/count_tokens", CountTokensRequest, count_message_tokens),
        post("/invocations", Invocation, _invoke),
        get("/v1/models", _models),
        get("/v1/models/{name:path}", _model),
        post("/tokenize", TokenizeRequest, _tokenize),
        post("/detokenize", DetokenizeRequest, _detokenize),
        get("/health", _health),
        get("/ping", _health, ("GET", "POST")),
        get("/version", lambda *_: JSONResponse({"version": __version__})),
        get("/load", lambda served, _: JSONResponse({"server_load": served.gate.running - 1})),  # without this request
        Route("/tokenizer_info", partial(_tokenizer_info, served)),
        Route("/metrics", partial(_metrics, served)),
    ]
    opened, closed = operator_routes(served, allowed or Allowed())
    routes += opened
    routes += describing_routes(list(routes)) if described else []
    count = _Counting(served.metrics, routes)
    middleware = [
        Middleware(CORSMiddleware, **cross_origin),
        Middleware(Gate, state=served.gate, api_keys=api_keys, root_path=root_path, on_answer=count.answered),
    ]
    return Starlette(routes=[*routes, *closed], middleware=middleware, exception_handlers=HANDLERS)


METHODS = frozenset(("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"))


class _Counting:
    """Counts answers by their routes, whose number is bounded, as that of paths is not."""

    def __init__(self, metrics: Metrics, routes: Sequence[Route]):
        self._metrics = metrics
        self._paths: dict[Any, str] = {route.endpoint: route.path for route in routes}
        self._known = frozenset(self._paths.values())

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        path: str = scope["path"] if scope["path"] in self._known else "none"
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.answered(method, self._paths.get(scope.get("endpoint"), path), status, seconds)


async def _metrics(served: Served, _: Request) -> Response:
    return Response(await served.metrics.text(), media_type="text/plain; version=0.0.4")


async def _tokenizer_info(served: Served, _: Request) -> Response:
    return JSONResponse(await asyncio.to_thread(served.tokenizer.info) | {"chat_template": served.template_for(tools=False)})


def _card(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "octavo",
        "root": served.names[0],
        "parent": None,
        "max_model_len": served.engine.info.max_model_len,
    }


def _models(served: Served, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(served, name) for name in served.names]})


def _model(served: Served, request: Request) -> Response:
    name = request.path_params["name"]
    served.check_model(name)
    return JSONResponse(_card(served, name))


async def _response(served: Served, request: Request) -> Response:
    response_id = request.path_params["id"]
    if request.method == "DELETE":
        return JSONResponse(delete_response(served, response_id))
    found = get_response(served, response_id, request.query_params.get("stream", "false").lower() != "false")
    return Response(await json_body(found), media_type="application/json")  # it may be megabytes long


def _cancel_response(served: Served, request: Request) -> Response:
    return JSONResponse(cancel_response(served, request.path_params["id"]))


async def _invoke(served: Served, request: ApiModel, request_id: str) -> Answer:
    if isinstance(request, ChatRequest):
        return await chat(served, request, request_id)
    assert isinstance(request, CompletionRequest)
    return await complete(served, request, request_id)


def _health(served: Served, _: Request) -> Response:
    if not served.engine.healthy:
        raise ApiError(503, "The engine is dead; the server needs a new start.", code="engine_unavailable")
    if served.stalled:
        silent = served.engine.silent_seconds
        raise ApiError(503, f"The engine has had work for {silent:.0f} s and made no step.", code="engine_stalled")
    if served.gate.closing:
        raise ApiError(503, "The server is shutting down.", code="shutting_down")
    return Response()


async def _tokenize(served: Served, request: TokenizeRequest, _: str) -> Answer:
    served.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("Send either a prompt or messages.", "prompt")
    most = served.most_listed
    if request.prompt is not None:
        ids = await served.encode(request.prompt, request.add_special_tokens is not False, most)
    else:
        ids = (await read_chat(served, request, limit=most))[1]
    if len(ids) > most:
        raise InvalidRequest(f"The text has {len(ids)} tokens; at most {most} are listed.", "prompt")
    strings = [served.tokenizer.piece(i) for i in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.engine.info.max_model_len, "tokens": ids, "token_strs": strings}


async def _detokenize(served: Served, request: DetokenizeRequest, _: str) -> Answer:
    served.check_model(request.model)
    size, most = served.engine.info.vocab_size, served.most_listed
    if len(request.tokens) > most:
        raise InvalidRequest(f"tokens has {len(request.tokens)} ids; at most {most} are read.", "tokens")
    if (wrong := next((token for token in request.tokens if not 0 <= token < size), None)) is not None:
        raise InvalidRequest(f"Token id {wrong} is out of the vocabulary of {size} tokens.", "tokens")
    return {"prompt": await asyncio.to_thread(served.tokenizer.decode, request.tokens, skip_special_tokens=False)}
