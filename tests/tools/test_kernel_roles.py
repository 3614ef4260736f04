"""`octavo bench profile` knows what every Triton kernel is for, whatever it is called."""

from __future__ import annotations

import re
from pathlib import Path

import octavo.ops
from octavo.tools.bench.profiling import OTHER, role_of


def test_every_triton_kernel_has_a_role() -> None:
    files = (Path(octavo.ops.__file__).parent / "triton").glob("*.py")
    kernels = {name for file in files for name in re.findall(r"launch\(\s*(_\w+)", file.read_text())}
    assert len(kernels) > 30
    assert [name for name in sorted(kernels) if role_of(name) == OTHER] == []
