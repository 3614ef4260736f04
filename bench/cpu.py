"""The C kernels beside torch and beside what this machine can do, all in one run.

    python -m bench.cpu                     # products, experts, attention, and a model's resident memory
    python -m bench.cpu --only experts --tokens 1 4 16 64
    python -m bench.cpu --shape 1536x4096 --tokens 1 16

Weights are read from memory, not from a cache: each timed turn goes over matrices that are 160 MB together in FP8. GB/s are of
the weight as stored, GFLOP/s are 2 m n k. The limits are measured: reading by torch's sum over 512 MB, FP32 products of 2048.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import octavo.engine  # noqa: F401 (says how torch's threads wait, before torch is loaded)

import torch  # isort: skip

from bench.serving import COMMON, SIZES
from octavo import batch as batches
from octavo.kvcache import KVCache, LayerCache, Layout, spec_for
from octavo.ops import reference
from octavo.ops.contract import PackedStack
from octavo.ops.cpu import attention as torch_attention  # the kernels' where they are there
from octavo.ops.cpu import library, native
from octavo.ops.cpu.experts import NativeStack, dispatch
from octavo.ops.cpu.linear import Widened
from octavo.platform import Platform, detect
from octavo.quant import BF16, FP8_PER_CHANNEL, QTensor, concat, quantize
from octavo.quant.qtensor import Stacker

CPU = torch.device("cpu")
COLD = 160 << 20
HERE = Platform(CPU, "bench")
WIDENED = Platform(CPU, "bench", widened_dtype=torch.float32)


def seconds(turns: list[Callable[[], object]], at_least: float = 0.4) -> float:
    """Of one of the turns: the best of several goes over all of them."""
    best, spent, goes = float("inf"), 0.0, 0
    while spent < at_least or goes < 3:
        start = time.perf_counter()
        for turn in turns:
            turn()
        elapsed = time.perf_counter() - start
        best, spent, goes = min(best, elapsed), spent + elapsed, goes + 1
    return best / len(turns)


def limits() -> tuple[float, float]:
    """Bytes a second that are read, FP32 operations a second."""
    long, square = torch.ones(128 << 20), torch.randn(2048, 2048)
    return long.nbytes / seconds([long.sum]), 2 * 2048**3 / seconds([lambda: square @ square])


def scaled_mm(q: QTensor, x: torch.Tensor) -> torch.Tensor:
    """torch's own FP8 product."""
    assert q.scale is not None
    codes, scale = reference.quantize_activation(x, q.scheme.activation, q.data.dtype)
    return torch._scaled_mm(codes, q.data.mT, scale_a=scale, scale_b=q.scale.view(1, -1), out_dtype=torch.bfloat16)


