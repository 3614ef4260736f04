"""What a step keeps for its layers, and steps that are cut in two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from importlib import import_module
from itertools import accumulate

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


def test_a_batch_in_two() -> None:
    """Requests before, across and behind the cut: what each half's tokens attend to is what they attended to."""
    spans = [batch.Span([7], 9, range(3)), batch.Span(range(10, 25), 5, range(3, 8)), batch.Span(range(30, 34), 0, [8])]
    whole = batch.build(spans, 4, CPU)
    for at in range(1, 20):
        halves = whole.cut(at)
        for name in ("input_ids", "positions", "rotary_rows", "slot_mapping"):
            assert torch.equal(torch.cat([getattr(one, name) for one in halves]), getattr(whole, name)), (name, at)
        seen = []
        for one in halves:
            assert one.query_start_loc.tolist() == [0, *accumulate(one.query_lens)]
            assert one.seq_lens.tolist() == one.context_lens
            assert len(one.block_tables) == len(one.query_lens) == len(one.context_lens)
            assert min(one.query_lens) > 0
            for row, queries, context in zip(one.block_tables.tolist(), one.query_lens, one.context_lens, strict=True):
                seen += [(row, context - queries + i) for i in range(queries)]
        tables = [row for row, n in zip(whole.block_tables.tolist(), whole.query_lens, strict=True) for _ in range(n)]
        assert seen == list(zip(tables, whole.positions.tolist(), strict=True)), at
