"""Errors in the form that OpenAI's clients expect: `{"error": {"message", "type", "param", "code"}}` and the HTTP status."""

from __future__ import annotations

import json
import logging
import re
import traceback
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from octavo.errors import InvalidRequest, OctavoError

__all__ = ["HANDLERS", "ApiError", "as_api_error", "error_response", "from_validation"]

MAX_MESSAGE = 900  # characters of an error message
_LINE_ENDS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")

logger = logging.getLogger(__name__)


class ApiError(OctavoError):
    """An answer other than 200. `status` is the HTTP status, the rest are the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def __reduce__(self) -> tuple[type, tuple[int, str, str | None, str | None]]:  # is pickled between processes
        return type(self), (self.status, str(self), self.param, self.code)

    def body(self) -> dict[str, Any]:
        """The JSON that a client receives, as a response or as an event of a stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": _one_line(str(self)), "type": kind, "param": self.param, "code": self.code}}


def _one_line(message: str) -> str:
    """A message in one line, which may repeat client input: without line ends, and shortened in the middle if long."""
    message = _LINE_ENDS.sub(" ", message)
    return message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 303]}...{message[-300:]}"


def as_api_error(error: BaseException) -> ApiError:
    """The response for any error while serving a request. An unexpected error is logged and answered with a plain 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error), error.param)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, _HTTP_SENTENCES.get(error.status_code, str(error.detail)))
    if isinstance(error, RecursionError):  # JSON can be parsed deeper than it can be walked
        return ApiError(400, "The request is nested too deeply.")
    if isinstance(error, OctavoError):  # the engine died or could not continue the request
        return ApiError(503, str(error), code="engine_unavailable")
    logger.error("a request failed\n%s", _traceback(error))
    return ApiError(500, "The server failed on this request; its log says why.")


def _traceback(error: BaseException) -> str:
    """The traceback. The message is one line of printable ASCII, because it may contain client input."""
    message = str(error)[:200].encode("unicode_escape").decode()
    lines = [*traceback.StackSummary.from_list(traceback.extract_tb(error.__traceback__)).format()]
    cause = error.__cause__ or error.__context__
    before = "" if cause is None else _traceback(cause) + "\nwhich led to\n"
    return f"{before}{''.join(lines)}{type(error).__name__}: {message}"


class _Response(JSONResponse):
    """Encodes invalid surrogates as "?", because the message may contain client input."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


_HTTP_SENTENCES = {
    404: "This path is not served here; see /v1/models, /v1/completions and /v1/chat/completions.",
    405: "This path is served, but not with this HTTP method.",
}


def error_response(error: BaseException) -> JSONResponse:
    """`error` as an HTTP response."""
    answer = as_api_error(error)
    headers = dict(getattr(error, "headers", None) or {})
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if answer.status == 408:
        headers["Connection"] = "close"  # otherwise the rest of the body would be parsed as the next request
    return _Response(answer.body(), answer.status, headers)


def from_validation(error: ValidationError) -> ApiError:
    """pydantic's first error, as one sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    value = "" if first["type"] == "missing" else f", not {_short(first['input'])}"
    return ApiError(400, f"{where or 'The body'}: {reason[:1].lower()}{reason[1:]}{value}.", where or None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


async def _handle(_: Request, error: Exception) -> JSONResponse:
    return error_response(error)


HANDLERS: dict[Any, Any] = {HTTPException: _handle, OctavoError: _handle, Exception: _handle}
