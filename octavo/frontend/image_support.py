"""Whether an engine's images and videos are read, and how. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.images import ImagePatches, PlacedImage
from octavo.messages import EngineInfo

if TYPE_CHECKING:
    from octavo.vision import ImageReader, VideoFrames, VideoReader

__all__ = ["ImageSupport", "image_support"]

_TEXT_ALONE = "This model reads text alone; leave images out."
_SWITCHED_OFF = "Images are switched off here (--language-model-only or --limit-mm-per-prompt); send text alone."
_NO_VIDEOS = "This model's videos are not read here; send some of the frames as images."


class ImageSupport(NamedTuple):
    """reader: how images are read; None where they are not. refusal: why not, in a sentence. fault: whether something is wrong
    with the checkpoint, which whoever starts the engine should hear. videos, video_refusal, video_fault: the same of videos.
    """

    reader: ImageReader | None = None
    refusal: str = _TEXT_ALONE
    fault: bool = False
    videos: VideoReader | None = None
    video_refusal: str = _NO_VIDEOS
    video_fault: bool = False

    def place(
        self,
        prompt: list[int],
        images: Sequence[ImagePatches],
        videos: Sequence[VideoFrames],
        encode: Callable[[str], list[int]],
    ) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """The prompt with every token of its images and videos, and where they are. `encode`: without special tokens.

        Raises InvalidRequest for a prompt without a place for each.
        """
        placed: tuple[PlacedImage, ...] = ()
        if images or videos:
            from octavo.vision import place_images, place_videos

            if images and self.reader is not None:
                prompt, placed = place_images(prompt, images, self.reader.placeholder)
            if videos and self.videos is not None:
                prompt, placed = place_videos(prompt, videos, self.videos.tokens, encode, placed)
        return prompt, placed


def image_support(config: EngineConfig, info: EngineInfo) -> ImageSupport:
    """Of a loaded engine. A model of text alone costs no import of Pillow."""
    if not info.image_tokens and config.reads_images:
        return ImageSupport()
    from octavo.vision import image_reader, video_reader

    reader, wrong = None, None
    try:
        reader = image_reader(config.model)
    except OctavoError as error:
        wrong = str(error)
    if reader is None and wrong is None:
        return ImageSupport()
    if not info.image_tokens:
        return ImageSupport(refusal=_SWITCHED_OFF)
    made = ImageSupport(reader, wrong or "", fault=wrong is not None)
    try:
        return made._replace(videos=video_reader(config.model))
    except OctavoError as error:
        return made._replace(video_refusal=str(error), video_fault=True)
