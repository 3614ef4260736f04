"""Compiling the C kernels, doing without them, what memory they take, and what the sanitizers say of them."""

from __future__ import annotations

import logging
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from platform import machine
from types import SimpleNamespace
from typing import Any

import pytest

import octavo
from octavo import platform
from octavo.ops.cpu import library

ROOT = Path(octavo.__file__).parents[1]
BUILDER = runpy.run_path(str(Path(octavo.__file__).parent / "ops" / "cpu" / "build.py"))
COMPILER = next(filter(None, map(shutil.which, BUILDER["COMPILERS"])), "")
needs_compiler = pytest.mark.skipif(not COMPILER, reason=f"needs a C compiler ({', '.join(BUILDER['COMPILERS'])})")


@pytest.fixture
def fresh() -> Iterator[Callable[[], Any]]:
    """cpu_kernels, asked anew."""
    platform.cpu_kernels.cache_clear()
    yield platform.cpu_kernels
    platform.cpu_kernels.cache_clear()


@needs_compiler
def test_a_build_replaces_older_ones(tmp_path: Path) -> None:
    (tmp_path / "kernels-0.so").write_bytes(b"old")
    assert BUILDER["build"](tmp_path, [*BUILDER["FLAGS"], "-O0"]) is None
    assert [path.name for path in tmp_path.iterdir()] == [BUILDER["library_name"]()]


@needs_compiler
def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    assert "refused the kernels" in BUILDER["build"](tmp_path, ["--no-such-flag"])
    (tmp_path / "file").touch()
    assert "cannot be written" in BUILDER["build"](tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_compiler_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And codes are widened for torch, as they are where kernels were never compiled."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with caplog.at_level(logging.WARNING):
        found = platform.detect("cpu")
    assert found.widened_dtype is not None
    assert [r.getMessage() for r in caplog.records] == [
        "no CPU kernels: no C compiler (cc, gcc, clang) was found; FP8 codes are kept widened and multiplied by torch"
    ]


def test_a_library_that_cannot_be_loaded_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: Callable[[], Any]
) -> None:
    def build(directory: Path) -> None:
        (directory / "kernels.so").write_bytes(b"no library")

    made = {"library_name": lambda: "kernels.so", "build": build}
    monkeypatch.setattr(platform, "runpy", SimpleNamespace(run_path=lambda path: made))
    monkeypatch.setattr(platform, "__file__", str(tmp_path / "octavo" / "platform.py"))
    (tmp_path / "octavo" / "ops" / "cpu").mkdir(parents=True)
    assert "cannot be loaded" in fresh()


# What a process does with 96 M weights of the dtype it is given; prints how many MiB that took.
MEMORY = """
import sys
import octavo.engine, torch
from octavo.ops.cpu.native import Native
from octavo.platform import Platform
from octavo.quant import BF16, FP8_PER_CHANNEL, QTensor

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

def weight(rows):
    data = torch.full((rows * 1024 * dtype.itemsize,), 56, dtype=torch.uint8).view(dtype).view(rows, 1024)
    q = QTensor(data, torch.ones(rows, 1) if dtype.itemsize == 1 else None, scheme, (rows, 1024))
    return Native().pack(q, Platform(torch.device("cpu"), "test"))

dtype = getattr(torch, sys.argv[1])
scheme = FP8_PER_CHANNEL if dtype.itemsize == 1 else BF16
x = torch.randn(16, 1024).bfloat16()
weight(8192)(x)
before = resident()
weights = [weight(8192) for _ in range(12)]
for packed in weights:
    packed(x)
print(resident() - before)
"""


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
@pytest.mark.parametrize(("dtype", "size"), [("float8_e4m3fn", 96), ("bfloat16", 192)])
def test_weights_take_what_is_stored(dtype: str, size: int) -> None:
    """Resident memory of a process, as the system counts it."""
    done = subprocess.run([sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, check=True, cwd=ROOT)
    assert size - 9 <= float(done.stdout) < size + 9


def sanitizer_runtime() -> str | None:
    """What a process that is not built for it loads first; gcc's and clang's have names of their own."""
    for name in ("libasan.so", f"libclang_rt.asan-{machine()}.so", "libclang_rt.asan.so"):
        asked = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        if Path(found := asked.stdout.strip()).is_absolute():
            return found
    return None


@needs_compiler
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The tests of the kernels again, compiled to stop at an access or an operation that C does not define."""
    # The portable path has the data flow of BF16 dot products here, which few CPUs have the instruction for.
    flags = [*BUILDER["FLAGS"], "-DTEST_PAIRS", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    reason = BUILDER["build"](tmp_path, flags)
    if reason:
        pytest.skip(f"needs a compiler with sanitizers: {reason}")
    runtime = sanitizer_runtime()
    if runtime is None:
        pytest.skip(f"needs the sanitizers' shared library, which {COMPILER} does not name")
    script = (
        "import ctypes, sys, pytest, octavo.engine, octavo.platform as platform\n"
        f"library = ctypes.CDLL({str(tmp_path / BUILDER['library_name']())!r})\n"
        "platform.cpu_kernels = lambda: library\n"
        "sys.exit(pytest.main(['-x', '-s', '-p', 'no:cacheprovider', *sys.argv[2:], '-k', sys.argv[1]]))\n"
    )
    chosen = "not several_threads and not this_machine and not in_use and (not test_linear or 67-538-96 or 1100 or 16-1-300)"
    env = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    tests = [f"tests/ops/test_{name}.py" for name in ("native", "native_experts", "native_latent", "native_int4")]
    done = subprocess.run([sys.executable, "-c", script, chosen, *tests], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 200
