"""Fresh random inputs, the same for the same test."""

from __future__ import annotations

import zlib

import pytest
import torch


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch by the test's name."""
    value = zlib.crc32(request.node.name.encode())
    torch.manual_seed(value)
    return value
