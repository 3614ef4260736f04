"""What the cases of ops are made of: random values, and the library's product of codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.platform import Platform
from octavo.quant import SCHEMES, Granularity

Call = Callable[[], Any]


@dataclass
class Set:
    """One set of inputs: the op on it and the library's call for the same work (None: it has none).

    Bytes and operations are the least that the work needs; `fp8`: on FP8 units. nbytes is what the set holds in memory.
    """

    op: Call
    library: Call | None
    moved: float
    operations: float = 0.0
    fp8: bool = False
    nbytes: int = field(default=0)


def random(p: Platform, *shape: int) -> Tensor:
    return torch.randn(*shape, device=p.device).bfloat16()


def by_blocks(p: Platform, scheme: str) -> bool:
    """Whether the library multiplies with such scales: cuBLAS does on sm_90."""
    return SCHEMES[scheme].weight is Granularity.BLOCK and p.has_warpgroup_mma


def scaled_mm(p: Platform, scheme: str, codes: Tensor, b: Tensor) -> Call:
    """The library's product of codes [m, k] by b [n, k]."""
    (m, k), n = codes.shape, len(b)
    if by_blocks(p, scheme):  # tokens' scales lie group by group
        scales = torch.ones(k // 128, m, device=p.device).mT, torch.ones(n // 128, k // 128, device=p.device).mT
    else:
        scales = (torch.ones((), device=p.device),) * 2
    fast = not by_blocks(p, scheme)
    return partial(torch._scaled_mm, codes, b.mT, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)


def block_size(p: Platform) -> int:
    return EngineConfig().block_size_on(p.is_cpu)
