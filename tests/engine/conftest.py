"""Captures without a device."""

from __future__ import annotations

import pytest
from engine.replays import capture

from octavo import ops


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay runs the function again and leaves its result where the first one was."""
    monkeypatch.setattr(ops, "capture", capture)
