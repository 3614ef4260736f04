"""Errors in the form that clients expect, and the HTTP status: OpenAI's `{"error": {"message", "type", "param", "code"}}`, and
under /v1/messages Anthropic's `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

import json
import logging
import re
import reprlib
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from octavo.errors import InvalidRequest, OctavoError

__all__ = ["HANDLERS", "ApiError", "as_api_error", "error_body", "error_response", "from_validation", "renamed"]

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

    def fields(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"message": _one_line(str(self)), "type": kind, "param": self.param, "code": self.code}


_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The JSON that a client of `path` receives, as a response or as an event of a stream."""
    fields = error.fields()
    if "/v1/messages" not in path:
        return {"error": fields}
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": fields["message"]}}


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors within name a request's fields as its own API does. `names`: a chat's field -> the field that it was made of."""
    try:
        yield
    except InvalidRequest as error:
        name, _, rest = (error.param or "").partition(".")
        if name not in names:
            raise
        sentence = re.sub(rf"(?<!\bThe )\b{name}\b", names[name], str(error))  # "The prompt has ..." is no field's name
        raise InvalidRequest(sentence, names[name] + (rest and f".{rest}")) from error


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
    404: "This path is not served here; see /v1/models, /v1/completions, /v1/chat/completions, /v1/responses and /v1/messages.",
    405: "This path is served, but not with this HTTP method.",
}


def error_response(error: BaseException, path: str = "") -> JSONResponse:
    """`error` as an HTTP response to a request for `path`."""
    answer = as_api_error(error)
    headers = dict(getattr(error, "headers", None) or {})
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if answer.status == 408:
        headers["Connection"] = "close"  # otherwise the rest of the body would be parsed as the next request
    return _Response(error_body(answer, path), answer.status, headers)


# pydantic's types of errors -> what they say of a field.
_PREDICATES = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "should be a list"),
    **dict.fromkeys(("dict_type", "model_type"), "should be an object"),
    "string_type": "should be a string",
    "string_too_short": "should be a string of {min_length} or more characters",
    "string_too_long": "should be a string of at most {max_length} characters",
    "string_pattern_mismatch": "should be a string like {pattern}",
    "too_short": "should have {min_length} or more entries",
    "too_long": "should have at most {max_length} entries",
    "greater_than": "should be over {gt:g}",
    "less_than_equal": "should be at most {le:g}",
    "literal_error": "should be {expected}",
    "missing": "is missing",
    "extra_forbidden": "is not known here",
}
_WITHOUT_VALUE = ("missing", "too_short", "too_long", "extra_forbidden")


def from_validation(error: ValidationError, data: Any) -> ApiError:
    """pydantic's errors of the first wrong field of `data`, as one sentence. Of alternatives that do not fit, those tell that
    were read deepest.
    """
    listed = [(_path(one, data), one) for one in error.errors(include_url=False)]
    listed = [(path, one) for path, one in listed if path[:1] == listed[0][0][:1]]
    deepest = max((path for path, _ in listed), key=len)
    same = [one for path, one in listed if path == deepest]
    said = " or ".join(dict.fromkeys(map(_predicate, same))).replace(" or should be ", ", or ")
    where = ".".join(str(part)[:80] for part in deepest)
    value = "" if same[0]["type"] in _WITHOUT_VALUE else f", not {_short(same[0]['input'])}"
    return ApiError(400, f"{where or 'The body'} {said}{value}.", where or None)


def _path(error: Any, data: Any) -> list[str | int]:
    """Where in the body the field is. pydantic names alternatives, too, and the keys of an object apart."""
    path: list[str | int] = []
    for part in error["loc"]:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(part)
    return path[:-1] if error["loc"][-1:] == ("[key]",) else path


def _predicate(error: Any) -> str:
    known = _PREDICATES.get(error["type"], "is not valid ({reason})")
    said = known.format(reason=error["msg"], **error.get("ctx", {}))
    said = said.replace("be True", "be true").replace("be False", "be false")  # as JSON has them
    return f"has a key that {said}" if error["loc"][-1:] == ("[key]",) else said


def _short(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else f"{value[:77]}...")
    return reprlib.repr(value) if isinstance(value, (dict, list)) else json.dumps(value)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    return error_response(error, request.scope["path"])


HANDLERS: dict[Any, Any] = {HTTPException: _handle, OctavoError: _handle, Exception: _handle}
