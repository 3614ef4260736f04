"""What is told of a device: facts that are asked of it, and what follows from its architecture."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import octavo
from octavo import host, platform
from octavo.errors import OctavoError
from octavo.platform import Platform, check_fp8_units, detect, threads_on

CPU = torch.device("cpu")
H200 = SimpleNamespace(
    name="H200", major=9, minor=0, multi_processor_count=132, shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
)  # fmt: skip
MI300X = SimpleNamespace(
    name="MI300X", major=9, minor=4, multi_processor_count=304, shared_memory_per_block=64 << 10,
    gcnArchName="gfx942:sramecc+:xnack-",
)  # fmt: skip


@pytest.mark.parametrize(
    ("properties", "hip", "expected"),
    [
        (H200, None, ("sm_90", 132, 227 << 10, torch.float8_e4m3fn)),
        (MI300X, "7.0", ("gfx942", 304, 64 << 10, torch.float8_e4m3fnuz)),
    ],
    ids=["sm_90", "gfx942"],
)
def test_a_device_is_asked_once(
    properties: SimpleNamespace, hip: str | None, expected: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda rank: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OctavoError, match=r"^4 ranks are to run here .*, and 2 accelerator\(s\) are seen"):
        detect("cuda", 1, 4)
    found = detect("cuda", 1, 2)
    assert found.device == torch.device("cuda", 1)
    assert (found.arch, found.multiprocessors, found.shared_memory, found.fp8_dtype) == expected


def test_an_amd_gpu_that_this_user_may_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HIP would say that there is no device."""
    device = tmp_path / "kfd"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(platform, "KFD", device)
    monkeypatch.setattr(os, "access", lambda path, mode: path != device)
    assert detect("auto").is_cpu
    device.touch()
    for asked in ("auto", "cuda"):
        with pytest.raises(OctavoError, match=rf"kfd may not be opened by this user; put it into the group {os.getgid()} "):
            detect(asked)
    assert detect("cpu").is_cpu
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert detect("auto").is_cpu


def test_what_an_architecture_has() -> None:
    """Dependent launches, matrix instructions of a group of warps, depth of a pipeline, bounded registers."""
    made = {
        arch: (p.has_dependent_launch, p.has_warpgroup_mma, p.pipeline_depth, p.bounds_registers)
        for arch in ("sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "avx512")
        for p in [Platform(CPU, arch)]
    }
    assert made == {
        "sm_89": (False, False, 8, True),
        "sm_90": (True, True, 8, True),
        "sm_100": (True, False, 8, True),
        "sm_120": (True, False, 8, True),
        "gfx942": (False, False, 2, False),
        "gfx950": (False, False, 2, False),
        "avx512": (False, False, 2, False),
    }


def test_what_has_no_fp8_units_is_refused_before_a_kernel_fails() -> None:
    for arch in ("sm_89", "sm_90", "sm_120", "gfx942", "gfx950", "gfx1201"):
        check_fp8_units("it", arch)
    for arch in ("sm_75", "sm_86", "gfx803", "gfx906", "gfx90a", "gfx1030", "gfx1100", "gfx1151"):
        with pytest.raises(OctavoError, match=rf"^it \({arch}\) has no FP8 units"):
            check_fp8_units("it", arch)


def test_threads_begin_on_the_device_of_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no module below the engine makes threads otherwise."""
    begun: list[int] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", begun.append)
    for device, expected in (("cuda:3", [3]), ("cuda", [0]), ("cpu", []), ("meta", [])):
        begun.clear()
        with threads_on(torch.device(device), 1, "test") as pool:
            assert pool.submit(int).result() == 0
        assert begun == expected, device
    root = Path(octavo.__file__).parent
    files = [path for folder in ("ops", "weights", "layers", "models") for path in (root / folder).rglob("*.py")]
    assert len(files) > 50
    assert [path for path in files if "ThreadPoolExecutor" in path.read_text()] == []


@pytest.mark.parametrize(
    ("folder", "limit", "used", "prefix"),
    [(".", "memory.max", "memory.current", ""), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")],
    ids=["version 2", "version 1"],
)
def test_a_container_has_what_its_limit_leaves(
    folder: str, limit: str, used: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its page cache counts as free, as the machine's does."""
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    machine = host.memory()
    group, mib = tmp_path / folder, 1 << 20
    group.mkdir(exist_ok=True)
    (group / used).write_text(f"{90 * mib}\n")
    (group / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {20 * mib}\n{prefix}active_file {10 * mib}\nfile 7\n")
    for written, expected in ((str(100 * mib), (40 * mib, 100 * mib)), (str(50 * mib), (0, 50 * mib))):
        (group / limit).write_text(f"{written}\n")
        assert host.memory() == expected
    for unlimited in ("max", str(1 << 62)):
        (group / limit).write_text(f"{unlimited}\n")
        assert host.memory()[1] == machine[1]
