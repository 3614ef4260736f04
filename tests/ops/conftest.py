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


@pytest.fixture(autouse=True)
def best_instructions() -> Iterator[None]:
    """A test that failed with one of the C kernels' instruction sets leaves the next test the best of them."""
    yield
    if library.missing() is None:
        library.use(None)
