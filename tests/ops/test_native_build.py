"""Compiling the C kernels, doing without them, what memory they take, and what the sanitizers say of them."""

from __future__ import annotations

import logging
import re
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
def test_a_build_replaces_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small source: whatever else tests the kernels has compiled theirs."""
    source, into = tmp_path / "csrc", tmp_path / "built"
    source.mkdir(), into.mkdir()
    (source / "kernels.c").write_text("int one(void) { return 1; }")
    monkeypatch.setitem(BUILDER["build"].__globals__, "SOURCES", source)
    (into / "kernels-0.so").write_bytes(b"old")
    assert BUILDER["build"](into) is None
    assert [path.name for path in into.iterdir()] == [BUILDER["library_name"]()]
    before = BUILDER["library_name"]()
    (source / "kernels.c").write_text("int one(void) { return 2; }")
    assert BUILDER["library_name"]() != before


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


# What a process does with 96 M weights of each dtype it is given; prints how many MiB it then holds. As the end of a load does
# (engine/loading.py), it gives back first what is free: of a weight that is reordered, what was stored.
MEMORY = """
import sys
import octavo.engine, torch
from octavo import host
from octavo.ops.cpu.native import Native
from octavo.platform import Platform
from octavo.quant import BF16, FP8_PER_CHANNEL, QTensor

def resident():
    host.release()
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

def weight(rows):
    data = torch.full((rows * 1024 * dtype.itemsize,), 56, dtype=torch.uint8).view(dtype).view(rows, 1024)
    q = QTensor(data, torch.ones(rows, 1) if dtype.itemsize == 1 else None, scheme, (rows, 1024))
    return Native().pack(q, Platform(torch.device("cpu"), "test"))

kept = []
for name in sys.argv[1:]:
    dtype = getattr(torch, name)
    scheme = FP8_PER_CHANNEL if dtype.itemsize == 1 else BF16
    x = torch.randn(16, 1024).bfloat16()
    kept.append(weight(8192))
    kept[-1](x)
    before = resident()
    weights = [weight(8192) for _ in range(12)]
    for packed in weights:
        packed(x)
    print(resident() - before)
    kept.append(weights)
"""


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
def test_weights_take_what_is_stored() -> None:
    """Resident memory of a process, as the system counts it."""
    asked = [sys.executable, "-c", MEMORY, "float8_e4m3fn", "bfloat16"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT)
    for found, size in zip(done.stdout.split(), (96, 192), strict=True):
        assert size - 9 <= float(found) < size + 16  # two weights' worth at most that the C library could not give back


def sanitizer_runtime() -> str | None:
    """What a process that is not built for it loads first; gcc's and clang's have names of their own.

    The C++ library goes along: the sanitizer looks for its exceptions, which torch throws where it finds no driver, at start.
    """

    def path_of(name: str) -> str | None:
        asked = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        return found if Path(found := asked.stdout.strip()).is_absolute() else None

    names = ("libasan.so", f"libclang_rt.asan-{machine()}.so", "libclang_rt.asan.so")
    runtime = next((found for name in names if (found := path_of(name))), None)
    return runtime and " ".join(filter(None, (runtime, path_of("libstdc++.so.6"))))


# Checks are calls, and there are none of null, of sizes and of addresses that wrap around, which the address sanitizer sees
# itself, nor of alignment: with all of them written out, compiling took longer than every other test of the kernels.
SANITIZED = [
    "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,alignment,pointer-overflow",
    "-fno-sanitize-recover=all", "--param", "asan-instrumentation-with-call-threshold=0",
]  # fmt: skip


def without(source: str, name: str) -> str:
    """kernels.c, which is compiled once for each instruction set, without one of them; lines keep their numbers."""
    part = re.compile(rf"^#define SUFFIX {name}\b.*?^END_TARGET$", re.MULTILINE | re.DOTALL)
    source, count = part.subn(lambda found: "\n" * found[0].count("\n"), source)
    assert count == 1, f"kernels.c has no part for {name}"
    return re.sub(rf"^.*\bfunctions_{name}\b.*$", "", source, flags=re.MULTILINE)


@needs_compiler
def test_sanitizers_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of the kernels' tests again, compiled to stop at an access or an operation that C does not define.

    The sets that this CPU can run, which is a third of the time of compiling all of them where it has no AVX-512; one of AVX2's
    two, which differ in how a register is widened and in no address.
    """
    source = (BUILDER["SOURCES"] / "kernels.c").read_text()
    unused = [name for name in ("avx2", "avx512", "avx512_bf16") if library.missing() is None and not library.use(name)]
    for name in ("avx2_shift", *unused) if machine() == "x86_64" else ():
        source = without(source, name)
    csrc = tmp_path / "csrc"
    shutil.copytree(BUILDER["SOURCES"], csrc)
    (csrc / "kernels.c").write_text(source)
    monkeypatch.setitem(BUILDER["build"].__globals__, "SOURCES", csrc)
    # Loops stand in for the instructions of BF16 dot products and of matrix tiles, which few CPUs have.
    reason = BUILDER["build"](tmp_path, [*BUILDER["FLAGS"], "-DTEST_TILES", *SANITIZED])
    if reason:
        pytest.skip(f"needs a compiler with sanitizers: {reason}")
    runtime = sanitizer_runtime()
    if runtime is None:
        pytest.skip(f"needs the sanitizers' shared library, which {COMPILER} does not name")
    script = str(Path(__file__).with_name("sanitized.py"))
    env = {
        "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    asked = [sys.executable, "-P", script, str(tmp_path / BUILDER["library_name"]())]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, env=env)
    said = done.stdout[-1000:] + done.stderr
    assert done.returncode == 0, said[max(said.find("ERROR"), 0) :][:4000]
    assert int(done.stdout.split(" of the tests' cases")[0].split()[-1]) > 40
