"""Which token a draw gives, in float64 of all of them, sorted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from ops.cases import case
from torch import Tensor

from octavo.ops import Filters

__all__ = ["SPREADS", "check_draw", "drawn"]

SPREADS = [0.0, 0.1, 2.0, 30.0]  # standard deviations of logits
CUTS: list[tuple[int, float, float]] = [  # top_k, top_p, min_p
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (40, 0.9, 0.0), (0, 0.9, 0.0), (0, 0.3, 0.02), (0, 1.0, 0.1), (0, 1.0, 1.0),
    (3000, 0.999, 0.0), (2500, 1.0, 1e-5), (0, 1e-7, 0.0),
]  # fmt: skip


def drawn(weights: Tensor, u: Tensor, cut: Filters | None) -> Tensor:
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


def check_draw(
    draw: Callable[[Tensor, Tensor, Tensor, Filters | None], Tensor], vocab: int, spread: float, device: str = "cpu",
    each: int = 4,
    ways: Callable[[], Iterable[object]] = lambda: ["as it is"],
) -> None:  # fmt: skip
    """The token that float64 draws of all of them, sorted: of equal ones, too, of which there are many, and of banned ones; but
    that the last bit of a sum may move where the sum ends. `each` rows of every cut; in all the `ways` that `draw` has."""
    rows = each * len(CUTS)
    x = (torch.randn(rows, vocab) * spread).bfloat16().float()
    x[:, vocab // 3 : vocab // 2] = -float("inf")
    temperature, u = torch.rand(rows) + 0.3, torch.rand(rows, dtype=torch.float64)
    u[0] = 1e-9
    top_k, top_p, min_p = (torch.tensor([cut[i] for cut in CUTS] * each) for i in range(3))
    top_k = torch.where((top_k == 0) | (top_k > vocab), vocab, top_k)
    cut = Filters(top_k.int(), top_p.float(), min_p.float(), int(top_k.max()))
    weights = ((x.double() - x.double().amax(1, keepdim=True)) / temperature.double().unsqueeze(1)).exp()
    weights[weights < 1e-36] = 0
    there = Filters(*(of.to(device) for of in cut[:3]), cut.max_top_k)
    wanted = [(own, drawn(weights, u, given)) for given, own in ((cut, there), (None, None))]
    for way in ways():
        with case(way):
            wrong = 0
            for own, expected in wanted:
                found = draw(x.clone().to(device), temperature.to(device), u.to(device), own).cpu()
                assert x.gather(1, found.unsqueeze(1)).isfinite().all()
                wrong += int((found != expected).sum())
            assert wrong <= 2, f"{wrong} of {2 * rows} are others"
            assert draw(x[:0].to(device), temperature[:0].to(device), u[:0].to(device), None).shape == (0,)
