"""A server over the fake engine, called in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from server.api_client import Client
from server.fake_engine import FakeEngine

from octavo.server.serve import make_served


@pytest.fixture
def make_client() -> Callable[..., Client]:
    def make(text: str = " hello world", **how: Any) -> Client:
        engine = FakeEngine(text)
        return Client(engine, make_served(engine, ["demo", "other"], **how))  # type: ignore[arg-type]

    return make


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    return make_client()
