"""Every Triton kernel compiles for chips that are not here: with FP8 matrix instructions, no spills, within their memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.ops.hopper.compile import missing

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hardware.md"
sys.path.insert(0, str(ROOT / "scripts"))
import hardware  # noqa: E402

MEMORY = {"sm_90": 227, "gfx942": 64, "gfx950": 160}  # KiB of a multiprocessor that one program may have
FP8 = {"sm_90": "e4m3.e4m3", "gfx942": "fp8_fp8", "gfx950": "f8f6f4|fp8_fp8"}  # the latter where K is shorter than 64
MULTIPLIES_FP8 = {
    *(f"small_linear_{bm}" for bm in (16, 32, 64)), "block_linear_16", "block_linear_128", "decode_attention_fp8",
    "decode_attention_per_head", "decode_attention_fp8_new", "decode_attention_per_head_new", "prefill_attention_fp8",
    "prefill_attention_fp8_256", "decode_attention_fp8_new_by_head", "prefill_attention_fp8_by_head",
    "latent_attention_fp8", "latent_attention_fp8_chosen",
    *(f"grouped_linear_fp8_{bm}" for bm in (16, 32, 64, 128)),
    *(f"grouped_linear_{scales}_{bm}" for scales in ("tiles", "channels") for bm in (16, 32, 64)),
    "w4a8_128_128", *(f"w4a8_{group}_{bm}" for group in (32, 128) for bm in (16, 32, 64)),
    "index_logits_codes_single", "index_logits_codes_groups",
}  # fmt: skip
MULTIPLIES_BF16 = {
    "decode_attention_bf16", "decode_attention_bf16_new", "prefill_attention_bf16", "prefill_attention_bf16_256",
    "latent_attention_fp8", "latent_attention_fp8_chosen", "latent_attention_fp8_many", "latent_attention_bf16",
    "latent_attention_bf16_chosen", "latent_attention_bf16_many", "expanded_attention",
    "route_few", "route_many", "route_groups",
    *(f"grouped_linear_{kind}_{bm}" for kind in ("bf16", "weights") for bm in (16, 32, 64, 128)),
    *(f"w4a16_{group}_{kind}" for group in (32, 128) for kind in (16, 32, 64, "split")),
    "index_keys_codes", "index_queries_codes", "segment_attention",
}  # fmt: skip
# Its registers are bounded so that three programs share a multiprocessor, which pays for ten values that go to memory.
SPILLS = {("sm_90", "prefill_attention_fp8"): 48, ("sm_90", "prefill_attention_fp8_by_head"): 48}  # bytes
SPILLS[("sm_90", "latent_attention_fp8_chosen")] = 8  # of 255 registers, so that two programs share a multiprocessor
# Many rows over codes are widened there, and multiplied as codes where every number of rows takes the same tiles.
FEW_TILES = {"gfx942": {"latent_attention_fp8_many"}, "gfx950": {"latent_attention_fp8_many"}}


@cache
def compiled(target: str) -> dict[str, dict[str, Any]]:
    """In a process of its own: this one interprets its kernels. Without numbers of lines, which take a sixth of the time."""
    script = Path(__file__).with_name("cross_compile.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run([sys.executable, script, target], capture_output=True, text=True, timeout=1200, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {one["kernel"]: one for one in found}


@pytest.mark.parametrize("target", MEMORY)
def test_kernels_compile(target: str) -> None:
    kernels = compiled(target)
    missing = (MULTIPLIES_FP8 | MULTIPLIES_BF16) - kernels.keys()
    assert missing <= (
        {"w4a8_32_128", "w4a8_128_128"} if target == "gfx942" else set()
    )  # whose tiles its memory is too small for
    for name, one in kernels.items():
        assert one["spills"] <= SPILLS.get((target, name), 0), f"{name} spills"
        assert one["shared"] <= MEMORY[target] * 1024, f"{name} takes {one['shared']} bytes"
        instructions = " ".join(one["matrix"])
        wanted = name in MULTIPLIES_FP8 | FEW_TILES.get(target, set())
        assert bool(re.search(FP8[target], instructions)) == wanted, f"{name}: {instructions}"
        assert ("bf16" in instructions) == (name in MULTIPLIES_BF16), f"{name}: {instructions}"
    assert hardware.kernel_table({target: {name: one["matrix"] for name, one in kernels.items()}})[2:] == page_of(target)


def page_of(target: str) -> list[str]:
    """The rows of docs/hardware.md with the column of one chip."""
    lines = PAGE.read_text().partition("## Triton's kernels, compiled")[2].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    place = head.index(target)
    return [f"| {row[0]} | {row[place]} |" for row in rows if row[place] != "not there"]


@pytest.mark.skipif(missing() is not None, reason=f"needs NVRTC, for the kernels that it compiles: {missing()}")
def test_the_page_names_the_products() -> None:
    assert "\n".join(hardware.products()) in PAGE.read_text()


def test_hopper_uses_warpgroup_instructions() -> None:
    """Anything else there runs at half of the rate or less."""
    for name, one in compiled("sm_90").items():
        assert all(kind.startswith("wgmma") for kind in one["matrix"]), f"{name}: {one['matrix']}"
