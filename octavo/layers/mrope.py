"""Multimodal rotary embedding (MRoPE): a token's three positions, in time, rows and columns. Source: arXiv:2511.21631."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.images import Grid

__all__ = ["image_positions", "rotary_rows"]


def image_positions(images: Sequence[tuple[int, Grid]], merge: int, start: int, stop: int) -> Tensor:
    """int64 [3, stop - start]: positions in time, rows and columns of a request's tokens [start, stop).

    Text counts on by one a token. An image's tokens, of `merge` x `merge` patches, share the time of its first and count rows
    and columns on from it; the text behind goes on after the larger of both.
    """
    found = torch.empty(3, stop - start, dtype=torch.int64)
    done, delta = start, 0  # tokens before `done` have their positions; position minus index of the text behind the last image
    for first, grid in images:
        rows, columns = grid.rows // merge, grid.columns // merge
        low, high = max(first, start), min(first + rows * columns, stop)
        if low < high:
            found[:, done - start : low - start] = torch.arange(done, low) + delta
            inside = torch.arange(low - first, high - first)
            own = torch.stack([torch.zeros_like(inside), inside // columns, inside % columns])
            found[:, low - start : high - start] = own + first + delta
            done = high
        elif first >= stop:
            break
        delta += max(rows, columns) - rows * columns
    found[:, done - start :] = torch.arange(done, stop) + delta
    return found


def rotary_rows(table: Tensor, positions: Tensor, sections: Sequence[int]) -> Tensor:
    """FP32 [T, R]: each token's cosines and sines, of the rows of `table` at its `positions`, int64 [3, T].

    Of each three pairs of a head, one is rotated by time, one by the row, one by the column, as far as the sections of rows and
    columns reach; further pairs are rotated by time.
    """
    places = torch.arange(table.shape[1], device=table.device)
    pair = places % (table.shape[1] // 2)
    axis = torch.zeros_like(pair)
    for number in (1, 2):
        axis[(pair % 3 == number) & (pair < 3 * sections[number])] = number
    return table[positions.to(table.device, non_blocking=True)[axis].T, places]
