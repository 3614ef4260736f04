"""Kernels compiled without a device are those that a start looks for: the same keys of Triton's cache, whoever compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from octavo.ops.hopper.compile import missing

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"needs NVRTC: {missing()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs no accelerator: a device is described"),
]


def told(what: str, home: Path) -> dict[str, Any]:
    """What tests/engine/rehearse.py found, with caches of its own, and without numbers of lines, which take time."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("rehearse.py"), what],
        capture_output=True, text=True, timeout=900, check=False,
        env=env | {"HOME": str(home), "TRITON_DISABLE_LINE_INFO": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_an_image_has_what_a_start_looks_for(tmp_path: Path) -> None:
    """Triton's kernels and those in CUDA C++. A job that fails is counted, and the others are done."""
    found = told("in_processes", tmp_path)
    assert (found["found"], found["looked for"]) == (3, 3)
    assert (found["failed"], found["cubins"]) == (1, 1)
    assert {"layer_megakernel.cu", "decode_attention.cu"} <= set(found["CUDA C++"])
    assert "grouped_gemm.cu" not in found["CUDA C++"]  # the model has no experts


def test_any_number_of_jobs_is_done(tmp_path: Path) -> None:
    assert told("many", tmp_path) == {"failed": 2, "last": "done", "none": 0}


def test_the_process_beside_an_engine_compiles_what_the_engine_launches(tmp_path: Path) -> None:
    """An unknown kernel and an ended process are errors, which no caller waits for in vain."""
    found = told("by_process", tmp_path)
    assert (found["errors"], found["found"], found["looked for"]) == ([], 3, 3)
    assert "no_such_kernel" in found["wrong"]
    assert (found["exit code"], found["after"]) == (0, "the process that compiles has ended")


def test_other_models_can_be_rehearsed(tmp_path: Path) -> None:
    for start, kernels in told("walks", tmp_path).items():
        assert kernels > 15, start
