"""A chat's images and videos on their way to the engine: fetched, prepared in side processes, put into the prompt.

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
from octavo.server.error_responses import ApiError
from octavo.server.protocol import ChatRequest, TokenizeRequest
from octavo.server.side_processes import Limits, SideProcesses
from octavo.text.chat_messages import has_images, without_images

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer
    from octavo.vision import FetchRules, ImagePart, VideoFrames, VideoPart

    Part = ImagePart | VideoPart

__all__ = ["ChatImages", "image_note"]

# A photograph of 64 megapixels takes up to 5 s and 1.6 GiB: Pillow's image, one without transparency, the bytes of both.
LIMITS = Limits(cpu_seconds=20.0, memory=3 * 2**30, large=2**29)
AT_ONCE = 4  # images of a request in work
MAX_HELD = 4 * 2**30  # bytes of the patches of all running requests, which their engine keeps until they end
FETCHED = 32  # files of all requests that are fetched or wait to be prepared, of 32 MiB at most, of videos 64


class HeldImages:
    """The bytes that a request's images take in the engine. They are given back when this is dropped, with the request."""

    def __init__(self, owner: ChatImages):
        self._owner, self._bytes = owner, 0

    def add(self, one: ImagePatches | VideoFrames) -> None:
        """Raises ApiError 503 where all requests together would hold more than MAX_HELD."""
        images = [one] if isinstance(one, ImagePatches) else one.images
        count = sum(image.pixels.nbytes for image in images)
        if self._owner.held + count > MAX_HELD:
            raise ApiError(503, "The images of the requests that run take all the room there is; send this one later.")
        self._owner.held += count
        self._bytes += count

    def __del__(self) -> None:
        self._owner.held -= self._bytes


class ChatImages:
    """How a server's chats get their images and videos. As it is made by default, they get none.

    limit: most images of a request. max_tokens: more than a prompt may have. videos: most of a request.
    """

    def __init__(
        self,
        support: ImageSupport | None = None,
        limit: int = 0,
        max_tokens: int = 0,
        rules: FetchRules | None = None,
        videos: int = 0,
        tokenizer: Tokenizer | None = None,
    ):
        self.support = support or ImageSupport()
        self.limit, self.videos, self.max_tokens, self._rules, self._tokenizer = limit, videos, max_tokens, rules, tokenizer
        self._fetched, self.held = asyncio.Semaphore(FETCHED), 0
        # Its own, since a photograph must hold up no chat template; few, since each may take gigabytes.
        self.side = SideProcesses(max(2, min(4, (os.cpu_count() or 1) // 4)), LIMITS)

    @classmethod
    def of(
        cls, config: EngineConfig, info: EngineInfo, support: ImageSupport, tokenizer: Tokenizer | None = None
    ) -> ChatImages:
        """Of a loaded engine. Raises OctavoError for flags that are wrong."""
        if support.reader is None:
            return cls(support)
        from octavo.vision import FetchRules

        rules = FetchRules.of_options(config.allowed_local_media_path, config.allowed_media_domains or None)
        limits = config.media_limits
        made = cls(support, limits["image"], info.max_model_len, rules, limits["video"], tokenizer)
        made.side.start()
        return made

    @property
    def text(self) -> str | None:
        """What stands for an image in a chat template that reads text alone; None where no images are read."""
        return None if self.support.reader is None else self.support.reader.text

    @property
    def video_text(self) -> str | None:
        """The same of a video."""
        return None if self.support.reader is None or self.support.videos is None else self.support.videos.text

    def take(self, request: ChatRequest | TokenizeRequest) -> list[Part]:
        """The images and videos of a request, whose messages keep their places alone: it lives as long as its answer takes.

        Raises InvalidRequest for those that are not read, and for too many.
        """
        messages = request.messages or []
        if not has_images(messages):
            return []
        if self.support.reader is None:
            raise InvalidRequest(self.support.refusal, "messages")
        from octavo.vision import image_parts, video_parts

        parts, videos = image_parts(messages, self.limit), video_parts(messages, self.videos)
        if videos and self.support.videos is None:
            raise InvalidRequest(self.support.video_refusal, videos[0].where)
        request.messages = without_images(messages)
        return [*parts, *videos]

    async def place(self, prompt: list[int], parts: list[Part]) -> tuple[list[int], tuple[PlacedImage, ...], HeldImages]:
        """The prompt with every token of its images, and the images in their places. Raises InvalidRequest for what may not be
        fetched or is no image, for more tokens than a prompt may have, and for a prompt without a place for each image.
        """
        if not parts:
            return prompt, (), HeldImages(self)
        held = HeldImages(self)
        found: dict[int, ImagePatches | VideoFrames] = {}
        waiting = iter(enumerate(parts))
        tasks = [asyncio.ensure_future(self._prepare(waiting, found, held)) for _ in parts[:AT_ONCE]]
        try:
            await asyncio.gather(*tasks)
        finally:
            while tasks:  # none is kept: its error would hold this frame, and megabytes, until the collector looks
                tasks.pop().cancel()
        ordered = [found[number] for number in range(len(parts))]
        images = [one for one in ordered if isinstance(one, ImagePatches)]
        videos = [one for one in ordered if not isinstance(one, ImagePatches)]
        return *self.support.place(prompt, images, videos, self._encode), held

    def _encode(self, text: str) -> list[int]:
        assert self._tokenizer is not None
        return self._tokenizer.encode(text, add_special_tokens=False)

    async def _prepare(
        self, waiting: Iterator[tuple[int, Part]], found: dict[int, ImagePatches | VideoFrames], held: HeldImages
    ) -> None:
        for number, part in waiting:
            found[number] = await self._patches(part)
            held.add(found[number])
            if (tokens := sum(one.tokens for one in found.values())) >= self.max_tokens:
                raise InvalidRequest(
                    f"The request's images alone have {tokens} tokens or more; at most {self.max_tokens - 1} fit beside one to "
                    "generate: send fewer, or smaller ones.",
                    "messages",
                )

    async def _patches(self, part: Part) -> ImagePatches | VideoFrames:
        from octavo.vision import ImagePart, fetch_parts, fetch_video, prepare, prepare_video

        reader, videos, rules = self.support.reader, self.support.videos, self._rules
        assert reader is not None and rules is not None  # noqa: PT018
        sent = isinstance(part.url, str) and part.url[:5].lower() == "data:"
        async with nullcontext() if sent else self._fetched:
            try:
                if isinstance(part, ImagePart):
                    (source,) = await fetch_parts([part], rules)
                    return await self.side.run("Preparing an image", prepare, source, reader.processor)
                assert videos is not None
                file = await fetch_video(part, rules)
                return await self.side.run("Preparing a video", prepare_video, file, videos.processor)
            except InvalidRequest as error:
                raise InvalidRequest(str(error), part.where) from None


def image_note(config: EngineConfig, support: ImageSupport) -> str | None:
    """What to say at start: what is wrong with the checkpoint, or which flags mean nothing to a model of text alone."""
    if support.fault:
        return f"images are refused: {support.refusal}"
    if support.video_fault and config.media_limits["video"]:
        return f"videos are refused: {support.video_refusal}"
    fields = [field for field in config_fields() if field.metadata["group"] == IMAGES]
    given = [flag_of(field.name) for field in fields if getattr(config, field.name) != field.default]
    if support != ImageSupport() or not given:
        return None
    return f"without effect, since this model reads text alone: {', '.join(given)}."
