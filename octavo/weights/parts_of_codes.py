"""One tensor for the FP8 codes of a weight whose parts (q, k, v) are quantized as they are read.

It is made before its parts' values are, and where these are large, when the device has nothing of an earlier weight left: a
caching allocator would put codes into a part of what values have left, and could then give back no more of it. So lost
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
        self._rows, self._platform, self._start, self._all = [n for n, _ in parts], platform, 0, True

    def next(self, found: Tensor | QTensor, scheme: Scheme) -> Tensor | None:
        """Memory for the codes of the next part, of which `found` was read; None if it gets none."""
        start, self._start = self._start, self._start + self._rows.pop(0)
        self._all = self._all and isinstance(found, Tensor) and scheme.dtype is WeightDType.FP8
        if not self._all or isinstance(found, QTensor):
            self.whole = None
            return None
        if self.whole is None:
            rows = self._start + sum(self._rows)
            self.whole = found.new_empty(rows, found.shape[1], dtype=self._platform.fp8_dtype)
        return self.whole[start : self._start]


def part_of(shape: tuple[int, int], shard: Shard) -> tuple[int, int]:
    """The shape of a rank's part of a matrix."""
    part = shard.slice(shape[shard.dim])
    n, k = (part.stop - part.start if dim == shard.dim else size for dim, size in enumerate(shape))
    return n, k
