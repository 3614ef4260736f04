"""The shape of an image or clip in patches, which the API process tells and models read."""

from typing import NamedTuple

__all__ = ["Grid"]


class Grid(NamedTuple):
    """An image or clip in patches: so many frames, rows and columns."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.frames * self.rows * self.columns
