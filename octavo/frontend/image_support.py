"""Whether an engine's images are read, and how. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.messages import EngineInfo

if TYPE_CHECKING:
    from octavo.vision import ImageReader

__all__ = ["ImageSupport", "image_support"]

_TEXT_ALONE = "This model reads text alone; leave images out."
_SWITCHED_OFF = "Images are switched off here (--language-model-only or --limit-mm-per-prompt); send text alone."


class ImageSupport(NamedTuple):
    """reader: how images are read; None where they are not. refusal: why not, in a sentence. fault: whether something is wrong
    with the checkpoint, which whoever starts the engine should hear.
    """

    reader: ImageReader | None = None
    refusal: str = _TEXT_ALONE
    fault: bool = False


def image_support(config: EngineConfig, info: EngineInfo) -> ImageSupport:
    """Of a loaded engine. A model of text alone costs no import of Pillow."""
    if not info.image_tokens and config.reads_images:
        return ImageSupport()
    from octavo.vision import image_reader

    reader, wrong = None, None
    try:
        reader = image_reader(config.model)
    except OctavoError as error:
        wrong = str(error)
    if reader is None and wrong is None:
        return ImageSupport()
    if not info.image_tokens:
        return ImageSupport(refusal=_SWITCHED_OFF)
    return ImageSupport(reader, wrong or "", fault=wrong is not None)
