"""Qwen3-VL's videos: frames are sampled by time, and every `temporal_patch_size` of them are read as one image.

All frames are of one size, so that their pixels together are within bounds. Source: transformers' Qwen3VLVideoProcessor and
Qwen3VLProcessor, whose resizing torch computes. Here Pillow does, and a few bytes in a hundred differ by a step or two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from octavo.errors import InvalidRequest, OctavoError
from octavo.images import Grid, ImagePatches
from octavo.vision.patches import check_steps, digest, positive, resized, triple

__all__ = ["QwenVideos", "VideoFrames"]

HALVES = (0.5, 0.5, 0.5)
MAX_RATIO = 200
DEFAULT_FPS = 24.0  # of frames without a clock


class VideoFrames(NamedTuple):
    """A video as a model reads it: groups of frames, each an image, and the time of each in seconds."""

    images: tuple[ImagePatches, ...]
    seconds: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Of the images alone."""
        return sum(image.tokens for image in self.images)


@dataclass(frozen=True, kw_only=True)
class QwenVideos:
    """min_pixels, max_pixels: of all frames together. frame_tokens: the most of a frame, where the config caps them."""

    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    frame_tokens: int | None = None
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = HALVES
    std: tuple[float, float, float] = HALVES
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    @classmethod
    def from_json(cls, config: Mapping[str, Any], file: str = "video_preprocessor_config.json") -> Self:
        """Of the config in `file`. Raises OctavoError, naming the field, for one that is wrong."""
        check_steps(config, file)
        number, colors = partial(positive, file=file), partial(triple, file=file)
        for name, value in {"do_sample_frames": True, "num_frames": None}.items():
            if config.get(name, value) not in (value, None):
                raise OctavoError(f"{file}: {name} must be {value} to be served, not {config[name]!r}.")
        size = config.get("size")
        bounds = size if isinstance(size, Mapping) else {}
        fps = config.get("fps") or cls.fps
        if type(fps) not in (int, float) or not 0 < fps < math.inf:
            raise OctavoError(f"{file}: fps must be a number over 0, not {fps!r}.")
        made = cls(
            min_pixels=number(bounds, "shortest_edge", cls.min_pixels),
            max_pixels=number(bounds, "longest_edge", cls.max_pixels),
            frame_tokens=number(config, "max_video_tokens", 768) if config.get("cap_pixels_per_frame") else None,
            patch_size=number(config, "patch_size", cls.patch_size),
            temporal_patch_size=number(config, "temporal_patch_size", cls.temporal_patch_size),
            merge_size=number(config, "merge_size", cls.merge_size),
            mean=colors(config, "image_mean", HALVES),
            std=colors(config, "image_std", HALVES),
            fps=float(fps),
            min_frames=number(config, "min_frames", cls.min_frames),
            max_frames=number(config, "max_frames", cls.max_frames),
        )
        if made.min_pixels > made.max_pixels or made.min_frames > made.max_frames:
            raise OctavoError(f"{file}: the fewest pixels or frames must not be more than the most.")
        return made

    def sample(self, frames: int, fps: float) -> list[int]:
        """The numbers of the frames to read, of so many with so many a second."""
        wanted = min(max(int(frames / fps * self.fps), self.min_frames), self.max_frames, frames)
        return [int(one) for one in np.linspace(0, frames - 1, wanted).round()]

    def grid(self, frames: int, rows: int, columns: int) -> Grid:
        """Of each group of frames, of a video of so many and of so many pixels. Raises InvalidRequest for one more than 200
        times as long as it is wide.
        """
        factor, step = self.patch_size * self.merge_size, self.temporal_patch_size
        if rows < factor or columns < factor:
            grow = max(factor / rows, factor / columns)
            rows, columns = int(rows * grow), int(columns * grow)
        if max(rows, columns) > MAX_RATIO * min(rows, columns):
            raise InvalidRequest(
                f"A video of {columns} x {rows} pixels is more than {MAX_RATIO} times as long as it is wide, which this model "
                "does not read; cut it into parts."
            )
        most = self.max_pixels
        if self.frame_tokens is not None:
            even = min(self.frame_tokens * factor**2, self.max_pixels // frames)
            most = frames * max(even, int(self.min_pixels * 1.05))
        high, wide = (round(side / factor) * factor for side in (rows, columns))
        pixels = round(frames / step) * step * high * wide
        if pixels > most:
            shrink = math.sqrt(frames * rows * columns / most)
            high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (rows, columns))
        elif pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (frames * rows * columns))
            high, wide = (math.ceil(side * grow / factor) * factor for side in (rows, columns))
        return Grid(1, high // self.patch_size, wide // self.patch_size)

    @cached_property
    def _values(self) -> NDArray[np.float32]:
        """[3, 256]: what a byte of each color becomes."""
        mean, std = (np.array(one, np.float32)[:, None] * np.float32(255) for one in (self.mean, self.std))
        found: NDArray[np.float32] = (np.arange(256, dtype=np.float32) - mean) / std
        return found

    def __call__(self, frames: Iterable[NDArray[np.uint8]], numbers: Sequence[int], fps: float) -> VideoFrames:
        """Of RGB frames [rows, columns, 3], one for each of `numbers`, which are their places in a video of `fps` a second.

        Raises InvalidRequest as `grid` does.
        """
        given = iter(frames)
        first, step = next(given), self.temporal_patch_size
        # One frame is a pair of equals: transformers refuses it, and reads every other odd number so.
        grid = self.grid(max(len(numbers), step), first.shape[0], first.shape[1])
        high, wide = grid.rows * self.patch_size, grid.columns * self.patch_size
        images, group = list[ImagePatches](), list[NDArray[np.uint8]]()
        for frame in chain([first], given):
            # Columns first, as torch does; newer Pillow chooses by the shape, and rounds to bytes between.
            group.append(resized(resized(frame, frame.shape[0], wide), high, wide))
            if len(group) == step:
                images.append(self._image(np.stack(group), grid))
                group = []
        if group:
            images.append(self._image(np.stack(group + group[-1:] * (step - len(group))), grid))
        last = len(numbers) - 1
        times = [numbers[min(at, last)] / fps for at in range(len(images) * step)]
        return VideoFrames(tuple(images), tuple((times[at] + times[at + step - 1]) / 2 for at in range(0, len(times), step)))

    def _image(self, frames: NDArray[np.uint8], grid: Grid) -> ImagePatches:
        side, merge, count = self.patch_size, self.merge_size, len(frames)
        squares = frames.reshape(count, grid.rows // merge, merge, side, grid.columns // merge, merge, side, 3)
        squares = squares.transpose(1, 4, 2, 5, 7, 0, 3, 6).reshape(-1, 3, count, side * side)
        return ImagePatches(squares, self._values, count, grid, grid.patches // merge**2, digest(frames))
