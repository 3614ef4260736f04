"""Accelerators by name, and what is in this machine. Bytes, bytes a second, operations a second; peaks are dense ones.

Sources: the vendors' data sheets (AMD Instinct MI300X, MI300A, MI325X, MI350X, MI355X; NVIDIA H100, H200, L40S, DGX and HGX
B200, B300, GB200; the Ada and Blackwell GeForce white papers; A100). `memory` is what drivers offer of it, less than the label
where ECC and firmware keep some; `link` is what one accelerator sends to its peers, one direction.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
from dataclasses import dataclass, replace

from octavo.errors import OctavoError, refusal
from octavo.host import memory
from octavo.platform import check_fp8_units

__all__ = ["ACCELERATORS", "Accelerator", "choose", "find", "in_this_machine"]

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator, or this machine's CPU. Rates of 0 are not known."""

    name: str
    arch: str
    memory: int  # bytes
    free: int = 0  # bytes; of a CPU only, whose memory others use too
    bandwidth: float = 0.0
    bf16: float = 0.0
    fp8: float = 0.0
    link: float = 0.0

    @property
    def is_cpu(self) -> bool:
        return self.free > 0

    @property
    def has_fp8(self) -> bool:
        """A CPU has no FP8 units either, but Octavo serves FP8 on it."""
        return self.refusal is None

    @property
    def refusal(self) -> str | None:
        """What the engine says of an accelerator without FP8 units."""
        return refusal(lambda: check_fp8_units(self.name, self.arch))


def _row(name: str, arch: str, gib: float, tb_s: float, bf16: float, fp8: float, link_gb_s: float) -> Accelerator:
    return Accelerator(name, arch, int(gib * GIB), 0, tb_s * 1e12, bf16 * 1e12, fp8 * 1e12, link_gb_s * 1e9)


# name, architecture, GiB, TB/s, BF16 and FP8 TFLOP/s, link GB/s
ACCELERATORS = {
    "mi300x": _row("AMD Instinct MI300X", "gfx942", 192, 5.3, 1307.4, 2614.9, 448),
    "mi300a": _row("AMD Instinct MI300A", "gfx942", 128, 5.3, 980.6, 1961.2, 384),
    "mi325x": _row("AMD Instinct MI325X", "gfx942", 256, 6.0, 1307.4, 2614.9, 448),
    "mi350x": _row("AMD Instinct MI350X", "gfx950", 288, 8.0, 2306.9, 4613.7, 537.6),
    "mi355x": _row("AMD Instinct MI355X", "gfx950", 288, 8.0, 2516.6, 5033.2, 537.6),
    "mi250x": _row("AMD Instinct MI250X (one of its two dies)", "gfx90a", 64, 1.6, 191.5, 0, 200),
    "h100": _row("NVIDIA H100 SXM", "sm_90", 79.1, 3.35, 989.4, 1978.9, 450),
    "h100-pcie": _row("NVIDIA H100 PCIe", "sm_90", 79.1, 2.0, 756, 1513, 64),
    "h100-nvl": _row("NVIDIA H100 NVL", "sm_90", 93.1, 3.9, 835, 1671, 300),
    "h20": _row("NVIDIA H20", "sm_90", 95.1, 4.0, 148, 296, 450),
    "h200": _row("NVIDIA H200 SXM", "sm_90", 139.8, 4.8, 989.4, 1978.9, 450),
    "b200": _row("NVIDIA B200 (HGX)", "sm_100", 178.4, 7.7, 2250, 4500, 900),
    "gb200": _row("NVIDIA GB200, one GPU", "sm_100", 184.0, 8.0, 2500, 5000, 900),
    "b300": _row("NVIDIA B300 (HGX)", "sm_103", 267.7, 8.0, 2250, 4500, 900),
    "l40s": _row("NVIDIA L40S", "sm_89", 44.5, 0.864, 362, 733, 32),
    "rtx4090": _row("NVIDIA GeForce RTX 4090", "sm_89", 23.5, 1.008, 165.2, 330.3, 32),
    "rtx5090": _row("NVIDIA GeForce RTX 5090", "sm_120", 31.4, 1.792, 209.5, 419, 64),
    "a100": _row("NVIDIA A100 80 GB", "sm_80", 79.2, 2.039, 312, 0, 300),
}


def find(name: str) -> Accelerator:
    """The accelerator called `name`. Raises OctavoError with a suggestion."""
    plain = name.lower().replace(" ", "").replace("_", "-")
    if plain == "cpu":
        return host()
    if plain not in ACCELERATORS:
        near = difflib.get_close_matches(plain, ACCELERATORS, n=1, cutoff=0.0)
        known = ", ".join([*ACCELERATORS, "cpu"])
        raise OctavoError(f"--accelerator '{name}' is not known; did you mean '{near[0]}'? Known are: {known}.")
    return ACCELERATORS[plain]


def choose(name: str | None, device: str) -> tuple[Accelerator, int]:
    """What --accelerator and --device mean, and how many of it there are. Raises OctavoError where no machine could be both."""
    if name is None and device == "cpu":
        return host(), 1
    found, number = in_this_machine() if name is None else (find(name), 1)
    if name is not None and device != "auto" and found.is_cpu != (device == "cpu"):
        raise OctavoError(f"--device {device} and --accelerator {name} contradict each other; give one of them.")
    if device == "cuda" and found.is_cpu:
        raise OctavoError("--device cuda: this machine has no accelerator; name the one that is meant with --accelerator.")
    return found, number


def in_this_machine() -> tuple[Accelerator, int]:
    """What this machine has and how many: asks the vendors' tools; without either, the CPU."""
    return _nvidia() or _amd() or (host(), 1)


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _nvidia() -> tuple[Accelerator, int] | None:
    lines = _ask("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits").splitlines()
    if not lines or len(fields := [field.strip() for field in lines[0].split(",")]) != 3 or not fields[1].isdigit():
        return None
    return _named(fields[0], f"sm_{fields[2].replace('.', '')}", int(fields[1]) << 20), len(lines)


def _amd() -> tuple[Accelerator, int] | None:
    try:
        answer = json.loads(_ask("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json") or "{}")
    except ValueError:
        return None
    cards = [card for name, card in answer.items() if name.startswith("card")]
    if not cards:
        return None
    card = cards[0]
    name = card.get("Card Series") or card.get("Card series") or card.get("Card Model") or "an AMD accelerator"
    return _named(name, card.get("GFX Version", "gfx?"), int(card.get("VRAM Total Memory (B)", 0))), len(cards)


def _named(name: str, arch: str, memory: int) -> Accelerator:
    """The table's row for a name that a driver reports: the longest key whose every word the name has."""
    words = name.lower().replace("-", " ").replace("rtx ", "rtx")
    hits = [key for key, row in ACCELERATORS.items() if row.arch == arch and all(word in words for word in key.split("-"))]
    row = ACCELERATORS[max(hits, key=len)] if hits else Accelerator(name, arch, memory)
    return replace(row, name=name, memory=memory or row.memory)


def host() -> Accelerator:
    """This machine's CPU and its memory."""
    free, total = memory()
    return Accelerator(f"CPU, {len(os.sched_getaffinity(0))} cores", "cpu", total, free)
