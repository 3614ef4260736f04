"""Which token a draw gives, in float64 of all of them, sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.ops import Cut

__all__ = ["drawn"]


def drawn(weights: Tensor, u: Tensor, cut: Cut | None) -> Tensor:
    """int64 [rows] of weights [rows, vocab] and u [rows]: what `cut` keeps, the likeliest first and equal ones by their ids, is
    walked through by ids."""
    kept = weights.double()
    if cut is not None:
        rank, (top_k, top_p, min_p) = torch.arange(kept.shape[1]), (x.unsqueeze(1) for x in cut[:3])
        order = kept.sort(dim=1, descending=True, stable=True).indices
        left = kept.gather(1, order)
        left *= (rank < top_k) & (left >= min_p.double() * left[:, :1])
        left *= (left.cumsum(1) - left < top_p.double() * left.sum(1, keepdim=True)) | (rank == 0)
        kept = torch.zeros_like(kept).scatter(1, order, left)
    ends = kept.cumsum(1)
    return torch.searchsorted(ends, u.double().unsqueeze(1) * ends[:, -1:], right=True).squeeze(1)
