"""Times sums over ranks on the GPUs of this host, beside the library's, with and without the norm that follows.

    python -m bench.all_reduce --ranks 2

Microseconds of one call in a captured graph, on rank 0. Norm: residual add, RMSNorm and codes with a scale a token, behind the
library in a launch of its own. Of more than two ranks the kernel is timed in one shot and in two.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch.multiprocessing.spawn import spawn

from bench.timing import in_graph
from octavo import ops
from octavo.distributed import TensorParallel, file_store, join, leave
from octavo.ops import gpu
from octavo.ops.contract import CodeFormat, PackedWeight
from octavo.ops.hopper import all_reduce
from octavo.platform import detect
from octavo.quant.scheme import Granularity

ROWS, WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192), (4096, 8192)
ROUNDS, CALLS, LARGE = 20, 20, 1024


def measure(rank: int, ranks: int, directory: str) -> None:
    """One rank's process."""
    platform = detect("cuda", rank, ranks)
    tp = join(rank, ranks, partial(file_store, f"{directory}/ranks", ranks), directory, platform.device)
    ops.bind(platform, tp)
    if all_reduce.connected(tp) is None:
        raise SystemExit(ops.table()["all_reduce"])
    shots = {"one": 1 << 60} if ranks == 2 else {"one": 1 << 60, "two": 0}
    names = ["library", *shots, "library, norm", *(f"{name}, norm" for name in shots)]
    if rank == 0:
        print(f"{'rows x width':>14} {'KiB':>8} " + " ".join(f"{name:>14}" for name in names), flush=True)
    with torch.device(platform.device), torch.inference_mode():
        for width in WIDTHS:
            for rows in ROWS:
                times = [_time(call, rows, threshold) for call, threshold in _calls(rows, width, tp, shots.values())]
                if rank == 0:
                    figures = " ".join(f"{us:14.2f}" for us in times)
                    print(f"{rows:>6} x {width:<5} {2 * rows * width / 1024:>8.0f} {figures}", flush=True)
    leave()


def _calls(rows: int, width: int, tp: TensorParallel, thresholds: Iterable[int]) -> list[tuple[Callable[[], object], int]]:
    """What to time, and the bytes from which sums are in two shots then."""
    x, residual, weight = torch.randn(rows, width).bfloat16(), torch.randn(rows, width).bfloat16(), torch.ones(width).bfloat16()
    reader = PackedWeight()
    reader.reads = CodeFormat(torch.float8_e4m3fn, Granularity.ROW, width)

    def library() -> None:
        torch.distributed.all_reduce(x)

    def library_norm() -> None:
        library()
        gpu.rms_norm(x, weight, 1e-5, residual, (reader,))

    own = [(lambda: ops.all_reduce(x, tp), n) for n in thresholds]
    norm = [(lambda: ops.all_reduce_norm_quantize(x, tp, weight, 1e-5, residual, (reader,)), n) for n in thresholds]
    return [(library, 0), *own, (library_norm, 0), *norm]


def _time(call: Callable[[], object], rows: int, threshold: int) -> float:
    all_reduce.TWO_SHOTS = threshold
    return in_graph([call], CALLS if rows < LARGE else 6, ROUNDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="GPUs (default: %(default)s)")
    with tempfile.TemporaryDirectory() as directory:
        count = parser.parse_args().ranks
        spawn(measure, (count, directory), nprocs=count)
