"""How kernels are launched, or compiled ahead, without a device: a kernel that remembers what was asked of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import over

from octavo import batch as batches
from octavo.ops import Router, ahead
from octavo.ops.triton import launch, routing
from octavo.platform import Platform


class Kernel:
    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.compiled: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launched.append((grid, args, options))

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.compiled.append((grid, args, options))


def test_a_kernel_is_launched_with_the_options_of_all() -> None:
    kernel, x = Kernel(), torch.ones(3)
    launch.launch(kernel, (2, 3), x, 5, BLOCK=16)
    overlap = {"PDL": True, "launch_pdl": True} if launch._platform.has_dependent_launch else {"PDL": False}
    assert kernel.launched == [((2, 3), (x, 5), {"BLOCK": 16, **overlap})]


def test_what_is_launched_depends_on_the_platform_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_platform", launch._platform)  # which is put back
    made = {}
    for arch in ("sm_89", "sm_90", "sm_100", "gfx942"):
        fp8 = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
        launch.configure(Platform(torch.device("cpu"), arch, fp8, multiprocessors=7, shared_memory=9 << 10))
        launch.launch(kernel := Kernel(), (1,))
        assert (launch.device_units(), launch.shared_memory()) == (7, 9 << 10)
        made[arch] = (*kernel.launched[0][2].values(), launch.pipeline(4), launch.registers(64), launch.codes(fp8)["LIMIT"])
    assert made == {
        "sm_89": (False, 4, {"maxnreg": 64}, 448),
        "sm_90": (True, True, 4, {"maxnreg": 64}, 448),
        "sm_100": (True, True, 4, {"maxnreg": 64}, 448),
        "gfx942": (False, 2, {}, 224),
    }


def test_what_differs_is_compiled_once_and_nothing_is_launched() -> None:
    kernel, x = Kernel(), torch.ones(64)
    same = [(x, 32, None), (torch.zeros(9), 48, None)]
    others = [(x[1:], 32, None), (x.bfloat16(), 32, None), (x, 33, None), (x, 1, None), (x, 1 << 40, None), (x, 32, 2.0)]
    with launch.compile_ahead():
        for args in (*same, *others, *same):
            launch.launch(kernel, (1,), *args, BLOCK=16)
        launch.launch(kernel, (1,), *same[0], BLOCK=32)
    assert len(kernel.compiled) == 1 + len(others) + 1
    assert not kernel.launched
    launch.launch(kernel, (1,), *same[0], BLOCK=16)
    assert len(kernel.launched) == 1


def test_after_an_error_kernels_are_launched_again() -> None:
    kernel = Kernel()
    with pytest.raises(ValueError, match="no"), launch.compile_ahead():
        raise ValueError("no")
    launch.launch(kernel, (1,), 1)
    assert len(kernel.launched) == 1


@over("units", [78, 132, 304])
@over("experts, width, itemsize", [(128, 2048, 2), (256, 7168, 2), (9, 64, 4)])
def test_a_start_compiles_every_router_that_a_step_needs(experts: int, width: int, itemsize: int, units: int) -> None:
    """Steps that mix prompts and decodes have any number of tokens; each shape is compiled where one is compiled ahead."""
    given = Router(2), batches.build([batches.Span([0] * 3, 0, [0])], 4, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "device_units", lambda: units)
        needed = {tuple(routing._route_shape(n, experts, width, itemsize).values()) for n in range(1, 20_000)}
        seen: list[tuple[int, ...]] = []
        patch.setattr(routing, "launch", lambda *_, BE, BM, BK, SPLIT, **o: seen.append((BE, BM, BK, SPLIT, o["num_warps"])))
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        with ahead.mode():
            routing.route(torch.zeros(3, width, dtype=dtype), torch.zeros(experts, width, dtype=dtype), None, *given)
    assert {shape[:5] for shape in needed} == set(seen)
