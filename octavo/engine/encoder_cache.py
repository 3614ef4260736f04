"""Which images' features (outputs of the vision tower) the device holds. The scheduler's book; the Encoder has the tensors.

A large image is encoded in parts, some of the tower's layers a step, so that decoding goes on meanwhile. Features stay, by
content, until room is needed: the same picture in the next turn, or in another request, is not encoded again.
"""

from __future__ import annotations

from collections import OrderedDict

from octavo.engine.sequence import EncoderPart, Request, RequestImage

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
        self._queries = self._hits = 0  # images of requests, and those that were there
        self._left: dict[bytes, tuple[int, int]] = {}  # of those that are being encoded: parts left, and all parts

    def __contains__(self, key: bytes) -> bool:
        return key in self._tokens

    def fits(self, tokens: int) -> bool:
        """Whether `add` would find room for so many tokens."""
        return tokens <= self.capacity - self.held

    def ready(self, key: bytes) -> bool:
        """Whether the cache has the image, and the step encodes its last part at the latest."""
        return key in self._tokens and key not in self._left

    def next_part(self, image: RequestImage) -> EncoderPart:
        """The part of an image that is not ready which this step encodes."""
        left, parts = self._left.pop(image.key)
        if left > 1:
            self._left[image.key] = left - 1, parts
        return EncoderPart(image, parts - left, parts)

    def add(self, key: bytes, tokens: int, request_id: str, parts: int = 1) -> None:
        """Makes room for an image, which `parts` steps encode, and holds it for the request. Check `fits` first."""
        self._left[key] = parts, parts
        self._queries += 1
        while self.used + tokens > self.capacity:
            self._evict(next(iter(self._free)))
        self.used += tokens
        self.held += tokens
        self._tokens[key], self._holders[key] = tokens, {request_id}

    def hold(self, key: bytes, request_id: str) -> None:
        """Keeps an image that the cache has until the request releases it."""
        if request_id not in self._holders[key]:
            self._queries, self._hits = self._queries + 1, self._hits + 1
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
                if key in self._left:  # a part is of no use to others
                    self._evict(key)

    def release_computed(self, request: Request, start: int, stop: int) -> None:
        """Releases the images whose last tokens are among [start, stop), unless the request has begun with one again."""
        for found in request.images and request.images_within(start, stop):
            again = request.images_within(found.stop, request.num_computed_tokens)
            if found.stop <= stop and all(other.key != found.key for other in again):
                self.release(found.key, request.request_id)

    def _evict(self, key: bytes) -> None:
        self.used -= self._tokens.pop(key)
        self._left.pop(key, None)
        del self._free[key], self._holders[key]
        self._evicted.append(key)

    def take_counts(self) -> tuple[int, int]:
        """Images that requests looked up since the last call, and those of them that were found."""
        counts, self._queries, self._hits = (self._queries, self._hits), 0, 0
        return counts

    def take_evicted(self) -> list[bytes]:
        """The images evicted since the last call, whose features can be dropped."""
        evicted, self._evicted = self._evicted, []
        return evicted
