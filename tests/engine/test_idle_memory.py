"""What an engine's process holds on to, however long it serves."""

from __future__ import annotations

import os
import subprocess
import sys
from queue import SimpleQueue
from threading import Timer

import pytest

from octavo.engine import worker

# Products of as many lengths as a day's prompts have, as torch makes them where there are no C kernels.
PRODUCTS = """
import octavo.engine
import torch
from octavo.host import release

def resident():
    release()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

torch.set_num_threads(1)
weights = [torch.ops.mkldnn._reorder_linear_weight(torch.randn(768, 256), 16) for _ in range(2)]
def run(lengths):
    for m in lengths:
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(torch.ones(m, 256), weight, None, "none", [], "")
    return resident()

first = run(range(1, 101))
print((run(range(101, 301)) - first) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_kernels_for_every_length_of_a_prompt_are_not_kept() -> None:
    """Without a bound these grew by 111 MiB."""
    env = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    told = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, env=env, timeout=120, check=True)
    assert int(told.stdout) < 40


def test_an_idle_engine_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(worker, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(worker, "release", lambda: given.append(True))
    inbox: SimpleQueue[tuple[str, ...]] = SimpleQueue()
    inbox.put(("abort",))
    assert worker._wait(inbox) == [("abort",)]
    assert not given, "not between two requests"
    Timer(0.3, inbox.put, [("shutdown",)]).start()
    assert worker._wait(inbox) == [("shutdown",)]
    assert given == [True], "once, however long it is idle"
