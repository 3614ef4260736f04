"""Scales of an FP8 cache, by the largest keys and values that a text gives each attention layer.

A code has three bits of mantissa whatever its scale, so a scale matters at the format's ends alone: past 448 values are
clamped, and under 2^-6 they have fewer bits. Scales are powers of two, under which a value in between has the same error as
under 1.0, and what a code stands for is exact in BF16. A search for the scales of least error gained too little to be told from
chance, and scales of heads no more than those of layers (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.layers.attention import SCALE_NAMES, PagedAttention
from octavo.models import build_model
from octavo.platform import FP8_MAX
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.loader import places_of

__all__ = ["SCALES", "STRATEGIES", "CacheScales", "cache_scale", "scales_to_measure"]

SCALES = "k_scale", "v_scale"  # as compressed-tensors names them, beside an attention module's projections
STRATEGIES = "tensor", "attn_head"  # of compressed-tensors' kv_cache_scheme: a scale for a layer, or for each of its KV heads
ROOM = 8.0  # times the largest value of the text fits, for other texts have larger ones: 14 binades of full precision are many
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
    ends = tuple(f".{name}" for name in SCALE_NAMES if not name.startswith("q_"))  # a query's is not the cache's
    without = ""
    if not heads:
        without = "MLA's FP8 cache takes the scales of each token as it is written"
    elif found := next((name for name in checkpoint.tensors if name.endswith(ends)), None):
        without, heads = f"those that the checkpoint has are kept, such as {found}", {}
    if strategy is not None and without:
        raise OctavoError(f"--kv-cache-scheme {strategy} has no KV scales to write: {without}; leave it out.")
    return CacheScales(heads, strategy, without)


def cache_scale(peaks: Tensor, *, by_head: bool) -> Tensor:
    """FP32 [heads, 1, 1], or [1] for all heads, of the largest magnitudes `peaks` FP32 [heads]: the power of two under which
    these are codes from 28 to 56. Where all is 0 it is 1.0."""
    largest = peaks.view(-1, 1, 1) if by_head else peaks.amax().view(1)
    _, exponent = torch.frexp(largest * (ROOM / FP8_MAX[E4M3]))
    return torch.ldexp(torch.ones_like(largest), exponent)
