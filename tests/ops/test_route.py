"""A router that sorts its pairs, csrc/route.cu, against the reference; and that it compiles where there is no GPU."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ops.cases import over

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from ops.test_experts import decode_batch

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.ops import reference
from octavo.ops.contract import Dispatch, Router
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper import route
from octavo.platform import Platform, detect
from tests.ops.megakernels import dumped
from tests.ops.paged import needs_hopper

# Tokens, width, experts, chosen: tails of clusters' tokens and of K's parts, both variants, Qwen3-30B-A3B's router.
SHAPES = [
    (1, 64, 40, 3), (33, 2048, 128, 8), (256, 2048, 128, 8), (250, 2048, 200, 8), (128, 4096, 256, 8), (64, 200, 130, 1),
    (60, 2048, 128, 32), (17, 7168, 256, 8),
]  # fmt: skip
CPU = torch.device("cpu")
Shape = tuple[int, int, int, int]


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize("variant", route.VARIANTS)
def test_it_compiles(variant: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: nothing spilled, BF16 matrix instructions, loads from the cluster's shared memory."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    stacks, code = dumped(
        compiler.compile_cubin("route.cu", "sm_90a", dict(zip(route.KERNELS.options, variant, strict=True))), tmp_path
    )
    assert stacks == ["0"]
    assert len(re.findall(r"HMMA\.16816\.F32\.BF16", code)) == 2 * variant[1]
    assert "UCGABAR_ARV" in code


def made(
    shape: tuple[int, int, int, int], biased: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, ForwardBatch]:
    """Tokens, the router's weight and bias, and a batch of which a third pads."""
    torch.manual_seed(0)
    (tokens, width, experts, _), on = shape, detect()
    ops.bind(on)
    batch = decode_batch(tokens, on.device)
    batch.seq_lens[tokens - tokens // 3 :] = 0
    x, w = torch.randn(tokens, width, device=on.device), torch.randn(experts, width, device=on.device) * width**-0.5
    return x.bfloat16(), w.bfloat16(), torch.randn(experts, device=on.device) * 0.3 if biased else None, batch


def check_sorted(at: Dispatch, experts: torch.Tensor, count: int) -> None:
    """As the contract of Dispatch has it."""
    order, place, starts = (t.tolist() for t in (at.order, at.place, at.starts))
    pairs = experts.flatten().tolist()
    assert sorted(order) == list(range(len(pairs)))
    assert [place[pair] for pair in order] == list(range(len(pairs)))
    assert starts == [sum(0 <= p < e for p in pairs) for e in range(count + 1)]
    assert all(pairs[p] == e for e, (a, b) in enumerate(pairwise(starts)) for p in order[a:b])


@needs_hopper
@over("biased", [False, True])
@over("sigmoid, normalize", [(False, True), (False, False), (True, True)])
@over("shape", SHAPES)
def test_it_chooses_and_sorts(shape: Shape, sigmoid: bool, normalize: bool, biased: bool) -> None:
    """Twice, since a launch leaves its counter as the next one needs it. A last bit of a logit may change a close choice."""
    x, w, bias, batch = made(shape, biased)
    router = Router(shape[3], sigmoid=sigmoid, normalize=normalize, scale=1.5)
    assert route.refusal(x, w, router) is None
    expected = reference.route(x, w, bias, router, batch)
    for _ in range(2):
        found = route.choose(x, w, bias, router, batch)
        assert found is not None
        assert found.at is not None
        same = found.experts == expected.experts
        assert same.double().mean() > 0.995
        torch.testing.assert_close(found.weights[same], expected.weights[same], rtol=1e-3, atol=1e-6)
        check_sorted(found.at, found.experts, shape[2])


@needs_hopper
def test_scores_that_are_not_numbers_and_rows_that_pad_a_prompt() -> None:
    x, w, _, batch = made((5, 2048, 128, 8), False)
    x[1] = float("nan")
    batch.live = torch.tensor([4], dtype=torch.int32, device=x.device)
    found = route.choose(x, w, None, Router(8), batch)
    assert found is not None
    assert found.experts[1].tolist() == list(range(8))
    assert found.weights[1].isnan().all()
    assert (found.experts[4] == -1).all()
    assert (found.weights[4] == 0).all()
    assert (found.experts[:4] >= 0).all()


@needs_hopper
def test_equal_scores_go_to_the_first() -> None:
    x, w, _, batch = made((3, 64, 40, 3), False)
    found = route.choose(torch.ones_like(x), torch.ones_like(w), None, Router(3), batch)
    assert found is not None
    assert found.experts[:2].tolist() == [[0, 1, 2]] * 2


def test_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.zeros(40, 64, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.setattr(route.KERNELS, "platform", Platform(CPU, "gfx942"))
    assert "gfx942" in str(route.refusal(x, w, Router(2)))
    monkeypatch.setattr(route.KERNELS, "platform", Platform(CPU, "sm_90"))
    assert route.refusal(x, w, Router(2)) is None
    assert "BF16" in str(route.refusal(x.float(), w, Router(2)))
    assert "groups" in str(route.refusal(x, w, Router(2, groups=2)))
    assert "2048 pairs" in str(route.refusal(x.repeat(60, 1), w, Router(2)))
    assert "16 bytes" in str(route.refusal(x[:, 1:], w, Router(2)))
