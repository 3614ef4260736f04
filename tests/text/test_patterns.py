"""The automaton against looking for every pattern at every place, and how much it looks at."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import InvalidRequest
from octavo.messages import MAX_CHARACTERS, MAX_STOP, SamplingParams
from octavo.text.patterns import START, Patterns

WORDS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=6)


@settings(deadline=None)
@given(WORDS, st.text("abc", max_size=30))
def test_against_every_pattern_at_every_place(words: list[str], text: str) -> None:
    patterns, state = Patterns(words), START
    for end, character in enumerate(text, 1):
        state = patterns.after(state, character)
        seen = text[:end]
        ended = sorted({word for word in words if seen.endswith(word)}, key=len, reverse=True)
        assert patterns.all_ended(state) == ended
        assert patterns.ended(state) == (ended[0] if ended else None)
        begun = [n for word in words for n in range(1, len(word)) if seen.endswith(word[:n])]
        assert patterns.begun(state) == max(begun, default=0)


class Counted(int):
    """A symbol that counts how often it is looked up."""

    lookups = 0

    def __hash__(self) -> int:
        Counted.lookups += 1
        return int(self)


@pytest.mark.parametrize("count", [1, 100])
def test_a_symbol_is_looked_up_twice_on_average_at_most(count: int) -> None:
    """Where every beginning fails as late as it can, and however many patterns there are."""
    patterns = Patterns([[Counted(0)] * 50 + [Counted(2 + i)] for i in range(count)])
    state, Counted.lookups = START, 0
    symbols = [Counted(0)] * 5000 + [Counted(1)]
    for symbol in symbols * 2:
        state = patterns.after(state, symbol)
    assert Counted.lookups <= 2 * 2 * len(symbols)


def test_bounds_of_stop_strings_and_bad_words() -> None:
    SamplingParams(stop=["x" * 64] * MAX_STOP, bad_words=["x" * 16] * 1024)
    for name in ("stop", "bad_words"):
        with pytest.raises(InvalidRequest, match=f"{name} has 10000 entries; at most "):
            SamplingParams(**{name: [f"never {i}" for i in range(10_000)]})
        with pytest.raises(InvalidRequest, match=f"{name} has {MAX_CHARACTERS + 1} characters in all; at most "):
            SamplingParams(**{name: ["x" * MAX_CHARACTERS, "y"]})
        with pytest.raises(InvalidRequest, match=f"{name} must hold strings"):
            SamplingParams(**{name: [3]})
