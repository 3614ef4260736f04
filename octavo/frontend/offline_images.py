"""Images for LLM: those of `multi_modal_data` and of a chat's parts, prepared in threads of this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from octavo.config import EngineConfig
from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.image_support import image_support
from octavo.images import IMAGE_PARTS, ImagePatches
from octavo.messages import EngineInfo
from octavo.vision import FetchRules, ImageReader, fetch_parts, image_parts, prepare

__all__ = ["OfflineImages"]

Messages = Sequence[Mapping[str, Any]]
_THREADS = min(8, os.cpu_count() or 1)  # each may hold an image of 192 MiB while it is decoded
_PARAM = "multi_modal_data"


class _File(NamedTuple):
    """An image's file, or its data: URL."""

    data: bytes | str


class OfflineImages:
    """Reads the images of an LLM's prompts."""

    def __init__(self, config: EngineConfig, info: EngineInfo, rules: FetchRules):
        self._support, self._rules = image_support(config, info), rules
        self._most = config.media_limits["image"]

    @property
    def reader(self) -> ImageReader:
        """Raises OctavoError, one sentence, where no images are read."""
        if self._support.reader is not None:
            return self._support.reader
        if self._support.fault:
            raise OctavoError(self._support.refusal)
        raise InvalidRequest(self._support.refusal, _PARAM)

    def of_prompts(self, prompts: Sequence[object]) -> list[list[ImagePatches]]:
        """The images of each prompt, which is a mapping if it has any.

        Raises OctavoError, one sentence, for what is no image, for too many of them, and where none are read.
        """
        given = [_images_of(prompt) for prompt in prompts]
        if not any(given):
            return [[] for _ in prompts]
        reader = self.reader
        if (highest := max(map(len, given))) > self._most:
            raise InvalidRequest(
                f"A prompt may have {self._most} images here (limit_mm_per_prompt), and one has {highest}.", _PARAM
            )
        distinct = {id(image): image for images in given for image in images}  # no thread decodes what another one does
        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip(distinct, pool.map(lambda one: _prepared(one, reader), distinct.values()), strict=True))
        return [[found[id(image)] for image in images] for images in given]

    def of_chat(self, messages: Messages) -> tuple[list[object], str | None]:
        """The images of a chat in their order, fetched, as `of_prompts` takes them, and what stands for one in a string.

        Raises OctavoError as the server does.
        """
        parts = image_parts([_with_pictures(message) for message in messages])
        if not parts:
            return [], None
        text = self.reader.text
        if len(parts) > self._most:
            raise InvalidRequest(
                f"A chat may have {self._most} images here (limit_mm_per_prompt), and this has {len(parts)}.", "messages"
            )
        with ThreadPoolExecutor(1) as pool:  # this thread may have an event loop that runs, as in a notebook
            fetched = pool.submit(lambda: asyncio.run(fetch_parts(parts, self._rules))).result()
        return [_File(one) if isinstance(one, bytes | str) else one for one in fetched], text


def _with_pictures(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A chat's message with Pillow's images in the place of arrays."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    arrays = [isinstance(part, Mapping) and isinstance(part.get(part.get("type")), np.ndarray) for part in content]
    if not any(arrays):
        return message
    return {**message, "content": [_part(part) if array else part for part, array in zip(content, arrays, strict=True)]}


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = part["type"]
    return {"type": kind, kind: _picture(part[kind])} if kind in IMAGE_PARTS else part


def _images_of(prompt: object) -> list[object]:
    data = prompt.get(_PARAM) if isinstance(prompt, Mapping) else None
    if data is None:
        return []
    if not isinstance(data, Mapping):
        raise InvalidRequest(f"{_PARAM} must be like {{'image': image}}, not {type(data).__name__}.", _PARAM)
    if unknown := sorted(set(map(str, data)) - {"image"}):
        raise InvalidRequest(f"{_PARAM} has '{unknown[0]}', and only images are read here.", _PARAM)
    found = data.get("image")
    if found is None:
        return []
    several = isinstance(found, list) or (isinstance(found, np.ndarray) and found.ndim == 4)
    return list(found) if several else [found]


def _prepared(image: object, reader: ImageReader) -> ImagePatches:
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
