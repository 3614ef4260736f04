"""A chat's images on their way to the engine: fetched, prepared in side processes and put in their places of the prompt.

Whatever a client sends, memory and computing are bounded: a request has few images in work at a time, the server few fetched
files, and a process that prepares one few seconds.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from octavo.config import IMAGES, EngineConfig, config_fields, flag_of
from octavo.errors import InvalidRequest
from octavo.frontend.image_support import ImageSupport
from octavo.images import ImagePatches, PlacedImage
from octavo.messages import EngineInfo
from octavo.server.protocol import ChatRequest, TokenizeRequest
from octavo.server.side_processes import Limits, SideProcesses
from octavo.text.chat_messages import has_images, without_images

if TYPE_CHECKING:
    from octavo.vision import FetchRules, ImagePart

__all__ = ["ChatImages", "image_note"]

# A photograph of 64 megapixels takes up to 5 s and 1.6 GiB: Pillow's image, one without transparency, the bytes of both.
LIMITS = Limits(cpu_seconds=20.0, memory=3 * 2**30, large=2**29)
AT_ONCE = 4  # images of a request in work
FETCHED = 32  # files of all requests that are fetched or wait to be prepared, each of at most FetchRules.max_bytes


class ChatImages:
    """How a server's chats get their images. As it is made by default, they get none.

    limit: most images of a request. max_tokens: more than a prompt may have.
    """

    def __init__(
        self, support: ImageSupport | None = None, limit: int = 0, max_tokens: int = 0, rules: FetchRules | None = None
    ):
        self.support = support or ImageSupport()
        self.limit, self.max_tokens, self._rules = limit, max_tokens, rules
        self._fetched = asyncio.Semaphore(FETCHED)
        # Its own, since a photograph must hold up no chat template; few, since each may take gigabytes.
        self.side = SideProcesses(max(2, min(4, (os.cpu_count() or 1) // 4)), LIMITS)

    @classmethod
    def of(cls, config: EngineConfig, info: EngineInfo, support: ImageSupport) -> ChatImages:
        """Of a loaded engine. Raises OctavoError for flags that are wrong."""
        if support.reader is None:
            return cls(support)
        from octavo.vision import FetchRules

        rules = FetchRules.of_options(config.allowed_local_media_path, config.allowed_media_domains or None)
        made = cls(support, config.media_limits["image"], info.max_model_len, rules)
        made.side.start()
        return made

    @property
    def text(self) -> str | None:
        """What stands for an image in a chat template that reads text alone; None where no images are read."""
        return None if self.support.reader is None else self.support.reader.text

    def take(self, request: ChatRequest | TokenizeRequest) -> list[ImagePart]:
        """The images of a request, whose messages keep their places alone: it lives as long as its answer takes.

        Raises InvalidRequest for images that are not read, and for too many.
        """
        messages = request.messages or []
        if not has_images(messages):
            return []
        if self.support.reader is None:
            raise InvalidRequest(self.support.refusal, "messages")
        from octavo.vision import image_parts

        parts = image_parts(messages, self.limit)
        request.messages = without_images(messages)
        return parts

    async def place(self, prompt: list[int], parts: list[ImagePart]) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """The prompt with every token of its images, and the images in their places. Raises InvalidRequest for what may not be
        fetched or is no image, for more tokens than a prompt may have, and for a prompt without a place for each image.
        """
        if not parts or (reader := self.support.reader) is None:
            return prompt, ()
        from octavo.vision import place_images

        images: dict[int, ImagePatches] = {}
        waiting = iter(enumerate(parts))
        tasks = [asyncio.ensure_future(self._prepare(waiting, images)) for _ in parts[:AT_ONCE]]
        try:
            await asyncio.gather(*tasks)
        finally:
            while tasks:  # none is kept: its error would hold this frame, and megabytes, until the collector looks
                tasks.pop().cancel()
        return place_images(prompt, [images[number] for number in range(len(parts))], reader.placeholder)

    async def _prepare(self, waiting: Iterator[tuple[int, ImagePart]], images: dict[int, ImagePatches]) -> None:
        for number, part in waiting:
            images[number] = await self._patches(part)
            if (tokens := sum(image.tokens for image in images.values())) >= self.max_tokens:
                raise InvalidRequest(
                    f"The request's images alone have {tokens} tokens or more; at most {self.max_tokens - 1} fit beside one to "
                    "generate: send fewer, or smaller ones.",
                    "messages",
                )

    async def _patches(self, part: ImagePart) -> ImagePatches:
        from octavo.vision import fetch_parts, prepare

        assert self.support.reader is not None and self._rules is not None  # noqa: PT018
        sent = isinstance(part.url, str) and part.url[:5].lower() == "data:"
        async with nullcontext() if sent else self._fetched:
            (source,) = await fetch_parts([part], self._rules)
            try:
                return await self.side.run("Preparing an image", prepare, source, self.support.reader.processor)
            except InvalidRequest as error:
                raise InvalidRequest(str(error), part.where) from None


def image_note(config: EngineConfig, support: ImageSupport) -> str | None:
    """What to say at start: what is wrong with the checkpoint, or which flags mean nothing to a model of text alone."""
    if support.fault:
        return f"images are refused: {support.refusal}"
    fields = [field for field in config_fields() if field.metadata["group"] == IMAGES]
    given = [flag_of(field.name) for field in fields if getattr(config, field.name) != field.default]
    if support != ImageSupport() or not given:
        return None
    return f"without effect, since this model reads text alone: {', '.join(given)}."
