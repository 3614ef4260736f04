"""Compiles the CPU kernels beside the Python files, where a C compiler is there. Everything else is in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("octavo/ops/cpu")


class BuildWithKernels(build_py):
    """An install without them works: Octavo compiles them at its first start, or says why not and multiplies with torch."""

    def run(self) -> None:
        super().run()
        target = KERNELS if self.editable_mode else Path(self.build_lib) / KERNELS
        subprocess.run([sys.executable, str(KERNELS / "build.py"), str(target)], check=False)


class WheelWithKernels(bdist_wheel):
    """A wheel that holds the compiled kernels is for this platform, and for any Python; without them it is for any platform."""

    def get_tag(self) -> tuple[str, str, str]:
        if any((Path(self.bdist_dir) / KERNELS).glob("*.so")):
            return "py3", "none", self.plat_name.replace("-", "_").replace(".", "_")
        return super().get_tag()


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