def products(shape: tuple[int, int], tokens: list[int], read: float, flops: float) -> None:
    n, k = shape
    dense = [torch.randn(n, k).mul_(0.02).bfloat16() for _ in range(max(1, COLD // (n * k)))]
    fp8 = [quantize(w, FP8_PER_CHANNEL) for w in dense]
    ways: dict[str, tuple[int, list[Callable[[torch.Tensor], torch.Tensor]]]] = {
        "C kernels FP8": (1, [native.Native().pack(q, HERE) for q in fp8]),
        "C kernels BF16": (2, [native.Native().pack(quantize(w, BF16), HERE) for w in dense]),
        "FP8 widened to FP32, oneDNN": (4, [Widened().pack(q, WIDENED) for q in fp8[: max(1, len(fp8) // 4)]]),
        "torch BF16": (2, [lambda x, w=w: torch.nn.functional.linear(x, w) for w in dense[: max(1, len(dense) // 2)]]),
        "torch._scaled_mm": (1, [lambda x, q=q: scaled_mm(q, x) for q in fp8[:1]]),
    }
    print(f"\n[{n} x {k}] us of a product; GB/s of {read / 1e9:.1f}, GFLOP/s of {flops / 1e9:.0f}")
    for m in tokens:
        x = torch.randn(m, k).bfloat16()
        first = 0.0
        for name, (size, turns) in ways.items():
            try:
                turns[0](x)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"  m={m:<4} {name:<28} does not run here: {str(error).splitlines()[0][:60]}")
                continue
            used = turns if m < 64 else turns[:4]
            elapsed = seconds([lambda turn=turn, x=x: turn(x) for turn in used])
            first = first or elapsed
            print(
                f"  m={m:<4} {name:<28} {elapsed * 1e6:10.1f}  {size * n * k / elapsed / 1e9:6.1f} GB/s"
                f"  {2 * m * n * k / elapsed / 1e9:7.1f} GFLOP/s  {elapsed / first:6.2f}x",
                flush=True,
            )


def attention() -> None:
    """Decoding and prefilling over a paged cache, 8 query heads on 4 of keys, 64 wide."""
    heads, kv_heads, dim, size = 8, 4, 64, 16
    by_torch = sys.modules["octavo.ops.cpu.attention"].attention
    print("\nattention, us of a layer")
    for kv in ("fp8_e4m3", "bfloat16"):
        for requests, count, before in ((1, 1, 200), (16, 1, 200), (16, 1, 2000), (16, 128, 0), (1, 512, 1024)):
            blocks = -(-(count + before) // size)
            spans = [
                batches.Span([1] * count, before, list(range(1 + i * blocks, 1 + (i + 1) * blocks))) for i in range(requests)
            ]
            batch = batches.build(spans, size, CPU)
            cache = KVCache(
                [spec_for(kv, kv_heads, dim, torch.bfloat16, torch.float8_e4m3fn, Layout.on(True))],
                requests * blocks + 1,
                size,
                CPU,
            )
            slots = torch.arange(cache.num_blocks * size)
            kv_values = torch.randn(2, len(slots), kv_heads, dim).bfloat16()
            layer = LayerCache(cache.views[0], torch.tensor([0.01]), torch.tensor([0.01]))
            reference.write_kv(layer, slots, kv_values[0], kv_values[1])
            q = torch.randn(requests * count, heads, dim).bfloat16()
            times = [
                seconds([lambda way=way, q=q, layer=layer, b=batch: way(q, layer, b, 0.125, None)], 0.2)
                for way in (torch_attention, by_torch)
            ]
            print(
                f"  {kv:<9} {requests:>2} x {count:<3} tokens after {before:<4}  C kernels {times[0] * 1e6:9.1f}"
                f"  torch {times[1] * 1e6:9.1f}  {times[1] / times[0]:.1f}x"
            )


def experts(shape: str, tokens: list[int], read: float) -> None:
    """Products of stacks by tokens sent anywhere, GB/s of the experts that they wake; and products of one token's bytes."""
    count, active, hidden, inner = map(int, shape.split("x"))
    print(f"\n[{count} experts of {hidden} x {inner}, {active} a token] FP8, us of a product; GB/s of {read / 1e9:.1f}")

    def random(n: int, k: int) -> list[QTensor]:
        return [quantize(torch.randn(n, k).mul_(0.02), FP8_PER_CHANNEL) for _ in range(active)]

    def stacked(few: list[QTensor]) -> PackedStack:  # of a few again and again, each at a place of its own
        made = Stacker(count)
        for e in range(count):
            made.put(e, few[e % active])
        return NativeStack().pack(made.finished(), HERE)

    for name, n, k, of_tokens in (("gate and up", 2 * inner, hidden, True), ("down", hidden, inner, False)):
        few = random(n, k)
        stack, alike = stacked(few), concat(few)
        dense = [
            native.Native().pack(QTensor(alike.data.clone(), alike.scale, alike.scheme, alike.shape), HERE)
            for _ in range(max(1, COLD // alike.data.numel()))
        ]
        for m in tokens:
            x, rows = torch.randn(m, k).bfloat16(), torch.randn(m * active, k).bfloat16()
            sent = [dispatch(torch.rand(m, count).argsort(1)[:, :active].int().contiguous(), count) for _ in range(16)]
            used = sum(int((at.starts[1:] > at.starts[:-1]).sum()) for at in sent) / len(sent)
            elapsed = seconds([partial(stack, x if of_tokens else rows, at, of_tokens=of_tokens) for at in sent])
            one = seconds([partial(turn, x) for turn in dense])
            print(
                f"  m={m:<4} {name:<12} {used:5.1f} experts {elapsed * 1e6:9.1f}  {used * n * k / elapsed / 1e9:6.1f} GB/s"
                f"  {2 * m * active * n * k / elapsed / 1e9:6.1f} GFLOP/s   one weight of {active} experts' bytes"
                f" {one * 1e6:9.1f}  {active * n * k / one / 1e9:6.1f} GB/s",
                flush=True,
            )


RESIDENT = """
import sys, octavo.engine, torch
from octavo.config import EngineConfig
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
from octavo.engine.runner import ModelRunner
torch.randn(8, 8) @ torch.randn(8, 8)
before = resident()
runner = ModelRunner(EngineConfig(model=sys.argv[1], load_format="dummy", quantization=sys.argv[2], cpu_kv_cache_gib=0.1,
                                  quantize_lm_head=bool(sys.argv[3])))
print(resident() - before, runner.report.total("held") / 2**20, runner.report.total("values") * 2 / 2**20)
"""


def memory(size: str) -> None:
    print(
        f"\nresident memory of a {size} Llama, MiB more than before it was loaded; held as the engine counts; BF16's parameters"
    )
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(COMMON | SIZES[size]))
        for name, head in (("ptpc_fp8", ""), ("ptpc_fp8", "head too"), ("bf16", "")):
            command = [sys.executable, "-c", RESIDENT, directory, name, head]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"  {name:<9}{head:<9}", *(f"{float(x):9.1f}" for x in done.stdout.split()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["2816x512", "1536x4096"], help="n x k of weights")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 128, 512])
    parser.add_argument("--experts", default="128x8x2048x768", help="count x chosen x hidden x intermediate of experts")
    parser.add_argument("--only", choices=["products", "experts", "attention", "memory"], help="leave out the others")
    parser.add_argument("--model", choices=SIZES, default="0.6b", help="whose resident memory is measured")
    args = parser.parse_args()
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {model}, {detect('cpu').arch}; kernels: {library.used()}; torch {torch.__version__}")
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        print(f"products by {dtype}:", ", ".join(f"m={m} {library.way_of(dtype, m)}" for m in (1, 2, 3, 4, 8, 16, 32, 64)))
    read, flops = limits()
    print(f"reads {read / 1e9:.1f} GB/s, multiplies {flops / 1e9:.0f} GFLOP/s in FP32")
    for shape in args.shape if args.only in (None, "products") else []:
        n, k = map(int, shape.split("x"))
        products((n, k), args.tokens, read, flops)
    if args.only in (None, "experts"):
        experts(args.experts, args.tokens, read)
    if args.only in (None, "attention"):
        attention()
    if args.only in (None, "memory"):
        memory(args.model)


if __name__ == "__main__":
    main()
