"""What a step keeps for its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from importlib import import_module

import pytest
import torch

from octavo import batch
from octavo.batch import Key, StepCache

CPU = torch.device("cpu")
attention = import_module("octavo.ops.cpu.attention")  # the package has a function of this name


@dataclass(frozen=True)
class Length(Key[int]):
    first: int


@dataclass(frozen=True)
class Name(Key[str]):
    first: int


def test_what_a_key_names_is_made_once() -> None:
    made: list[str] = []

    def make(what: str) -> Callable[[], str]:
        return lambda: made.append(what) or what  # type: ignore[func-returns-value]

    cache = StepCache()
    assert [cache.get(Name(first), make(f"{first}")) for first in (1, 1, 2, 1)] == ["1", "1", "2", "1"]
    assert made == ["1", "2"]


def test_kinds_of_keys_do_not_meet() -> None:
    """Though their fields are equal; and a value may be nothing."""
    cache = StepCache()
    assert cache.get(Length(1), lambda: 5) == 5
    assert cache.get(Name(1), lambda: "five") == "five"
    assert cache.get(Length(1), lambda: 6) == 5

    @dataclass(frozen=True)
    class Nothing(Key[None]):
        pass

    calls: list[int] = []
    for _ in range(2):
        cache.get(Nothing(), lambda: calls.append(1))
    assert calls == [1]
    with pytest.raises(FrozenInstanceError):
        Length(1).first = 2  # type: ignore[misc]


def test_every_batch_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's groups of requests are worked out once a step and window, by the first layer that asks."""
    made: list[int | None] = []
    monkeypatch.setattr(attention, "_make_groups", lambda batch, window, values: made.append(window) or [])
    views = {"k": torch.zeros(2, 4, 1, 8)}
    for one in (batch.build([batch.Span([5], 0, [1])], 4, CPU) for _ in range(2)):
        for window in (None, 3, None, 3):
            attention._groups(one, views, window)
    assert made == [None, 3, None, 3]
