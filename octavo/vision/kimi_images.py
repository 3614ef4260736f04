"""Kimi-K2.5's images: scaled down where they have too many patches, never up, then padded to whole tokens.

Patches lie row by row, [P, 3, patch_size, patch_size]; a token is `merge_size` x `merge_size` of them. Padding is black, below
and on the right. Source: transformers' Kimi_K25ImageProcessor, whose resizing torch computes. Here Pillow does, as in the
model's own processor, and one in a hundred bytes differs by a step or two. That processor drops alpha; see decode_image.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from octavo.errors import OctavoError
from octavo.grid import Grid
from octavo.vision.patches import ImagePatches, check_steps, digest, lookup, positive, resized, triple

__all__ = ["KimiImages"]

HALVES = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class KimiImages:
    """max_patches: of an image. max_side: of a side, in patches."""

    max_patches: int = 16384
    max_side: int = 512
    patch_size: int = 14
    merge_size: int = 2
    mean: tuple[float, float, float] = HALVES
    std: tuple[float, float, float] = HALVES

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Of preprocessor_config.json: the hub's, which has its fields within `media_proc_cfg`, or transformers'.

        Raises OctavoError, naming the field, for one that is wrong.
        """
        own = config.get("media_proc_cfg")
        if isinstance(own, Mapping):
            if own.get("fixed_output_tokens") is not None:
                raise OctavoError("preprocessor_config.json: fixed_output_tokens must be null to be served.")
            config, most, side, merge = (
                own,
                "in_patch_limit",
                positive(own, "patch_limit_on_one_side", 512),
                "merge_kernel_size",
            )
        else:
            check_steps(config)
            size = config.get("size")
            sides = size if isinstance(size, Mapping) else {}
            most, side, merge = "max_patches", positive(sides, "max_height", cls.max_side), "merge_size"
            if positive(sides, "max_width", side) != side:
                raise OctavoError("preprocessor_config.json: size must have equal max_height and max_width.")
        return cls(
            max_patches=positive(config, most, cls.max_patches),
            max_side=side,
            patch_size=positive(config, "patch_size", cls.patch_size),
            merge_size=positive(config, merge, cls.merge_size),
            mean=triple(config, "image_mean", HALVES),
            std=triple(config, "image_std", HALVES),
        )

    def _size(self, rows: int, columns: int) -> tuple[int, int]:
        """In pixels, before the padding."""
        side = self.patch_size
        patches = max(1.0, rows // side) * max(1.0, columns // side)
        longest = self.max_side * side
        scale = min(1.0, math.sqrt(self.max_patches / patches), longest / rows, longest / columns)
        high, wide = (min(max(1, int(pixels * scale)), longest) for pixels in (rows, columns))
        return high, wide

    def grid(self, rows: int, columns: int) -> Grid:
        """Of an image of so many pixels, however long: its shorter side keeps a pixel at least."""
        high, wide = self._size(rows, columns)
        merged = self.patch_size * self.merge_size
        return Grid(1, -(-high // merged) * self.merge_size, -(-wide // merged) * self.merge_size)

    def tokens(self, grid: Grid) -> int:
        return grid.rows * grid.columns // self.merge_size**2  # those of a clip see all of its frames

    @cached_property
    def _values(self) -> NDArray[np.float32]:
        """[3, 256]: what a byte of each color becomes."""
        mean, std = (np.array(one, np.float32)[:, None] * np.float32(255) for one in (self.mean, self.std))
        found: NDArray[np.float32] = (np.arange(256, dtype=np.float32) - mean) / std
        return found

    def __call__(self, image: NDArray[np.uint8]) -> ImagePatches:
        """Patches [P, 3, patch_size, patch_size] of an RGB image [rows, columns, 3]."""
        grid, side = self.grid(image.shape[0], image.shape[1]), self.patch_size
        high, wide = self._size(image.shape[0], image.shape[1])
        pixels = np.zeros((grid.rows * side, grid.columns * side, 3), np.uint8)
        # Columns first, as torch does; newer Pillow chooses by the shape, and rounds to bytes between.
        pixels[:high, :wide] = resized(resized(image, image.shape[0], wide), high, wide)
        squares = pixels.reshape(grid.rows, side, grid.columns, side, 3).transpose(0, 2, 4, 1, 3)
        patches = lookup(squares.reshape(-1, 3, side * side), self._values).reshape(-1, 3, side, side)
        return ImagePatches(patches, grid, self.tokens(grid), digest(image))
