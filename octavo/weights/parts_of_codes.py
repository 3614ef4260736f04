"""One tensor for the FP8 codes of a weight whose parts (q, k, v) are quantized as they are read.

It is made once the values of its first part are there, and where it is large, after the device got back what earlier weights
have left: a caching allocator would put codes into a part of that, and could then give back no more of it. So lost
Llama-3.1-405B a tenth of its weights' size on each of four ranks (bench/LOG.md, "Four H200s").
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from octavo.platform import Platform
from octavo.quant import QTensor, Scheme
from octavo.quant.formats import Shard
from octavo.quant.scheme import WeightDType

__all__ = ["PartsOfCodes", "part_of"]

LARGE = 1 << 26  # values, of a weight before which freed memory goes back: giving it back waits for the device


class PartsOfCodes:
    """Hands out the memory of each of `parts` [N, K], in their order. whole: all of it, once the last part was asked for; None
    where one is stored in codes already, or not quantized."""

    def __init__(self, parts: Sequence[tuple[int, int]], platform: Platform):
        if not platform.is_cpu and sum(map(prod, parts)) >= LARGE:
            platform.release()
        self.whole: Tensor | None = None
        self._shape, self._platform = (sum(n for n, _ in parts), parts[0][1]), platform
        self._start, self._apart = 0, False  # the next part's first row; whether a part has memory of its own

    def next(self, found: Tensor | QTensor, scheme: Scheme) -> Tensor | None:
        """Memory for the codes of the next part, of which `found` was read; None if it gets none."""
        if self._apart or isinstance(found, QTensor) or scheme.dtype is not WeightDType.FP8:
            self.whole, self._apart = None, True
            return None
        if self.whole is None:
            self.whole = found.new_empty(self._shape, dtype=self._platform.fp8_dtype)
        start, self._start = self._start, self._start + len(found)
        return self.whole[start : self._start]


def part_of(shape: tuple[int, int], shard: Shard) -> tuple[int, int]:
    """The shape of a rank's part of a matrix."""
    part = shard.slice(shape[shard.dim])
    n, k = (part.stop - part.start if dim == shard.dim else size for dim, size in enumerate(shape))
    return n, k
