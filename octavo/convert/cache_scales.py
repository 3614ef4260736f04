"""Scales of an FP8 cache, chosen by the keys and values that a text gives each attention layer.

A code has three bits of mantissa whatever its scale, so a scale that keeps values between the format's ends changes little;
one that does not loses them: keys past 448 are clamped, and values under 2^-6 have fewer bits. Of the scales that leave room
above the largest value of the text, that of the least error is taken, and 1.0 where it is among them and no worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from octavo.convert.row_quantize import round_to_codes
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.layers.attention import SCALE_NAMES, PagedAttention
from octavo.models import build_model
from octavo.platform import FP8_MAX
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.loader import places_of

__all__ = ["SCALES", "STRATEGIES", "CacheScales", "Measured", "scales_to_measure"]

SCALES = "k_scale", "v_scale"  # as compressed-tensors names them, beside an attention module's projections
STRATEGIES = "tensor", "attn_head"  # of compressed-tensors' kv_cache_scheme: a scale for a layer, or for each of its KV heads
ROOM = 2.0  # times the largest value of the text may be stored: other texts have larger ones
STEPS = tuple(1 + i / 16 for i in range(16))  # mantissas that BF16 has, too, the dtype in which other readers keep scales
ENOUGH = 2048  # tokens that errors are measured on, from all over the text
PART = 16  # of a window's tokens one in so many is among them, or more
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class CacheScales:
    """The attention modules whose scales are to be measured, each with its number of KV heads, and what config.json says.

    strategy: of `kv_cache_scheme`; None: config.json has none, and there is a scale for each layer. without: why a checkpoint
    gets none; "" where it gets some.
    """

    heads: Mapping[str, int]
    strategy: str | None = None
    without: str = ""

    @property
    def by_head(self) -> bool:
        return self.strategy == "attn_head"

    def shape(self, module: str) -> tuple[int, ...]:
        """Of one scale tensor, as compressed-tensors has it."""
        return (self.heads[module], 1, 1) if self.by_head else (1,)


def scales_to_measure(checkpoint: Checkpoint, config: Mapping[str, Any], strategy: str | None) -> CacheScales:
    """Of what calibration by a text measures scales for. Raises OctavoError where `strategy` asks for scales and none can be.

    A checkpoint that has scales keeps them, all of them: their config.json says what they are for.
    """
    model = cast("nn.Module", build_model(config, TensorParallel(), 1))
    heads = {path: one.kv_heads for path, one in places_of(model) if isinstance(one, PagedAttention)}
    ends = tuple(f".{name}" for name in SCALE_NAMES)
    without = ""
    if not heads:
        without = "MLA's FP8 cache takes the scales of each token as it is written"
    elif found := next((name for name in checkpoint.tensors if name.endswith(ends)), None):
        without, heads = f"those that the checkpoint has are kept, such as {found}", {}
    if strategy is not None and without:
        raise OctavoError(f"--kv-cache-scheme {strategy} has no KV scales to write: {without}; leave it out.")
    return CacheScales(heads, strategy, without)


class Measured:
    """Keys or values of one layer, as a cache in the model's dtype has them: the largest of each head, and some of them."""

    def __init__(self, tokens: int):
        """tokens: how many there will be."""
        self.every = min(PART, -(-tokens // ENOUGH))  # of a window's tokens
        self.apart = -(-tokens // (ENOUGH * PART))  # of windows
        self.windows = 0
        self.kept: list[Tensor] = []
        self.peaks: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        """x [T, heads, D] of one window. What is not finite is 0, as in the cache. Windows give their tokens in turn, since the
        first ones of each are unlike the others."""
        x = x.transpose(0, 1).float().contiguous()
        ends = torch.aminmax(x.flatten(1), dim=1)
        peak = torch.maximum(-ends.min, ends.max)
        if not bool(peak.isfinite().all()):
            x = x.nan_to_num_(0.0, 0.0, 0.0)
            peak = x.abs().amax((1, 2))
        self.peaks.append(peak)
        number, at = divmod(self.windows, self.apart)
        self.windows += 1
        if not at:
            self.kept.append(x[:, number % self.every :: self.every].contiguous())

    def scale(self, *, by_head: bool, grams: Tensor | None = None) -> Tensor:
        """FP32 [1], or [heads, 1, 1] by head.

        grams: FP32 [heads, D, D], the sums of q q^T of the queries that read keys: an error is then that of products with
        them, but for what all keys of a window have of it, which no softmax sees. None: squares.
        """
        if grams is not None and not bool(grams.isfinite().all()):
            grams = None
        peak = torch.stack(self.peaks).amax(0)
        scales = _candidates(peak if by_head else peak.amax().view(1))
        errors = torch.stack([self._errors(scale, grams) for scale in scales])
        best = (errors if by_head else errors.sum(1, keepdim=True)).argmin(0)
        found = scales.gather(0, best[None])[0]
        return found.view(-1, 1, 1) if by_head else found

    def _errors(self, scale: Tensor, grams: Tensor | None) -> Tensor:
        """FP64 [heads]: what codes of `scale`, FP32 [1] or [heads], lose."""
        by, total = scale.view(-1, 1, 1), torch.zeros(len(self.kept[0]), dtype=torch.float64, device=scale.device)
        for values in self.kept:
            lost = values / by
            round_to_codes(lost, torch.empty_like(lost))
            lost.mul_(by).sub_(values)
            if grams is None:
                total += lost.square_().sum((1, 2))
            else:
                lost -= lost.mean(1, keepdim=True)
                total += (lost @ grams).mul_(lost).sum((1, 2))
        return total


def _candidates(peak: Tensor) -> Tensor:
    """FP32 [1 + 16, n] for the largest magnitudes `peak` [n]: 1.0, and a binade of scales under which ROOM times that is at
    most the largest code, for the least of them just so. Where 1.0 leaves less room, or nothing was stored, the first is
    another of these.
    """
    least = (ROOM * peak / FP8_MAX[E4M3]).double()
    steps = torch.tensor(STEPS, dtype=torch.float64, device=peak.device)[:, None]
    scales = torch.ldexp(steps, torch.ceil(torch.log2(least / steps)))
    scales = torch.where(least > 0, scales, 1.0)
    first = torch.where(least <= 1.0, 1.0, scales[:1])
    return torch.cat([first, scales]).float()
