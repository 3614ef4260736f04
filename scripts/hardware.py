"""Prints docs/hardware.md: what runs on which hardware, by scheme, op and kernel.

    python scripts/hardware.py > docs/hardware.md

The implementations are the first ones of a platform's list that take a weight. The kernels are compiled for chips that are not
here, as the tests compile them, which takes minutes; `tests/ops/test_compile.py` compares the page's table with theirs. What
ran, and when, is written by hand: DONE.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from octavo.ops import cpu, cuda, rocm
from octavo.platform import Platform
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, FP8_W8A16, QTensor, Scheme, quantize

CROSS_COMPILE = Path(__file__).parents[1] / "tests" / "ops" / "cross_compile.py"
TARGETS = ("sm_90", "gfx942", "gfx950")
GPU = torch.device("cuda")
PLATFORMS = {
    "NVIDIA Hopper (sm_90)": Platform(GPU, "sm_90", multiprocessors=132, shared_memory=227 << 10),
    "MI300X, MI325X (gfx942)": Platform(GPU, "gfx942", torch.float8_e4m3fnuz, multiprocessors=304, shared_memory=64 << 10),
    "MI350X, MI355X (gfx950)": Platform(GPU, "gfx950", multiprocessors=256, shared_memory=160 << 10),
    "x86-64": Platform(torch.device("cpu"), "avx512"),
}
RAN = """\
# Hardware

**Nothing ran on an AMD GPU.** For gfx942 and gfx950 every Triton kernel is compiled and its machine code read (below), and its
arithmetic runs on CPUs, interpreted. [rocm.md](rocm.md) has what a person with such a card should run first.

Printed by `python scripts/hardware.py`. Tests compare the two lower tables with the code.

## What ran

| hardware | what | last | how |
|---|---|---|---|
"""
DONE = [
    (
        "H200",
        "all steps of the check of a new GPU: the tests of ops (447 passed; its host's AMX too), of the engine against the "
        "CPU's model, of weights (49 passed) and of what `octavo plan` says of memory, the demo model, accuracy of each scheme "
        "and cache, throughput of 8B (A to F) in `ptpc_fp8`, `fp8`, `fp8_block` and BF16",
        "1 December 2026",
        "`python scripts/check_gpu.py` at 89084ba",
    ),
    (
        "H200",
        "70B whole, 30 layers of 405B and 8B over HTTP: memory beside the plan, a rank killed; Qwen3-30B-A3B's throughput "
        "(A to D)",
        "1 December 2026",
        "`python -m bench.large_models -tp 1`, `octavo bench throughput` at 89084ba ([RESULTS.md](../bench/RESULTS.md))",
    ),
    (
        "H200",
        "throughput of MLA and sparse attention at six layers, INT4 experts, vision towers, Qwen3-30B-A3B in `fp8_block`, "
        "`fp8_w8a16` (8B, B and C), an 8B whole calibrated; on 29 November 8B over HTTP by the CUDA image's steps",
        "30 November 2026",
        "`octavo bench` ([RESULTS.md](../bench/RESULTS.md))",
    ),
    (
        "H200",
        "experts of `fp8_w8a16` and products of `--decode-activations bf16` against their references, and a model's steps with"
        " that flag, without graphs",
        "30 November 2026",
        "`pytest tests/ops/test_exact_few.py tests/engine/test_decode_activations.py`; `tests/ops/test_experts.py` of that"
        " scheme",
    ),
    (
        "H200",
        "`--kv-cache-rounding calibrated`: the kernels against the definition, decoding against prefills, its speed",
        "30 November 2026",
        "`pytest tests/ops/test_round_keys.py tests/engine/test_key_rounding.py tests/engine/test_gpu.py` at 622b1cc",
    ),
    (
        "four H200s",
        "Llama-3.1-405B, Qwen3-VL-235B's text and Llama-3.1-70B, whole, on four ranks over HTTP: memory beside the plan, "
        "throughput, a rank killed",
        "30 November 2026",
        "`python -m bench.large_models -tp 4` ([RESULTS.md](../bench/RESULTS.md))",
    ),
    (
        "two H200s",
        "dense models (8B and 70B) and Qwen3-VL-235B's text, whole, on two ranks, with sums over NCCL and by Octavo's "
        "kernels: throughput; over NCCL the greedy tokens of one rank in FP32, again after sleep and reload; experts whole on "
        "a rank; two engines over HTTP; a rank killed and one stopped",
        "30 November 2026",
        "`octavo bench throughput -tp 2`, `python -m bench.engines`, `python -m bench.large_models -tp 2` "
        "([RESULTS.md](../bench/RESULTS.md)), `LLM(tensor_parallel_size=2)`",
    ),
    (
        "two and four H200s",
        "all-reduce kernels alone, beside NCCL",
        "30 November 2026",
        "`python -m bench.all_reduce` on two, on 30 November; on four a script of which that is what was kept",
    ),
    (
        "two H200s",
        "two pipeline stages, with graphs and without, also as two hosts of this machine (`--nnodes 2`): the tokens "
        "of one GPU in FP32, and throughput of 8B",
        "30 November 2026",
        "`pytest tests/engine/test_pipeline_gpu.py` asks the same, `octavo bench throughput -pp 2` "
        "([RESULTS.md](../bench/RESULTS.md))",
    ),
    (
        "GPUs",
        "**not run**: eight ranks, more than two stages, stages of several ranks, hosts that a network lies between, Ray, "
        "DeepSeek and Kimi whole",
        "",
        "on CPUs alone",
    ),
    (
        "H100",
        "dense models: throughput, accuracy, memory",
        "26 November 2026",
        "`octavo bench`, `pytest tests/engine/test_gpu.py`",
    ),
    (
        "x86-64: AVX-512 with and without BF16, AVX2, AMX, portable C",
        "everything that is served, ranks over gloo included",
        "29 November 2026",
        "`make test`, which runs each instruction set that a CPU has",
    ),
    (
        "Xeon with AMX, 2 of its cores",
        "products, experts, attention, recorded steps against their references; 0.6 B and 25 M served",
        "1 December 2026",
        "`pytest tests/ops`, `python -m bench.serving` ([RESULTS.md](../bench/RESULTS.md))",
    ),
    (
        "MI300X, MI325X, MI350X, MI355X",
        "**nothing**",
        "",
        "compiled alone",
    ),
    (
        "Blackwell (sm_100, sm_120), Ada (sm_89)",
        "nothing",
        "",
        "Triton's kernels should run; Hopper's own refuse",
    ),
]
PRODUCTS = """
## Products, by scheme

