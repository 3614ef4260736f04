"""The responses that are kept for `previous_response_id` and GET: the newest ones, in the memory of this process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_BYTES", "MAX_ONE", "ResponseStore", "StoredResponse", "size_of"]

MAX_BYTES = 2**26  # of all that is kept, about
MAX_ONE = 2**23  # of one, with its whole conversation
MAX_RESPONSES = 4096
_VALUE = 64  # bytes of an object of Python, about


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer as it was sent, and the chat that it ends: the messages up to it, without instructions, and its own."""

    response: dict[str, Any]
    messages: Sequence[dict[str, Any]]


class ResponseStore:
    """Responses by id. The oldest go when all take more than MAX_BYTES."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._items: dict[str, dict[str, Any]] = {}  # the outputs of what is kept, by id
        self._bytes = 0

    def item(self, item_id: str) -> dict[str, Any] | None:
        """The item of that id of a response that is kept."""
        return self._items.get(item_id)

    def get(self, response_id: str) -> StoredResponse | None:
        """What is kept under the id."""
        found = self._kept.get(response_id)
        return None if found is None else found[0]

    def put(self, response_id: str, stored: StoredResponse, size: int) -> None:
        """Keeps a response of `size` bytes, see `size_of`, unless it is over MAX_ONE."""
        if size > MAX_ONE:
            return
        self._kept[response_id] = (stored, size)
        self._items |= {item["id"]: item for item in stored.response["output"]}
        self._bytes += size
        while self._bytes > MAX_BYTES or len(self._kept) > MAX_RESPONSES:
            self.delete(next(iter(self._kept)))

    def delete(self, response_id: str) -> None:
        """Drops what is kept under the id, if anything is."""
        if (found := self._kept.pop(response_id, None)) is None:
            return
        stored, size = found
        self._bytes -= size
        for item in stored.response["output"]:
            del self._items[item["id"]]


def size_of(*values: Any, most: int = MAX_ONE, each: int = _VALUE) -> int:
    """About how many bytes the values take: their strings and keys, and `each` for every value. Stops beyond `most`."""
    size, waiting = 0, list(values)
    while waiting and size <= most:
        value = waiting.pop()
        size += each
        if isinstance(value, dict):
            size += sum(map(len, value))
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            size += len(value)
    return size
