"""The host's memory and device files. Nothing here imports torch."""

from __future__ import annotations

import ctypes
import os

__all__ = ["has_accelerator", "keep", "memory", "release"]

ACCELERATORS = "/dev/nvidiactl", "/dev/kfd"  # through which the drivers of GPUs are reached


def memory() -> tuple[int, int]:
    """Free and total memory in bytes: of the machine, or of its container if that has less."""
    with open("/proc/meminfo") as file:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            with open(path) as file:
                limit = file.read().strip()
            if limit.isdigit() and int(limit) < total:
                total = int(limit)
                free = min(free, total)
    return free, total


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
