"""Parts of a weight are quantized into one tensor, which is made when nothing of an earlier weight is left on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from cases import cases

from octavo.platform import Platform
from octavo.quant import BF16, SCHEMES, QTensor, Scheme, concat, quantize
from octavo.quant.formats import WHOLE, Shard
from octavo.weights import parts_of_codes
from octavo.weights.parts_of_codes import PartsOfCodes, part_of

CPU = Platform(torch.device("cpu"), "test")
FP8 = [scheme for scheme in SCHEMES.values() if scheme.quantized]


def dense(rows: Sequence[int], k: int = 130) -> list[torch.Tensor]:
    return [torch.randn(n, k).bfloat16() for n in rows]


@cases(("scheme", "rows"), [(scheme, rows) for scheme in FP8 for rows in ([128], [128, 256], [40, 0, 130])])
def test_codes_and_scales_are_those_of_parts_that_are_joined(scheme: Scheme, rows: list[int]) -> None:
    parts = dense(rows)
    want = concat([quantize(part, scheme) for part in parts])
    codes = PartsOfCodes([(n, 130) for n in rows], CPU)
    found = concat([quantize(part, scheme, codes=codes.next(part, scheme)) for part in parts], codes.whole)
    assert codes.whole is not None
    assert found.data is codes.whole
    assert (found.shape, found.scheme) == (want.shape, want.scheme)
    assert found.scale is not None
    assert want.scale is not None
    assert found.data.view(torch.uint8).equal(want.data.view(torch.uint8))
    assert found.scale.equal(want.scale)


@cases("stored", [[0], [1], [0, 1]])
def test_parts_that_are_stored_in_codes_are_joined_by_copying(stored: list[int]) -> None:
    scheme, parts = SCHEMES["ptpc_fp8"], dense([32, 48])
    read: list[torch.Tensor | QTensor] = [quantize(p, scheme) if at in stored else p for at, p in enumerate(parts)]
    codes = PartsOfCodes([(32, 130), (48, 130)], CPU)
    given = [codes.next(one, scheme) for one in read]
    made = [one if isinstance(one, QTensor) else quantize(one, scheme, codes=to) for one, to in zip(read, given, strict=True)]
    assert codes.whole is None
    assert (
        concat(made, codes.whole)
        .data.view(torch.uint8)
        .equal(concat([quantize(part, scheme) for part in parts]).data.view(torch.uint8))
    )


def test_what_is_not_quantized_gets_no_memory() -> None:
    codes = PartsOfCodes([(32, 130)], CPU)
    assert codes.next(dense([32])[0], BF16) is None
    assert codes.whole is None


def test_memory_goes_back_before_large_weights_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    released = []
    monkeypatch.setattr(Platform, "release", lambda self: released.append(self.arch))
    monkeypatch.setattr(parts_of_codes, "LARGE", 300)
    gpu = replace(CPU, device=torch.device("cuda"), arch="sm_90")
    for on in (CPU, gpu):
        PartsOfCodes([(10, 20), (5, 20)], on)
        PartsOfCodes([(10, 20), (4, 20)], on)
    assert released == ["sm_90"]


def test_parts_of_ranks() -> None:
    assert part_of((12, 8), WHOLE) == (12, 8)
    assert part_of((12, 8), Shard(0, 1, 4)) == (3, 8)
    assert part_of((12, 8), Shard(1, 1, 4)) == (12, 2)
    assert part_of((12, 8), Shard(0, 2, 3, unit=5)) == (2, 8)
