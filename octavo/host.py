"""The host's memory and device files. Nothing here imports torch."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

__all__ = ["has_accelerator", "keep", "memory", "release"]

ACCELERATORS = "/dev/nvidiactl", "/dev/kfd"  # through which the drivers of GPUs are reached
CGROUP = Path("/sys/fs/cgroup")
# A container's limit, what it uses, and in memory.stat the prefix of what the whole group has: cgroups version 2, then 1.
_GROUPS = ("memory.max", "memory.current", ""), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_")


def memory() -> tuple[int, int]:
    """Free and total memory in bytes: of the machine, or of its container if that has less."""
    kib = _numbers(Path("/proc/meminfo"))
    total, free = kib["MemTotal:"] * 1024, kib["MemAvailable:"] * 1024
    for limit_file, used_file, prefix in _GROUPS:
        with suppress(OSError, ValueError):  # no such group, or no limit, which is "max"
            if (limit := int((CGROUP / limit_file).read_text())) < total:
                total, free = limit, min(free, limit)
                used, stat = int((CGROUP / used_file).read_text()), _numbers((CGROUP / used_file).with_name("memory.stat"))
                cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))  # gives way to others
                free = max(0, min(free, limit - used + cached))
    return free, total


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line of a file, by the word before it."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}


def has_accelerator() -> bool:
    """Whether a GPU's driver is here; only torch knows whether it can use it."""
    return any(map(os.path.exists, ACCELERATORS))


def release() -> None:
    """Returns freed memory to the system. glibc would keep what lies between live allocations; other libcs may not."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def keep(most: int) -> None:
    """Lets up to `most` freed bytes stay with the process, where the system has glibc.

    Otherwise each large tensor of a step returns to the system, and clearing the next one's pages takes a twelfth of a prefill.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        trim_threshold, mmap_threshold = -1, -3
        for switch in (trim_threshold, mmap_threshold):
            mallopt(switch, min(most, 2**31 - 1))
