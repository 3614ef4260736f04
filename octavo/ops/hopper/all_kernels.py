"""Compiles the kernels for Hopper that depend on no model, for an image and without a GPU.

python -m octavo.ops.hopper.all_kernels
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from octavo.ops.hopper import (
    all_reduce,
    attention,
    block_gate_up_silu,
    block_gemm,
    experts,
    few_requests,
    few_tokens,
    gate_up_silu,
    qkv_rope_kv_write,
    route,
)
from octavo.ops.hopper.compile import KEPT, Kernels, NoKernel, missing

__all__ = ["compile_all", "every_kernel"]


def every_kernel() -> Iterator[Kernels]:
    """The kernels whose variants are compiled while a model is loaded."""
    for module in (
        attention, block_gate_up_silu, block_gemm, experts, few_requests, few_tokens, gate_up_silu, qkv_rope_kv_write, route,
    ):  # fmt: skip
        yield from (value for value in vars(module).values() if isinstance(value, Kernels))
    yield all_reduce.kernels(*all_reduce.USUAL_RANKS)


def compile_all() -> int:
    """Keeps each variant in the user's cache. Returns how many there are, and raises NoKernel with the compiler's message."""
    if (reason := missing()) is not None:
        raise NoKernel(reason)
    started = [future for kernels in every_kernel() for future in kernels.compiling().values()]
    return sum(len(future.result()) > 0 for future in started)


if __name__ == "__main__":
    began = time.monotonic()
    try:
        count = compile_all()
    except NoKernel as error:
        sys.exit(f"octavo: {error}")
    print(f"{count} kernels for Hopper compiled into {KEPT} in {time.monotonic() - began:.0f} s")
