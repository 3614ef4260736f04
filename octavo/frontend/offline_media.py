"""Images and videos for LLM: those of `multi_modal_data` and of a chat's parts, prepared in threads of this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from octavo.config import EngineConfig
from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.image_support import image_support
from octavo.images import IMAGE_PARTS, ImagePatches, PlacedImage
from octavo.messages import EngineInfo
from octavo.vision import (
    FetchRules,
    ImageReader,
    VideoFrames,
    VideoReader,
    fetch_parts,
    fetch_video,
    image_parts,
    prepare,
    prepare_frames,
    prepare_video,
    video_parts,
)
from octavo.vision.decode_image import rgb

__all__ = ["OfflineMedia", "PromptMedia"]

Messages = Sequence[Mapping[str, Any]]
_THREADS = min(8, os.cpu_count() or 1)  # each may hold an image of 192 MiB while it is decoded
_PARAM = "multi_modal_data"
_CLOCK = ("fps", "do_sample_frames", "frames_indices")  # of vLLM's metadata of a video, what is read
_UNREAD = ("total_num_frames", "duration", "video_backend", "width", "height")


class _File(NamedTuple):
    """The file of an image or video, or its data: URL."""

    data: bytes | str


class PromptMedia(NamedTuple):
    """A prompt's images and videos, in their order."""

    images: Sequence[ImagePatches] = ()
    videos: Sequence[VideoFrames] = ()


class OfflineMedia:
    """Reads the images and videos of an LLM's prompts."""

    def __init__(self, config: EngineConfig, info: EngineInfo, rules: FetchRules):
        self._support, self._rules = image_support(config, info), rules
        self._limits = config.media_limits

    def _reader(self) -> ImageReader:
        """Raises OctavoError, one sentence, where no images are read."""
        if self._support.reader is not None:
            return self._support.reader
        raise (OctavoError if self._support.fault else InvalidRequest)(self._support.refusal)

    def _video_reader(self) -> VideoReader:
        self._reader()
        if self._support.videos is None:
            if self._support.video_fault:
                raise OctavoError(self._support.video_refusal)
            raise InvalidRequest(self._support.video_refusal, _PARAM)
        return self._support.videos

    def _check_number(self, kind: str, number: int) -> None:
        if number > (most := self._limits[kind]):
            raise InvalidRequest(f"A prompt may have {most} {kind}s here (limit_mm_per_prompt), and one has {number}.", _PARAM)

    def of_prompts(self, prompts: Sequence[object]) -> list[PromptMedia]:
        """The images and videos of each prompt, which is a mapping if it has any.

        Raises OctavoError, one sentence, for what is neither, for too many of them, and where none are read.
        """
        images, videos = ([_given(prompt, kind) for prompt in prompts] for kind in ("image", "video"))
        if not any(images) and not any(videos):
            return [PromptMedia()] * len(prompts)
        work: dict[int, Callable[[], ImagePatches | VideoFrames]] = {}  # no thread decodes what another one does
        if any(images):
            reader = self._reader()
            self._check_number("image", max(map(len, images)))
            work |= {id(one): lambda one=one: _image(one, reader) for given in images for one in given}  # type: ignore[misc]
        if any(videos):
            of_videos = self._video_reader()
            self._check_number("video", max(map(len, videos)))
            work |= {id(one): lambda one=one: _video(one, of_videos) for given in videos for one in given}  # type: ignore[misc]
        with ThreadPoolExecutor(_THREADS) as pool:
            found: dict[int, Any] = dict(zip(work, pool.map(lambda task: task(), work.values()), strict=True))
        per_prompt = zip(images, videos, strict=True)
        return [PromptMedia([found[id(one)] for one in some], [found[id(one)] for one in more]) for some, more in per_prompt]

    def place(
        self, prompt: list[int], media: PromptMedia, encode: Callable[[str], list[int]]
    ) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """As ImageSupport.place."""
        return self._support.place(prompt, media.images, media.videos, encode)

    def of_chat(self, messages: Messages) -> tuple[dict[str, list[object]], dict[str, str | None]]:
        """The images and videos of a chat in their order, fetched, as a prompt's `multi_modal_data`, and how the chat is to be
        rendered with them.

        Raises OctavoError as the server does.
        """
        images, videos = image_parts([_with_pictures(message) for message in messages]), video_parts(messages)
        how: dict[str, str | None] = {}
        if images:
            how["image_text"] = self._reader().text
            self._check_number("image", len(images))
        if videos:
            how["video_text"] = self._video_reader().text
            self._check_number("video", len(videos))
        if not how:
            return {}, how

        async def fetched() -> list[list[object]]:
            files = [await fetch_video(one, self._rules) if isinstance(one.url, str) else one.url for one in videos]
            return [list(await fetch_parts(images, self._rules)), files]

        with ThreadPoolExecutor(1) as pool:  # this thread may have an event loop that runs, as in a notebook
            found = pool.submit(lambda: asyncio.run(fetched())).result()
        wrapped = ([_File(one) if isinstance(one, bytes | str) else one for one in some] for some in found)
        return dict(zip(("image", "video"), wrapped, strict=True)), how


