"""Uninitialized memory is poisoned, so that an output that is not written is seen; inputs are fresh for each test."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from octavo.ops.cpu import library


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` gives NaN."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["portable", "avx2", "avx2_shift", "avx512", "avx512_bf16"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test of the C kernels, with each instruction set."""
    if library.use(request.param) is None:
        pytest.skip(f"needs a CPU with {request.param}")
    yield request.param
    assert library.used() == request.param
    library.use(None)
