"""Progress on stderr: a line now and then without a terminal, a bar with one."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from octavo.frontend.loading_bar import LINE_SECONDS, LoadingBar


def test_without_a_terminal_a_stage_is_a_line_and_details_one_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bar = LoadingBar()
    for seconds, stage, detail in (
        (0, "loading", ""),
        (LINE_SECONDS * 2, "loading", ""),
        (0, "downloading", "0 of 9 GB"),
        (LINE_SECONDS / 2, "downloading", "1 of 9 GB"),
        (LINE_SECONDS / 2, "downloading", "2 of 9 GB"),
        (1, "downloading", "3 of 9 GB"),
        (0, "capturing", ""),
    ):
        now += seconds
        bar.update(stage, 0.5, detail)
    bar.close()
    told = ["loading", "downloading: 0 of 9 GB", "downloading: 2 of 9 GB", "capturing"]
    assert capsys.readouterr().err.splitlines() == [f"octavo: {line}" for line in told]


def test_the_clock_goes_on_after_a_stage_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    bar = LoadingBar()
    bar.update("config", 1.0, "1 of 1 kB")
    bar.update("weights", 0.25, "1 of 4 GB")
    assert bar._bar is not None
    assert not bar._bar.tasks[0].finished
    bar._bar.refresh()
    bar.close()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sys.stderr.getvalue())  # type: ignore[attr-defined]
    assert "weights: 1 of 4 GB" in shown
    assert "25%" in shown