def _with_pictures(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A chat's message with Pillow's images in the place of arrays."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part(part) for part in content]}


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in IMAGE_PARTS and isinstance(part.get(kind), np.ndarray):
        return {"type": kind, kind: _picture(part[kind])}
    return part


def _given(prompt: object, kind: str) -> list[object]:
    """A prompt's images, or videos."""
    data = prompt.get(_PARAM) if isinstance(prompt, Mapping) else None
    if data is None:
        return []
    if not isinstance(data, Mapping):
        raise InvalidRequest(f"{_PARAM} must be like {{'image': image}}, not {type(data).__name__}.", _PARAM)
    if unknown := sorted(set(map(str, data)) - {"image", "video"}):
        raise InvalidRequest(f"{_PARAM} has '{unknown[0]}', and only images and videos are read here.", _PARAM)
    found = data.get(kind)
    if found is None:
        return []
    if isinstance(found, np.ndarray):
        return list(found) if found.ndim == (4 if kind == "image" else 5) else [found]
    several = isinstance(found, list) and (kind == "image" or not found or not all(map(_is_frame, found)))
    return list(found) if several else [found]


def _is_frame(one: object) -> bool:
    return isinstance(one, Image.Image) or (isinstance(one, np.ndarray) and one.ndim == 3)


def _image(image: object, reader: ImageReader) -> ImagePatches:
    return prepare(image.data if isinstance(image, _File) else _picture(image), reader.processor)


def _picture(image: object) -> Image.Image:
    """Raises InvalidRequest for what is neither a picture of PIL nor an array of one."""
    if isinstance(image, Image.Image):
        if not all(image.size):
            raise InvalidRequest("An image has no pixels.", _PARAM)
        return image
    told = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return Image.fromarray(np.ascontiguousarray(image))
        told = f"an array {image.dtype} {list(image.shape)}"
    raise InvalidRequest(f"An image must be of PIL, or a numpy array uint8 [rows, columns, 3], not {told}.", _PARAM)


def _video(video: object, reader: VideoReader) -> VideoFrames:
    if isinstance(video, _File):
        return prepare_video(video.data, reader.processor)
    clock: Mapping[str, Any] = {}
    if isinstance(video, tuple) and len(video) == 2 and isinstance(video[1], Mapping):
        video, clock = video
    if unknown := sorted(set(map(str, clock)).difference(_CLOCK, _UNREAD)):
        raise InvalidRequest(f"A video's '{unknown[0]}' is not known; known are {', '.join(_CLOCK)}.", _PARAM)
    frames = _frames(video)
    numbers = None  # frames are chosen here
    if clock.get("do_sample_frames") is False:
        given = clock.get("frames_indices")
        try:
            numbers = [int(number) for number in (range(len(frames)) if given is None else given)]
        except (TypeError, ValueError):
            raise InvalidRequest("A video's frames_indices must be a list of integers.", _PARAM) from None
    return prepare_frames(frames, reader.processor, clock.get("fps"), numbers)


def _frames(video: object) -> Sequence[NDArray[np.uint8]]:
    """Raises InvalidRequest for what is not frames, RGB."""
    if isinstance(video, np.ndarray) and video.ndim == 4 and len(video):
        _picture(video[0])
        return list(video)
    if isinstance(video, list) and video and all(map(_is_frame, video)):
        return [rgb(_picture(frame)) for frame in video]
    told = f"an array {video.dtype} {list(video.shape)}" if isinstance(video, np.ndarray) else type(video).__name__
    raise InvalidRequest(
        f"A video must be a list of images, or a numpy array uint8 [frames, rows, columns, 3], not {told}.", _PARAM
    )
