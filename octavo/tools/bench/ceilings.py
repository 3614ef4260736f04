"""Measures the ceilings of the machine: copy bandwidth and the rate of a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from octavo.platform import Platform
from octavo.tools.bench.limit import Ceilings

__all__ = ["measure_ceilings", "peak_memory", "synchronize"]

COPY_BYTES = (1 << 30, 1 << 28)  # on an accelerator, on a CPU; far larger than any cache
SIDE, TRIAL = (8192, 2048), 256
ROUNDS, CALLS = 7, (10, 1)
Factors = tuple[torch.Tensor, torch.Tensor]


def synchronize(platform: Platform) -> None:
    """Waits for the device."""
    if not platform.is_cpu:
        torch.accelerator.synchronize()


def peak_memory(platform: Platform) -> int:
    """Peak bytes that this process held on the device; on a CPU, its peak memory."""
    if platform.is_cpu:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.max_memory_reserved())


def measure_ceilings(platform: Platform) -> Ceilings:
    """Copy bandwidth (bytes read plus bytes written), and the rates of a large product in FP8 and in the other dtype (on a CPU
    the faster of BF16 and FP32).

    The data is random: on zeros a device draws less power and runs faster than with real data.
    """
    on, cpu = platform.device, int(platform.is_cpu)
    bandwidth = _bandwidth(platform, torch.empty(COPY_BYTES[cpu], dtype=torch.uint8, device=on).random_())
    side = SIDE[cpu]
    a, b = (torch.randn(side, side, device=on, dtype=torch.bfloat16) for _ in range(2))
    operations = 2 * side**3
    factors = {torch.bfloat16: (a, b)}
    if platform.is_cpu:
        factors = _worth_timing(platform, factors | {torch.float32: (a.float(), b.float())})
    took = {dtype: _best(platform, partial(torch.matmul, *pair)) for dtype, pair in factors.items()}
    dtype = min(took, key=lambda one: took[one])
    fp8 = 0.0 if platform.is_cpu else operations / min(_best(platform, call) for call in _fp8_products(platform, a, b))
    return Ceilings(bandwidth, fp8, operations / took[dtype], str(dtype).removeprefix("torch."))


def _worth_timing(platform: Platform, factors: dict[torch.dtype, Factors]) -> dict[torch.dtype, Factors]:
    """Drops dtypes whose small product is far slower than another's. Without BF16 instructions a large one takes minutes."""
    took = {
        dtype: _best(platform, partial(torch.matmul, *(x[:TRIAL, :TRIAL].clone() for x in pair)))
        for dtype, pair in factors.items()
    }
    return {dtype: pair for dtype, pair in factors.items() if took[dtype] < 8 * min(took.values())}


def _bandwidth(platform: Platform, source: torch.Tensor) -> float:
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(platform, lambda: target.copy_(source))


def _fp8_products(platform: Platform, a: torch.Tensor, b: torch.Tensor) -> list[Callable[[], object]]:
    """FP8 products with both accumulation modes of torch."""
    codes, other, one = a.to(platform.fp8_dtype), b.to(platform.fp8_dtype).mT, torch.ones((), device=a.device)

    def product(fast: bool) -> Callable[[], object]:
        return lambda: torch._scaled_mm(codes, other, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return [product(False), product(True)]


def _best(platform: Platform, call: Callable[[], object]) -> float:
    """Seconds per call in the best round, because a ceiling is the undisturbed speed."""
    calls = CALLS[int(platform.is_cpu)]
    times = []
    for _ in range(ROUNDS + 1):  # the first round is warm-up
        synchronize(platform)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(platform)
        times.append((time.perf_counter() - start) / calls)
    return min(times[1:])
