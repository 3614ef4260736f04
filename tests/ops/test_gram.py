"""Sums of x x^T: every implementation beside float64."""

from __future__ import annotations

import pytest
import torch
from ops.cases import on_each_instruction_set, over

from octavo.ops import reference
from octavo.ops.cpu import library, native

OF_8_BITS = "avx512_bf16", "amx"  # instruction sets whose codes have 8 bits, and not 12
MADE = {"reference": reference.add_gram} | ({"C": native.add_gram} if library.missing() is None else {})


@on_each_instruction_set
@over("dtype", [torch.bfloat16, torch.float32])
@over("shape", [(1, 1), (5, 3), (513, 40), (70, 156), (4100, 20)])
@over("name", MADE)
def test_it_is_the_definition(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Columns of other sizes, one of them zero; part of a larger matrix."""
    tokens, width = shape
    x = torch.randn(tokens, width + 3).mul_(torch.randn(width + 3).mul_(3).exp_()).to(dtype)[:, 1 : width + 1]
    x[:, width // 2 :: 7] = 0
    before = torch.randn(width, width)
    total = before.clone()
    MADE[name](total, x)
    exact = x.double()
    size = exact.norm(dim=0)
    error = (total - (before.double() + exact.T @ exact)).abs() - 1e-6 * before.abs()
    # Each value may be off by a code's half of its column's largest, at random: never all of them to the same side.
    step = {"reference": 0.0, "C": 1 / 254 if library.used() in OF_8_BITS else 2**-12}[name]
    most = exact.abs().amax(0) * tokens**0.5 * step + 1e-6 * size
    assert bool((error.triu() <= size[:, None] * most + size * most[:, None]).all())


@on_each_instruction_set
@over("value", [float("inf"), float("nan")])
@over("name", MADE)
def test_what_is_not_finite_stays_so(name: str, value: float) -> None:
    """In its own column, and in no other."""
    x, total = torch.randn(530, 40), torch.zeros(40, 40)
    x[520, 7] = value
    MADE[name](total, x)
    bad = torch.zeros(40, 40, dtype=torch.bool)
    bad[7], bad[:, 7] = True, True
    assert torch.equal(total.triu().isfinite(), ~bad.triu())


@pytest.mark.skipif(library.missing() is not None, reason="needs a C compiler")
def test_sums_do_not_depend_on_threads() -> None:
    x, found = torch.randn(1000, 300), []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            native.add_gram(total := torch.zeros(300, 300), x)
        finally:
            torch.set_num_threads(before)
        found.append(total.triu())
    assert torch.equal(*found)
