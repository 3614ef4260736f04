"""Which images' features (outputs of the vision tower) the device holds. The scheduler's book; the Encoder has the tensors.

Features stay, by content, until room is needed: the same picture in the next turn, or in another request, is not encoded again.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["EncoderCache"]


class EncoderCache:
    """Room for `capacity` image tokens. An image that a request still needs is held; of the others the oldest goes first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.used = 0  # tokens of the images that it has
        self.held = 0  # of those that a request needs
        self._tokens: dict[bytes, int] = {}
        self._holders: dict[bytes, set[str]] = {}
        self._free: OrderedDict[bytes, None] = OrderedDict()  # held by no request, least recently used first
        self._evicted: list[bytes] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self._tokens

    def fits(self, tokens: int) -> bool:
        """Whether `add` would find room for so many tokens."""
        return tokens <= self.capacity - self.held

    def add(self, key: bytes, tokens: int, request_id: str) -> None:
        """Makes room for an image and holds it for the request. Check `fits` first."""
        while self.used + tokens > self.capacity:
            oldest, _ = self._free.popitem(last=False)
            self.used -= self._tokens.pop(oldest)
            del self._holders[oldest]
            self._evicted.append(oldest)
        self.used += tokens
        self.held += tokens
        self._tokens[key], self._holders[key] = tokens, {request_id}

    def hold(self, key: bytes, request_id: str) -> None:
        """Keeps an image that the cache has until the request releases it."""
        self._holders[key].add(request_id)
        if key in self._free:
            del self._free[key]
            self.held += self._tokens[key]

    def release(self, key: bytes, request_id: str) -> None:
        """The request does not need the image any more. Nothing happens if it did not hold it."""
        if request_id in self._holders.get(key, ()):
            self._holders[key].remove(request_id)
            if not self._holders[key]:
                self._free[key] = None
                self.held -= self._tokens[key]

    def take_evicted(self) -> list[bytes]:
        """The images evicted since the last call, whose features can be dropped."""
        evicted, self._evicted = self._evicted, []
        return evicted
