"""Reads a request's body up to a size limit, and parses it into a request.

A small body takes a few milliseconds. A large one is parsed in another process (`side_processes.py`). The number of values in
the result is limited, because transferring them takes time of the event loop.
"""

from __future__ import annotations

import gc
import json
import re
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from octavo.server.error_responses import ApiError, from_validation
from octavo.server.protocol import ApiModel

__all__ = ["MAX_VALUES", "SMALL_BODY", "ClientLeft", "as_request", "read_body"]

SMALL_BODY = 2**16  # bytes
MAX_VALUES = 2**20  # numbers and strings; an object or list counts as 8 and a key as 4, because they take longer
R = TypeVar("R", bound=ApiModel)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # part of a pair, which is a character, or alone


class ClientLeft(Exception):
    """The client disconnected before the request was complete."""


async def read_body(scope: Scope, receive: Receive, most: int) -> bytearray:
    """The body. Raises ApiError for over `most` bytes or a content type other than JSON, ClientLeft if it is incomplete."""
    _check_content_type(Headers(scope=scope))
    too_large = ApiError(413, f"The body is over {_size(most)}, the most that this server reads (--max-request-bytes).")
    length = Headers(scope=scope).get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            raise too_large
    return body


def _size(count: int) -> str:
    return f"{count} bytes" if count % 2**20 else f"{count >> 20} MiB"


def as_request(model: type[R], body: bytes | bytearray) -> R:
    """Parses the body into a request, or raises ApiError 400 with its first error."""
    gc.disable()  # the collector would walk the parsed values again and again
    try:
        data = _load(body)
        if not isinstance(data, dict):
            raise ApiError(400, f"The body should be a JSON object, not {type(data).__name__}.")
        chosen = model.model_for(data)
        if len(body) > SMALL_BODY:
            _check_values(chosen, data)
        return _parse(chosen, data)  # type: ignore[return-value]  # Invocation is served by others
    finally:
        gc.enable()


def _load(body: bytes | bytearray) -> Any:
    try:
        text = body.decode(json.detect_encoding(body))  # json itself would accept encoded surrogates
        data = json.loads(text)
        broken = _ESCAPED_SURROGATE.search(text) and not _is_text(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from error
    if broken:
        field = next((name for name, value in data.items() if not _is_text(value)), None) if isinstance(data, dict) else None
        raise ApiError(400, "The body holds half of a surrogate pair, which is no Unicode text.", field and field[:80])
    return data


def _check_values(model: type[ApiModel], data: dict[str, Any]) -> None:
    """Raises ApiError for a request whose known fields hold too many values. Unknown fields are dropped later."""
    known = {field.alias or name for name, field in model.model_fields.items()}
    waiting = [value for name, value in data.items() if name in known]
    found = 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found += 8 + 4 * len(value)
            waiting += value.values()
        elif isinstance(value, list):
            found += 8 + len(value)
            waiting += [one for one in value if isinstance(one, (dict, list))]
        else:
            found += 1
        if found > MAX_VALUES:
            raise ApiError(400, "The request holds over a million values, lists and objects; send it in several requests.")


def _is_text(data: Any) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_content_type(headers: Headers) -> None:
    """Raises ApiError 415 for a body whose content type is not JSON. A browser sends other types to any server without a CORS
    preflight, so any web page could use this server. No type, and the defaults of curl and urllib, are not from browsers."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    browser = "origin" in headers or "sec-fetch-site" in headers
    if browser or kind not in ("", "application/x-www-form-urlencoded"):
        raise ApiError(415, f"The body should be JSON, not {kind or 'of no type'}; send Content-Type: application/json.")


def _parse(model: type[R], data: dict[str, Any]) -> R:
    """Validates `data` as a request, or raises ApiError 400 with its first error."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from error