The first implementation that takes a weight of 512 x 512 in the scheme.

"""
KERNELS = """
## Triton's kernels, compiled

The matrix instructions in the machine code; "none" where a kernel has nothing to multiply. FP8 is `e4m3` on sm_90, `fp8_fp8`
and `f8f6f4` on AMD. On Hopper alone megakernels, attention over an FP8 cache, fused GEMMs, block FP8 and experts of more than
32 tokens, and sums over ranks are CUDA C++ (`octavo/ops/hopper`).

"""
SCHEMES: Sequence[tuple[str, Scheme]] = [
    ("`fp8`", FP8_PER_TENSOR), ("`ptpc_fp8`", FP8_PER_CHANNEL), ("`fp8_block`", FP8_BLOCK),
    ("`ptpc_fp8`, `--decode-activations bf16`", FP8_PER_CHANNEL.with_exact_few), ("`fp8_w8a16`", FP8_W8A16), ("BF16", BF16),
]  # fmt: skip


def weight(scheme: Scheme, platform: Platform, lead: tuple[int, ...] = ()) -> QTensor:
    """A weight [512, 512], or a stack of two."""
    one = quantize(torch.randn(512, 512).to(torch.bfloat16), scheme, platform.fp8_dtype)
    if not lead:
        return one
    scale = None if one.scale is None else torch.stack([one.scale] * 2)
    return QTensor(torch.stack([one.data] * 2), scale, one.scheme, (2, 512, 512))


def chosen(platform: Platform) -> Iterator[tuple[str, str]]:
    """What is multiplied, and by what."""
    of = cpu if platform.is_cpu else rocm if platform.arch.startswith("gfx") else cuda
    for name, scheme in SCHEMES:
        for kind, implementations, lead in (("", of.LINEAR, ()), (", experts", of.STACKS, (2,))):
            q = weight(scheme, platform, lead)
            found = next(
                (one.name for one in implementations if one.supports(q, platform) is None), "torch, on decoded weights"
            )
            yield f"{name}{kind}", found.partition(", avx")[0].partition(", amx")[0]


def products() -> list[str]:
    """The table of products, a row a scheme."""
    columns = {name: dict(chosen(platform)) for name, platform in PLATFORMS.items()}
    first = next(iter(columns.values()))
    return rows(["weights", *columns], ([name, *(column[name] for column in columns.values())] for name in first))


def kernel_table(compiled: dict[str, dict[str, list[str]]]) -> list[str]:
    """The table of kernels; compiled: target -> kernel -> the matrix instructions."""
    names = dict.fromkeys(name for kernels in compiled.values() for name in kernels)

    def cell(target: str, name: str) -> str:
        if name not in compiled[target]:
            return "not there"
        return ", ".join(f"`{kind}`" for kind in shortened(compiled[target][name])) or "none"

    return rows(["kernel", *compiled], ([f"`{name}`", *(cell(target, name) for target in compiled)] for name in names))


def shortened(instructions: Iterable[str]) -> list[str]:
    """Instructions without what is the same in all: PTX's are cut to their shape and types."""
    return sorted({one.replace("wgmma.mma_async.sync.aligned.", "wgmma ").replace(":", "") for one in instructions})


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    titles = list(head)
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *body)]


def compiled_here() -> dict[str, dict[str, list[str]]]:
    out: dict[str, dict[str, list[str]]] = {}
    for target in TARGETS:
        done = subprocess.run([sys.executable, str(CROSS_COMPILE), target], capture_output=True, text=True, check=True)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        out[target] = {one["kernel"]: one["matrix"] for one in found}
    return out


def page(compiled: dict[str, dict[str, list[str]]]) -> str:
    return "\n".join(
        [RAN + "\n".join(f"| {' | '.join(row)} |" for row in DONE), PRODUCTS, *products(), KERNELS, *kernel_table(compiled), ""]
    ).replace("\n\n\n", "\n\n")


if __name__ == "__main__":
    print(page(compiled_here()), end="")
