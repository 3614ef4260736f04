"""Images in: what a chat's image parts name is fetched, decoded and made into patches. By Pillow and numpy, without torch.

Fetching waits and belongs on the event loop; decoding and preprocessing compute and belong in a process of their own:
`image_parts` -> `fetch_parts` -> for each `prepare`, whose processor `image_processor` made once. Videos: see video.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image

from octavo.errors import InvalidRequest, OctavoError
from octavo.files import read_json
from octavo.images import IMAGE_PARTS, ImagePatches
from octavo.vision.decode_image import MAX_PIXELS, decode, rgb
from octavo.vision.fetch import FetchRules, decode_data_url, fetch
from octavo.vision.kimi_images import KimiImages
from octavo.vision.parts import check_number, given_parts
from octavo.vision.patches import ImageProcessor, read_config
from octavo.vision.placement import place_images
from octavo.vision.qwen_images import QwenImages
from octavo.vision.video import (
    VideoPart,
    VideoReader,
    fetch_video,
    prepare_frames,
    prepare_video,
    video_parts,
    video_reader,
)
from octavo.vision.video_placement import place_videos
from octavo.vision.video_qwen import VideoFrames

__all__ = [
    "FetchRules",
    "ImagePart",
    "ImagePatches",
    "ImageProcessor",
    "ImageReader",
    "VideoFrames",
    "VideoPart",
    "VideoReader",
    "fetch_parts",
    "fetch_video",
    "image_parts",
    "image_processor",
    "image_reader",
    "place_images",
    "place_videos",
    "prepare",
    "prepare_frames",
    "prepare_video",
    "video_parts",
    "video_reader",
]


Source = bytes | str | Image  # of an image: a file, a data: URL, a picture
_SOURCES = ("image_url", "image_pil", "image", "url")  # where a part has it


class _Family(NamedTuple):
    """make: the processor of preprocessor_config.json. placeholders: the fields of config.json that may have the token which a
    chat template writes for an image. token: where none of them is there. text: what a template writes for an image.
    """

    make: Callable[[Mapping[str, Any]], ImageProcessor]
    placeholders: tuple[str, ...]
    token: int
    text: str


_QWEN = _Family(QwenImages.from_json, ("image_token_id",), 151655, "<|vision_start|><|image_pad|><|vision_end|>")
_KIMI = _Family(
    KimiImages.from_json,
    ("media_placeholder_token_id", "image_token_id"),
    163605,
    "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
)
_FAMILIES: Mapping[str, _Family] = {"qwen3_vl": _QWEN, "qwen3_vl_moe": _QWEN, "kimi_k25": _KIMI}  # by config.json's model_type


class ImageReader(NamedTuple):
    """How a checkpoint's images are prepared, the token that stands for one in a prompt, and the text with that token, for chat
    templates that read text alone.
    """

    processor: ImageProcessor
    placeholder: int
    text: str


class ImagePart(NamedTuple):
    """url: or the picture itself, from Python. where: its place in the request, such as messages.0.content.1."""

    url: str | Image
    where: str


def image_processor(model_type: str, directory: str | Path) -> ImageProcessor:
    """Of the checkpoint in `directory`. Raises OctavoError for models without images, and for configs that are wrong."""
    if model_type not in _FAMILIES:
        raise OctavoError(f"Models of type {model_type} read no images; those that do are {', '.join(_FAMILIES)}.")
    return _FAMILIES[model_type].make(read_config(directory))


def image_reader(directory: str | Path) -> ImageReader | None:
    """Of the checkpoint in `directory`; None for a model of text alone. Raises OctavoError for configs that are wrong."""
    config = read_json(Path(directory) / "config.json") or {}
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    given = (config.get(name) for name in family.placeholders)
    token = next((one for one in given if type(one) is int), family.token)
    return ImageReader(family.make(read_config(directory)), token, family.text)


def image_parts(messages: Sequence[Mapping[str, Any]], limit: int | None = None) -> list[ImagePart]:
    """The images of a chat in their order, of parts as OpenAI's chats and responses have them, or with Pillow's images.

    Raises InvalidRequest for a part without a URL, and for more images than `limit`.
    """
    found = []
    for url, where in given_parts(messages, IMAGE_PARTS, _SOURCES):
        if not isinstance(url, str | Image):
            raise InvalidRequest(f"{where} should be like {{'type': 'image_url', 'image_url': {{'url': ...}}}}.", where)
        found.append(ImagePart(url, where))
    check_number(len(found), limit, "images")
    return found


async def fetch_parts(parts: Sequence[ImagePart], rules: FetchRules) -> list[Source]:
    """The files that parts name, in their order, fetched at once; data: URLs and pictures stay as they are, since decoding
    them computes.

    Raises InvalidRequest for the first that fails, and ends the others.
    """

    async def one(part: ImagePart) -> Source:
        if not isinstance(part.url, str) or part.url[:5].lower() == "data:":
            return part.url
        try:
            return await fetch(part.url, rules)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), part.where) from None

    tasks = [asyncio.ensure_future(one(part)) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        while tasks:  # none is kept: its error would hold this frame, and megabytes, until the collector looks
            tasks.pop().cancel()


def prepare(
    source: Source, processor: ImageProcessor, max_bytes: int = FetchRules.max_bytes, max_pixels: int = MAX_PIXELS
) -> ImagePatches:
    """What a tower reads of an image, of its file, data: URL or picture. Raises InvalidRequest, one sentence, for what is no
    image that can be read.
    """
    if isinstance(source, Image):
        return processor(rgb(source, max_pixels))
    data = decode_data_url(source, max_bytes) if isinstance(source, str) else source
    return processor(decode(data, max_pixels))
