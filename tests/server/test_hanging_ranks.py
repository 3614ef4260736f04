"""A rank that hangs in a step, where the others wait for it within a collective: the server names it and ends."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from server.hanging_server import LENGTH
from server.processes import Server

from octavo.server.shutdown import _report_stalls

SCRIPT = Path(__file__).with_name("hanging_server.py")
TIMEOUT = 2  # --engine-timeout
CEILING = 20  # seconds more


def test_ranks_of_a_stalled_engine_are_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    """After each further timeout: a rank may hang that was only slow before."""
    asked: list[float] = []

    async def ask() -> None:
        asked.append(engine.silent_seconds)

    engine = SimpleNamespace(silent_seconds=0.0, end_if_a_rank_hangs=ask)
    served = SimpleNamespace(engine=engine, engine_timeout=0.02, stalled=False)

    async def main() -> None:
        task = asyncio.ensure_future(_report_stalls(served))  # type: ignore[arg-type]
        for seconds in (0.0, 0.03, 0.035, 0.06, 0.0, 0.03):
            engine.silent_seconds, served.stalled = seconds, seconds > served.engine_timeout
            await asyncio.sleep(0.2)
        task.cancel()

    asyncio.run(main())
    assert asked == [0.03, 0.06, 0.03]
    assert capsys.readouterr().err.count("the engine goes on") == 1


@pytest.mark.parametrize(
    ("how", "split", "named"),
    [
        ("sleep 1", "-tp", "rank 1 hangs (in step {step}, behind exchange "),
        ("sleep 1", "-pp", "rank 1 hangs (in step {step}, behind exchange "),
        ("stop 0", "-tp", "rank 0 hangs (no answer)"),
    ],
)
def test_a_rank_that_hangs_in_a_layer_is_named(how: str, split: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a collective, or behind a pipeline stage."""
    monkeypatch.setenv("HANG", how)
    server = Server(split, "2", "--threads", "1", "--engine-timeout", str(TIMEOUT), script=SCRIPT)
    try:
        with ThreadPoolExecutor() as pool:
            began = time.monotonic()
            body = json.dumps(dict(model="octavo-demo", prompt=[5] * LENGTH, max_tokens=5)).encode()
            asked = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
            answer = pool.submit(urllib.request.urlopen, asked)
            assert server.end(TIMEOUT + CEILING) == 1
            assert time.monotonic() - began < TIMEOUT + CEILING
            error = answer.exception()
            assert isinstance(error, (urllib.error.HTTPError, ConnectionError))
            if isinstance(error, urllib.error.HTTPError):
                error.close()
    finally:
        if server.process.poll() is None:
            server.stop()
    log = "".join(server.log)
    (died,) = [line for line in server.log if " hangs (" in line]
    assert f"Of the engine's 2 ranks {named.format(step=died.partition('in step ')[2].partition(',')[0])}" in died, log
    waiting = "in all_reduce" if how == "stop 0" else "hang_in_a_layer"
    assert waiting in log
    assert ("octavo: rank 0 of 2 is in step" in log) == (how == "sleep 1"), log
    assert "octavo: rank 1 of 2 is in step" in log, log
