"""What image processors share: reading their config, resizing, and digests.

Sizes are (rows, columns) here; Pillow's are (columns, rows).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from octavo import files
from octavo.errors import OctavoError
from octavo.images import Grid, ImagePatches

__all__ = [
    "FILE",
    "ImageProcessor",
    "check_steps",
    "digest",
    "positive",
    "read_config",
    "resized",
    "triple",
]


class ImageProcessor(Protocol):
    """One family's preprocessing."""

    def grid(self, rows: int, columns: int) -> Grid:
        """Of an image of so many pixels. Raises InvalidRequest for a shape that the family does not read."""

    def tokens(self, grid: Grid) -> int:
        """Of the prompt, that an image takes."""

    def __call__(self, image: NDArray[np.uint8]) -> ImagePatches:
        """Of an RGB image [rows, columns, 3]. Raises InvalidRequest as `grid` does."""


FILE = "preprocessor_config.json"  # in sentences about a wrong field


def digest(image: NDArray[np.uint8]) -> bytes:
    """32 bytes, cryptographic: equal digests are taken for equal images, across users."""
    found = hashlib.sha256(np.array(image.shape, "<i8").tobytes())
    found.update(np.ascontiguousarray(image).data)  # no copies, which of a photograph would be hundreds of megabytes
    return found.digest()


def resized(image: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    """Bicubic, antialiased, in Pillow's fixed point."""
    if image.shape[:2] == (rows, columns):
        return image
    return np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))


def read_config(directory: str | Path) -> Mapping[str, Any]:
    """The image processor's config of a checkpoint: preprocessor_config.json, or its part of the newer processor_config.json.
    Raises OctavoError where there is neither.
    """
    old, new = (Path(directory) / name for name in ("preprocessor_config.json", "processor_config.json"))
    config = files.read_json(old)
    if config is None:
        config = (files.read_json(new) or {}).get("image_processor")
    if not isinstance(config, Mapping):
        raise OctavoError(f"{old} is missing, and images cannot be prepared without it; download it with the checkpoint.")
    return config


def positive(config: Mapping[str, Any], name: str, default: int, file: str = FILE) -> int:
    """A field that is an integer over 0; `default` where it is not there. Raises OctavoError for another value."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise OctavoError(f"{file}: {name} must be an integer over 0, not {value!r}.")
    return value


def triple(config: Mapping[str, Any], name: str, default: Sequence[float], file: str = FILE) -> tuple[float, float, float]:
    """A field with a number for each of the three colors; `default` where it is not there. Raises OctavoError otherwise."""
    value = config.get(name)
    value = default if value is None else value
    if not (isinstance(value, list | tuple) and len(value) == 3 and all(type(one) in (int, float) for one in value)):
        raise OctavoError(f"{file}: {name} must be a list of three numbers, not {value!r}.")
    if name == "image_std" and 0 in value:
        raise OctavoError(f"{file}: image_std must not be 0.")
    return value[0], value[1], value[2]


def check_steps(config: Mapping[str, Any], file: str = FILE) -> None:
    """Raises OctavoError where the config asks for other steps than the model's processor has: its tower learned on those."""
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
    for name, value in wanted.items():
        found = config.get(name)
        if found is not None and found != value:
            raise OctavoError(f"{file}: {name} must be {value} to be served, not {found!r}.")
    factor = config.get("rescale_factor")
    if factor is not None and not (type(factor) is float and abs(factor * 255 - 1) < 1e-6):
        raise OctavoError(f"{file}: rescale_factor must be 1/255 to be served, not {factor!r}.")
