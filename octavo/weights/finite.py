"""Checks that a checkpoint's values are finite, once for every tensor that is read.

NaN and infinity reach every logit, and then the model returns an empty answer that looks valid. The check is one pass at
memory speed: the minimum and maximum of a tensor, which are NaN if any value is. On a CPU the result is read at once; on a
device all results are read at the end, so that no read waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from octavo.errors import OctavoError

__all__ = ["SCALES_OF_CACHES", "FiniteCheck"]

AGAIN = "download it again, or convert it anew from the original weights."
AT_ONCE = frozenset({"cpu"})  # devices whose results are read without waiting
SCALES_OF_CACHES = ("k_scale", "v_scale", "kv_scale", "output_scale")
SCALES_OF_WEIGHTS = ("weight_scale", "weight_scale_inv")
# Codes from here on are NaN or infinity; the magnitude is the lower seven bits.
FIRST_NON_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
# Norms and attention square values in FP32, and a code is up to 448. The limit is 4e16; scales of real models are below 1.
# 0 is allowed, because some tools write it for zeros.
LARGEST_OF_WEIGHT = math.sqrt(torch.finfo(torch.float32).max) / 448
# Keys and values are clamped at 448 times the scale. For a layer of zeros, tools write 1e-12 or more.
SMALLEST_OF_CACHE, LARGEST_OF_CACHE = 1e-13, 1e6


class FiniteCheck:
    """Checks the tensors of one checkpoint. `names`: all tensors in it."""

    def __init__(self, names: Collection[str] = ()) -> None:
        self.names = names
        self._pending: list[tuple[str, str, torch.dtype, Tensor]] = []

    def look(self, name: str, file: str, values: Tensor) -> None:
        """Checks `values`, a part of the tensor `name` in `file`, on any device. Thread-safe. Raises OctavoError at once for
        damaged values on a CPU, and for scales that are integers, as bytes of others may be called by a damaged header."""
        if _is_scale(name) and not values.is_floating_point() and values.dtype is not torch.uint8:
            kind = str(values.dtype).removeprefix("torch.")
            raise OctavoError(f"{name} in {file} is stored as {kind}, and scales are floating-point; {AGAIN}")
        if (found := _extremes(name, values)) is None:
            return
        if values.device.type in AT_ONCE:
            self._judge(name, file, values.dtype, *found.tolist())
        else:
            self._pending.append((name, file, values.dtype, found))

    def finish(self) -> None:
        """Waits for the device. Raises OctavoError for the first damaged tensor on it."""
        pending, self._pending = self._pending, []
        if pending:
            extremes = torch.stack([found for *_, found in pending]).tolist()
            for (name, file, dtype, _), (low, high) in zip(pending, extremes, strict=True):
                self._judge(name, file, dtype, low, high)

    def _judge(self, name: str, file: str, dtype: torch.dtype, low: float, high: float) -> None:
        wrong = ""
        if dtype in FIRST_NON_FINITE and not _is_scale(name):
            if low >= FIRST_NON_FINITE[dtype] or high >= FIRST_NON_FINITE[dtype] + 0x80:
                wrong = "FP8 codes that are NaN or infinity"
        elif not (math.isfinite(low) and math.isfinite(high)):
            wrong = "NaN or infinity"
        elif name.endswith(SCALES_OF_CACHES):
            if out := [scale for scale in (low, high) if not SMALLEST_OF_CACHE <= scale <= LARGEST_OF_CACHE]:
                wrong = f"the scale {out[0]:.3g}, with which no keys and values can be stored"
        elif name.endswith(SCALES_OF_WEIGHTS):
            if low < 0 and f"{name.rpartition('.')[0]}.weight_packed" not in self.names:  # some tools' INT4 scales are signed
                wrong = f"the scale {low:.3g}, but scales of FP8 are positive"
            elif max(-low, high) > LARGEST_OF_WEIGHT:
                wrong = f"the scale {low if -low > high else high:.3g}, which no weight has"
        if wrong:
            raise OctavoError(f"{name} in {file} holds {wrong}; {AGAIN}")


def _is_scale(name: str) -> bool:
    return name.endswith(SCALES_OF_WEIGHTS + SCALES_OF_CACHES)


def _extremes(name: str, values: Tensor) -> Tensor | None:
    """FP32 [2] on the device of `values`: minimum and maximum, NaN if any value is; None for values that are always finite.

    For FP8 codes: the largest byte with sign +, and the largest byte of all.
    """
    if _is_scale(name) and values.dtype is torch.uint8:
        values = values.view(torch.float8_e8m0fnu)
    if not values.numel() or not values.is_floating_point():
        return None
    if values.dtype in FIRST_NON_FINITE and not _is_scale(name):  # torch has no aminmax of FP8, and bytes are faster
        codes = values.view(torch.uint8)
        return torch.stack([codes.view(torch.int8).amax().float(), codes.amax().float()])
    return torch.stack(torch.aminmax(values if values.dtype.itemsize > 1 else values.float())).float()
