"""The layers of a vision tower from captured CUDA graphs, where they take less time than the host needs to launch them.

A graph is captured for a number of patches and takes images of any sizes: where each begins is read on the device. What patches
lack of a graph's number is a further segment, which no image attends to.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from octavo import ops
from octavo.layers.vision import EncoderInput
from octavo.models.interface import VisionModel

__all__ = ["LARGEST", "TowerGraphs"]

SIZES = (256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # patches; kernels of more take longer than their launches
LARGEST = SIZES[-1]
SEGMENTS = 16  # images or frames that a graph takes at once


class TowerGraphs:
    """Graphs of `model.encoder_layers`. `given`: its input for the images of the warm-up, whose shapes it has."""

    def __init__(self, model: VisionModel, given: EncoderInput):
        (x, rotation, segments), self._graphs = given, dict[int, tuple[Callable[[], None], Tensor]]()
        self.x = x.new_zeros(LARGEST, x.shape[1])
        cos_sin = torch.zeros(LARGEST, rotation.cos_sin.shape[1], device=x.device)
        self.rotation = ops.Rotation(cos_sin, torch.arange(LARGEST, device=x.device), rotation.interleaved)
        self.starts = segments.starts.new_zeros(SEGMENTS + 2)
        pool = None
        for size in reversed(SIZES):  # largest first, so that the smaller graphs fit into its memory pool
            rows = ops.Rotation(cos_sin[:size], self.rotation.rows[:size], rotation.interleaved)
            part = EncoderInput(self.x[:size], rows, ops.Segments(None, self.starts))
            self.starts[1:] = size
            model.encoder_layers(part)  # compiles kernels, which a capture could not
            replay, out, pool = ops.capture(partial(model.encoder_layers, part), pool)
            self._graphs[size] = replay, out

    def run(self, given: EncoderInput) -> Tensor | None:
        """What `encoder_layers` gives, with more rows behind, valid until the next call. None: no graph fits."""
        (x, rotation, segments), lengths = given, given.segments.lengths
        if lengths is None or len(x) > LARGEST or len(lengths) > SEGMENTS:
            return None
        size = SIZES[bisect_left(SIZES, len(x))]
        self.x[: len(x)].copy_(x)
        self.rotation.cos_sin[: len(x)].copy_(rotation.cos_sin)
        self.starts[: len(segments.starts)].copy_(segments.starts)
        self.starts[len(segments.starts) :] = size
        replay, out = self._graphs[size]
        replay()
        return out
