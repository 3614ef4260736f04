"""POST /v1/responses, and what is kept of its answers. An answer that is not streamed is the stream's last event."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from octavo.errors import InvalidRequest
from octavo.server.chat import ChatJob, begin
from octavo.server.error_responses import ApiError, as_api_error, renamed
from octavo.server.http import Answer
from octavo.server.responses.response_events import ResponseItems
from octavo.server.responses.response_items import chat_messages
from octavo.server.responses.response_request import CHAT_NAMES, ResponsesRequest
from octavo.server.responses.response_store import MAX_BYTES, MAX_ONE, StoredResponse, size_of
from octavo.server.serving import Served

__all__ = ["cancel_response", "delete_response", "get_response", "respond"]

Event = dict[str, Any]


async def respond(served: Served, request: ResponsesRequest, _: str) -> Answer:
    """Answers a request: the response, or the events of a stream."""
    served.check_model(request.model)
    chat, response_id = request.chat, f"resp_{secrets.token_hex(24)}"
    if request.referring:
        chat.messages = chat_messages([_item(served, item, f"input.{i}") for i, item in enumerate(request.referring)])
    if request.previous_response_id is not None:
        chat.messages = [*_kept(served, request.previous_response_id, 400).messages, *chat.messages]
    messages = chat.messages  # with their images, which `begin` takes out
    if request.store and await asyncio.to_thread(size_of, messages) > MAX_ONE:
        messages = []  # it could not be kept, so it need not be held until the answer is over
    if request.instructions is not None:
        chat.messages = [{"role": "system", "content": request.instructions}, *chat.messages]
    with renamed(CHAT_NAMES):
        job = await begin(served, chat, response_id)
    response = _Response(served, request, job, response_id, messages if request.store else [])
    return response.stream() if request.stream else await response.whole()


def get_response(served: Served, response_id: str, stream: bool) -> dict[str, Any]:
    """GET /v1/responses/{id}."""
    if stream:
        raise InvalidRequest("A kept response is not streamed again; leave stream out.", "stream")
    return _kept(served, response_id).response


def delete_response(served: Served, response_id: str) -> dict[str, Any]:
    """DELETE /v1/responses/{id}."""
    _kept(served, response_id)
    served.responses.delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def cancel_response(served: Served, response_id: str) -> dict[str, Any]:
    """POST /v1/responses/{id}/cancel, which is for what runs in the background, as nothing does."""
    _kept(served, response_id)
    raise InvalidRequest("This response is complete; close the connection of one that runs to cancel it.", "response_id")


def _item(served: Served, item: dict[str, Any], where: str) -> dict[str, Any]:
    if item.get("type") != "item_reference":
        return item
    if (found := served.responses.item(str(item.get("id")))) is None:
        raise InvalidRequest(f"{where} refers to {str(item.get('id'))[:100]!r}, which is not kept here; send the item.", where)
    return found


def _kept(served: Served, response_id: str, status: int = 404) -> StoredResponse:
    if (found := served.responses.get(response_id)) is not None:
        return found
    raise ApiError(
        status,
        f"No response {response_id[:100]!r} is kept here: the newest {MAX_BYTES >> 20} MiB or so are, unless their requests "
        'had "store": false; send the whole conversation as input.',
        "previous_response_id" if status == 400 else "response_id",
        "previous_response_not_found" if status == 400 else None,
    )


class _Response:
    """One response in progress. `messages`: the chat's, to be kept with it; none if it is not to be kept."""

    def __init__(
        self, served: Served, request: ResponsesRequest, job: ChatJob, response_id: str, messages: list[dict[str, Any]]
    ):
        self.served, self.request, self.job, self.messages = served, request, job, messages
        self.items = ResponseItems()
        self.fields = _echoed(request, job, response_id)

    async def whole(self) -> dict[str, Any]:
        """The response, complete."""
        async with aclosing(self._events()) as events:
            async for event in events:
                last = event
        response: dict[str, Any] = last["response"]
        return response

    async def stream(self) -> AsyncGenerator[Event, None]:
        """The events of the stream, numbered. It begins before the engine does, so errors are events."""
        number = 0
        async with aclosing(self._events()) as events:
            try:
                async for event in events:
                    yield {**event, "sequence_number": number}
                    number += 1
            except Exception as error:
                failure = {"code": "server_error", "message": as_api_error(error).fields()["message"]}
                response = self._told("failed", error=failure, output=self.items.done)
                yield {"type": "response.failed", "response": response, "sequence_number": number}

    async def _events(self) -> AsyncGenerator[Event, None]:
        yield {"type": "response.created", "response": self._told("in_progress")}
        yield {"type": "response.in_progress", "response": self._told("in_progress")}
        reason = None
        async with aclosing(self.job.pieces()) as pieces:
            async for piece in pieces:
                for event in self.items.add(piece.message, piece.logprobs):
                    yield event
                reason = piece.finish_reason
        status = "incomplete" if reason == "length" else "completed"
        for event in self.items.finish(status):
            yield event
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage, completed = self._usage(), None if incomplete else int(time.time())
        done = {"output": self.items.done, "usage": usage, "incomplete_details": incomplete, "completed_at": completed}
        response = self._told(status, **done)
        if self.messages:
            await self._keep(response)
        yield {"type": f"response.{status}", "response": response}

    async def _keep(self, response: dict[str, Any]) -> None:
        messages = [*self.messages, *chat_messages(response["output"])]
        size = await asyncio.to_thread(size_of, messages, response)
        self.served.responses.put(response["id"], StoredResponse(response, messages), size)

    def _told(self, status: str, **more: Any) -> dict[str, Any]:
        return {**self.fields, "status": status, **more}

    def _usage(self) -> dict[str, Any]:
        usage = self.job.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},  # none is billed
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _echoed(request: ResponsesRequest, job: ChatJob, response_id: str) -> dict[str, Any]:
    """The response's fields as it begins: what the request asked for, or what is done where it asked for nothing."""
    choice = request.tool_choice
    wanted = request.text.format
    return {
        "id": response_id,
        "object": "response",
        "created_at": job.head["created"],
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata,
        "model": job.head["model"],
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": request.reasoning.effort, "summary": None},
        "store": request.store,
        "temperature": job.params.temperature,
        "text": {"format": wanted.model_dump(by_alias=True, exclude_unset=True)},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_unset=True),
        "tools": [tool.model_dump() for tool in request.tools],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": job.params.top_p,
        "truncation": "disabled",
        "usage": None,
    }
