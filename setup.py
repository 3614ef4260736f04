"""Compiles the CPU kernels beside the Python files, where a C compiler is there. Everything else is in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

KERNELS = Path("octavo/ops/cpu")


class BuildWithKernels(build_py):
    """An install without them works: Octavo then says so and multiplies with torch."""

    def run(self) -> None:
        super().run()
        target = KERNELS if self.editable_mode else Path(self.build_lib) / KERNELS
        subprocess.run([sys.executable, str(KERNELS / "build.py"), str(target)], check=False)


setup(cmdclass={"build_py": BuildWithKernels})
