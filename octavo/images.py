"""Images between the processes: the API process makes an image's patches, the engine's vision tower reads them.

Pixels stay bytes until they are on the device: a 1024 x 1024 image is 3 MB so, and 25 MB as FP32 values of a tower's input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["IMAGE_PARTS", "VIDEO_PARTS", "Grid", "ImagePatches", "PlacedImage"]

# Types of a message's parts that are images: of OpenAI's chats and responses, transformers' own, and of vLLM's LLM.chat.
IMAGE_PARTS = ("image_url", "input_image", "image", "image_pil")
VIDEO_PARTS = ("video_url", "video")


class Grid(NamedTuple):
    """An image or clip in patches: so many frames, rows and columns."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.frames * self.rows * self.columns


class ImagePatches(NamedTuple):
    """An image as a vision tower reads it.

    pixels: uint8 [P, 3, F, S], the bytes of the P patches of `grid`, in the order that the family's tower reads; S pixels a
    frame. values: FP32 [3, 256], what a byte of each color becomes (rescaling and normalization). frames: of a patch, where the
    tower reads several at once: F of them, or F is 1 and the one is repeated. tokens: of the prompt, that the image takes.
    digest: 32 bytes, cryptographic, equal for equal pixels and grid.
    """

    pixels: NDArray[np.uint8]
    values: NDArray[np.float32]
    frames: int
    grid: Grid
    tokens: int
    digest: bytes


class PlacedImage(NamedTuple):
    """An image whose tokens are [start, stop) of a prompt."""

    start: int
    image: ImagePatches

    @property
    def stop(self) -> int:
        return self.start + self.image.tokens
