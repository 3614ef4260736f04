"""A test of many cases runs each of them, and tells of each that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import cases


def test_every_combination_runs_and_every_failure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []

    @cases("number", [1, 2, 3])
    @cases(("letter", "_code"), [("a", 97), ("b", 98)])
    def check(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, letter: str, _code: int) -> None:
        monkeypatch.setenv(f"CASE_{number}{letter}", "")
        (tmp_path / "mine").touch(exist_ok=False)
        seen.append((number, letter))
        assert number != 2

    with pytest.raises(ExceptionGroup, match="2 of 6 cases failed") as caught:
        check(tmp_path=tmp_path, monkeypatch=monkeypatch)  # type: ignore[call-arg]
    assert seen == [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "a"), (3, "b")]
    assert all(isinstance(error, AssertionError) for error in caught.value.exceptions)
    assert [error.__notes__ for error in caught.value.exceptions] == [
        ["in the case number=2, letter='a', _code=97"],
        ["in the case number=2, letter='b', _code=98"],
    ]


def test_a_directory_that_a_fixture_made_is_each_cases_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("whole")

    @cases("text", ["a", "b"])
    def damage(model: Path, text: str) -> None:
        assert (model / "file").read_text() == "whole"
        (model / "file").write_text(text)

    damage(model=tmp_path)  # type: ignore[call-arg]
    assert (tmp_path / "file").read_text() == "whole"


def test_one_failure_is_raised_as_it_is_and_a_skip_is_told() -> None:
    @cases("number", [1, 0, 2])
    def divide(number: int) -> None:
        assert 1 / number
        if number == 2:
            pytest.skip("needs an odd number")

    @cases("number", [1, 2])
    def skip_even(number: int) -> None:
        if number == 2:
            pytest.skip("needs an odd number")

    with pytest.raises(ZeroDivisionError):
        divide()  # type: ignore[call-arg]
    with pytest.raises(pytest.skip.Exception, match=r"needs an odd number \(1 of 2 cases\)"):
        skip_even()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("names", "values", "told"), [("a", [], "no cases of a"), (("a", "b"), [(1,)], "2 names and 1 values")]
)
def test_cases_that_are_none_are_refused(names: str, values: list[object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cases(names, values)
