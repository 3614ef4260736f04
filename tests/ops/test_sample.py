"""The reference of a draw, and its Triton kernel: on the GPU where there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops.cases import over
from ops.interpreter import HAS_GPU
from ops.sampled import SPREADS, check_draw
from torch import Tensor

from octavo.ops import Filters, reference
from octavo.ops.triton import sample

DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, of infinities that the kernel masks


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter goes through more chunks of fewer values."""
    if not HAS_GPU:
        monkeypatch.setattr(sample, "CHUNK", 128)


@over("vocab", [1, 15, 40, 1023, 16_391, *([128_256] if HAS_GPU else [])])
@over("spread", SPREADS)
def test_reference(vocab: int, spread: float) -> None:
    check_draw(reference.sample, vocab, spread, DEVICE, each=1 if vocab > 20_000 else 4)


# Where kernels are interpreted, small vocabularies and a long one meet each spread once.
CASES = [(n, s) for n in (1, 15, 40, 700, 16_391, 128_256) for s in SPREADS] if HAS_GPU else [
    (1, 0.0), (15, 0.1), (40, 0.0), (40, 2.0), (40, 30.0), (700, 0.1), (700, 2.0),
]  # fmt: skip


@over("vocab, spread", CASES)
def test_triton(vocab: int, spread: float, short: None) -> None:
    check_draw(sample.sample, vocab, spread, DEVICE, each=1 if vocab > 40 or not HAS_GPU else 2)


def test_what_a_row_draws_does_not_depend_on_the_rows_beside_it(short: None) -> None:
    """Nor on where the row lies."""
    rows, vocab = 4, 700 if HAS_GPU else 300
    x, u = torch.randn(rows, vocab + 3, device=DEVICE)[:, :vocab], torch.rand(rows, dtype=torch.float64, device=DEVICE)
    one = torch.ones(rows, device=DEVICE)
    cut = Filters(torch.full((rows,), 50, dtype=torch.int32, device=DEVICE), 0.8 * one, 0.01 * one, 50)
    together = sample.sample(x.clone(), one, u, cut)
    for i in range(rows):
        own = Filters(*(of[i : i + 1] for of in cut[:3]), 50)
        assert sample.sample(x[i : i + 1].clone(), one[:1], u[i : i + 1], own) == together[i]
    assert torch.equal(sample.sample(x, one, u, cut), together)


def rare(draw: Callable[[Tensor, Tensor, Tensor, Filters | None], Tensor]) -> None:
    """Of tokens with very small weights the one whose turn it is; and a min_p that is minus zero."""
    x, one = torch.full((4, 300), -float("inf"), device=DEVICE), torch.ones(4, device=DEVICE)
    x[:, [0, 64, 127]] = torch.tensor([0.0, -16.6, -69.0], device=DEVICE)
    u = torch.tensor([0.5, 1 - 5e-8, 1 - 3e-8, 1 - 2.0**-53], dtype=torch.float64, device=DEVICE)
    assert draw(x.clone(), one, u, None).tolist()[:3] == [0, 64, 64]
    cut = Filters(torch.full((4,), 3, dtype=torch.int32, device=DEVICE), one, -0.0 * one, 3)
    assert draw(x.clone(), one, u, cut).tolist()[:3] == [0, 64, 64]


def test_rare_tokens_of_the_reference() -> None:
    rare(reference.sample)


def test_rare_tokens(short: None) -> None:
    rare(sample.sample)


@over("value", [float("nan"), float("inf"), -float("inf")])
def test_whatever_the_logits_are_a_token_comes(value: float, short: None) -> None:
    one = torch.ones(2, device=DEVICE)
    for x in (torch.full((2, 400), value), torch.randn(2, 400).index_fill(1, torch.tensor([7, 300]), value)):
        for cut in (None, Filters(torch.full((2,), 9, dtype=torch.int32, device=DEVICE), 0.5 * one, 0 * one, 9)):
            found = sample.sample(x.to(DEVICE), one, one.double() / 2, cut)
            assert ((found >= 0) & (found < 400)).all()
