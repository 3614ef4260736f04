"""Captures without a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from octavo import ops


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay runs the function again and leaves its result where the first one was."""

    def tensors(out: Any) -> tuple[Tensor, ...]:
        return out if isinstance(out, tuple) else (out,)

    def capture(fn: Callable[[], Any], pool: object = None) -> tuple[Callable[[], None], Any, object]:
        out = fn()

        def replay() -> None:
            for held, new in zip(tensors(out), tensors(fn()), strict=True):
                held.copy_(new)

        return replay, out, "pool"

    monkeypatch.setattr(ops, "capture", capture)
