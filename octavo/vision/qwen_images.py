"""Qwen's images (Qwen2-VL to Qwen3-VL): scaled so that both sides are multiples of a token's, and all pixels within bounds.

A token is `merge_size` x `merge_size` patches, which lie one behind the other. A patch's values are its colors, frames, rows
and columns, [3, temporal_patch_size, patch_size, patch_size]; an image is repeated in each frame. Source: transformers'
Qwen2VLImageProcessorPil, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from octavo.errors import InvalidRequest, OctavoError
from octavo.grid import Grid
from octavo.vision.patches import ImagePatches, check_steps, digest, lookup, positive, resized, triple

__all__ = ["QwenImages"]

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, where the config names none
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_RATIO = 200


@dataclass(frozen=True, kw_only=True)
class QwenImages:
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Of preprocessor_config.json, whose newer `size` has the bounds as `shortest_edge` and `longest_edge`, of pixels.

        Raises OctavoError, naming the field, for one that is wrong.
        """
        check_steps(config)
        size = config.get("size")
        bounds = size if isinstance(size, Mapping) else {}
        least = positive(bounds, "shortest_edge", cls.min_pixels)
        most = positive(bounds, "longest_edge", cls.max_pixels)
        made = cls(
            min_pixels=positive(config, "min_pixels", least),
            max_pixels=positive(config, "max_pixels", most),
            patch_size=positive(config, "patch_size", cls.patch_size),
            temporal_patch_size=positive(config, "temporal_patch_size", cls.temporal_patch_size),
            merge_size=positive(config, "merge_size", cls.merge_size),
            mean=triple(config, "image_mean", MEAN),
            std=triple(config, "image_std", STD),
        )
        if made.min_pixels > made.max_pixels:
            raise OctavoError("preprocessor_config.json: the fewest pixels of an image must not be more than the most.")
        return made

    @property
    def factor(self) -> int:
        """A token's side in pixels."""
        return self.patch_size * self.merge_size

    def grid(self, rows: int, columns: int) -> Grid:
        """Of an image of so many pixels. Raises InvalidRequest for one more than 200 times as long as it is wide."""
        if max(rows, columns) > MAX_RATIO * min(rows, columns):
            raise InvalidRequest(
                f"An image of {columns} x {rows} pixels is more than {MAX_RATIO} times as long as it is wide, which this model "
                "does not read; cut it into parts."
            )
        factor = self.factor
        high, wide = (round(side / factor) * factor for side in (rows, columns))
        if high * wide > self.max_pixels:
            shrink = math.sqrt(rows * columns / self.max_pixels)
            high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (rows, columns))
        elif high * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (rows * columns))
            high, wide = (math.ceil(side * grow / factor) * factor for side in (rows, columns))
        return Grid(1, high // self.patch_size, wide // self.patch_size)

    def tokens(self, grid: Grid) -> int:
        return grid.frames * grid.rows * grid.columns // self.merge_size**2

    @cached_property
    def _values(self) -> NDArray[np.float32]:
        """[3, 256]: what a byte of each color becomes."""
        scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(one, np.float32)[:, None] for one in (self.mean, self.std))
        found: NDArray[np.float32] = (scaled - mean) / std
        return found

    def __call__(self, image: NDArray[np.uint8]) -> ImagePatches:
        """Patches [P, 3 * temporal_patch_size * patch_size**2] of an RGB image [rows, columns, 3]."""
        grid = self.grid(image.shape[0], image.shape[1])
        side, merge = self.patch_size, self.merge_size
        pixels = resized(image, grid.rows * side, grid.columns * side)
        squares = pixels.reshape(grid.rows // merge, merge, side, grid.columns // merge, merge, side, 3)
        squares = squares.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, side * side)
        patches = lookup(squares, self._values, self.temporal_patch_size)
        return ImagePatches(patches.reshape(len(patches), -1), grid, self.tokens(grid), digest(image))
