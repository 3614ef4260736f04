"""What the parsers of a chat make of an engine's steps: the pieces of a stream, and the choices that they join to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from octavo.server.parsers.reasoning import join_delta, joined

__all__ = ["Piece", "WholeChoice", "told"]


@dataclass(slots=True)
class Piece:
    """What an engine step adds to a choice. `message`: content, reasoning_content and tool_calls, as a stream's delta.
    `token_ids`: if they are asked for."""

    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int]

    @property
    def tells(self) -> bool:
        """Whether a client learns something by it: what may be the beginning of a call is held back, for one."""
        return bool(self.message or self.logprobs or self.finish_reason or self.token_ids)


class WholeChoice:
    """The pieces of a choice that is not streamed."""

    def __init__(self) -> None:
        self._message: dict[str, Any] = {}
        self.logprobs: list[Any] = []
        self.token_ids: list[int] = []
        self.end: tuple[str | None, int | str | None] = (None, None)

    def add(self, piece: Piece) -> None:
        join_delta(self._message, piece.message)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs["content"] if piece.logprobs else []
        self.end = piece.finish_reason, piece.stop_reason

    def message(self) -> dict[str, Any]:
        """The choice's message."""
        parts = told(joined(self._message))
        content = parts.get("content", "")
        return {"role": "assistant", **parts, "content": content if content.strip() or not parts.get("tool_calls") else None}


def told(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under both names: clients of vLLM read the newer one, DeepSeek's the older."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"reasoning": reasoning, **message}
