"""A file's bytes -> an RGB image, by Pillow; what cannot be decoded gets one sentence.

Transparent pixels are laid over white, as transformers' and vLLM's processors do (`Image.convert` would show whatever colors
the file keeps where nothing is to be seen). EXIF's orientation is applied; color profiles are not, as in the references. Pixels
of 16 bits keep their high byte, gray and color alike. Of an animation the first frame is taken.
"""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from octavo.errors import InvalidRequest

__all__ = ["FORMATS", "MAX_PIXELS", "decode", "rgb"]

# Some of Pillow's other formats start programs or are hardly ever looked at by anyone who mends decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 64 << 20  # the largest cameras of phones but a few; 192 MiB as RGB
_ORIENTATION = 0x0112


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """[rows, columns, 3]. Raises InvalidRequest; for more than `max_pixels` before any of them is decoded."""
    if not data:
        raise InvalidRequest("An image has no bytes at all.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that does not matter; the limit of pixels is ours
        return rgb(_opened(data), max_pixels)


def _opened(data: bytes) -> Image.Image:
    """Only the header is read here."""
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:  # twice Pillow's own limit
        raise InvalidRequest("An image has far too many pixels; make it smaller.") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS[:-1]) + f" and {FORMATS[-1]}"
        raise InvalidRequest(f"An image's bytes are of no format that is read here, or damaged; known are {known}.") from None
    except Exception as error:  # damaged headers make Pillow's decoders raise errors of many kinds
        raise _damaged(error) from None


def rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """[rows, columns, 3] of a Pillow image, turned as EXIF says. Raises InvalidRequest as `decode` does."""
    columns, rows = image.size
    if columns * rows > max_pixels:
        raise InvalidRequest(f"An image has {columns} x {rows} pixels; at most {max_pixels:,} are decoded: make it smaller.")
    try:
        image.load()
        converted = _converted(_upright(image))
    except InvalidRequest:
        raise
    except Exception as error:  # as above
        raise _damaged(error) from None
    return np.array(converted)


def _damaged(error: Exception) -> InvalidRequest:
    detail = (str(error).strip() or type(error).__name__).splitlines()[0][:100].rstrip(".")
    return InvalidRequest(f"An image is damaged or cut off ({detail}); send it again.")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF does not say which way is up, and harms no pixel
        return image


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InvalidRequest("An image has pixels of 32 bits, whose range is not known; send it with 8 or 16 bits.")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        white.alpha_composite(seen)
        return white.convert("RGB")
    return image.convert("RGB")
