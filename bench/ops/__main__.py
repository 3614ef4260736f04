"""Times ops alone, each beside its library's call and the limit, in one run.

    python -m bench.ops                       # every op
    python -m bench.ops linear attention      # some
    python -m bench.ops linear --scheme fp8_block

On a GPU a captured graph of many calls goes round sets of inputs that are larger than the L2 cache together: a weight is read
once a step there, too. On a CPU the calls are timed one by one, over small shapes. Medians. The limit is the longer of the
op's bytes over the copy bandwidth and its operations over the rate of a large product, both measured first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import octavo.engine  # noqa: F401 (says how torch's threads wait, before torch is loaded)

import torch  # isort: skip

from bench.ops.cases import Case, cases
from bench.ops.inputs import Set
from bench.timing import in_graph
from octavo import ops
from octavo.platform import Platform, detect
from octavo.quant import SCHEMES
from octavo.tools.bench.ceilings import measure_ceilings
from octavo.tools.bench.limit import Ceilings

ROTATE = 128 << 20  # bytes that the sets of a case hold together: past the L2 of every GPU at hand
MAX_SETS, CALLS, ROUNDS = 64, 64, 9


def microseconds(p: Platform, calls: Sequence[Callable[[], Any]]) -> float:
    """Of one call, the median."""
    with torch.inference_mode():
        return _on_host(calls) if p.is_cpu else in_graph(calls, max(len(calls), CALLS // len(calls) * len(calls)), ROUNDS)


def _on_host(calls: Sequence[Callable[[], Any]]) -> float:
    times = []
    for i in range(ROUNDS + 2):
        start = time.perf_counter()
        calls[i % len(calls)]()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[2:])


def measure(p: Platform, case: Case, on: Ceilings) -> dict[str, Any]:
    """The figures of a case, or why there are none."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "library": case.library}
    try:
        sets: list[Set] = [case.make()]
        wanted = 2 if p.is_cpu else min(MAX_SETS, -(-ROTATE // max(1, sets[0].nbytes)))
        sets += [case.make() for _ in range(wanted - 1)]
        us = microseconds(p, [s.op for s in sets])
        one = sets[0]
        there = microseconds(p, [s.library for s in sets if s.library]) if one.library else None
    except Exception as error:  # one op that fails must not hide the others; it is said in its row
        return row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    limit = 1e6 * max(one.moved / on.bandwidth, one.operations / ((on.fp8 if one.fp8 else 0) or on.plain))
    return row | {
        "us": us,
        "tflops": one.operations / us / 1e6 if one.operations else None,
        "gb_s": one.moved / us / 1e3,
        "library_us": there,
        "of_library": there / us if there else None,
        "limit_us": limit,
        "of_limit": limit / us,
    }


def line(row: dict[str, Any]) -> str:
    head = f"{row['op']:<14} {row['shape']:<20}"
    if "error" in row:
        return f"{head} failed: {row['error']}"
    flops = f"{row['tflops']:8.4g}" if row["tflops"] is not None else " " * 8
    peer = f"{row['of_library']:6.2f}x {row['library']} ({row['library_us']:.1f} µs)" if row["library_us"] else ""
    return f"{head} {row['us']:10.1f} {flops} {row['gb_s']:8.0f} {100 * row['of_limit']:7.1f}%  {peer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help="linear, gated_linear, experts, rms_norm, silu_mul, rope_write_kv, sample, ...",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", default="", help="only shapes that have this text in their name")
    parser.add_argument("--scheme", default="ptpc_fp8", choices=[name for name, scheme in SCHEMES.items() if scheme.quantized])
    parser.add_argument("--json", help="write every number here")
    args = parser.parse_args()
    p = detect(args.device)
    ops.bind(p)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = list(cases(p, 1 / 32 if p.is_cpu else 1.0, args.scheme))
    known = {case.op for case in found}
    if unknown := [name for name in args.ops if name not in known]:
        parser.error(f"no op is called {unknown[0]}; there are {', '.join(sorted(known))}")
    on = measure_ceilings(p)
    print(f"{p.name}, torch {torch.__version__}; {on.as_json}", flush=True)
    print(
        f"{'op':<14} {'shape':<20} {'µs':>10} {'TFLOP/s':>8} {'GB/s':>8} {'of limit':>8}  speed, of the library's", flush=True
    )
    rows = []
    for case in found:
        if (args.ops and case.op not in args.ops) or args.shape not in case.shape:
            continue
        rows.append(measure(p, case, on))
        print(line(rows[-1]), flush=True)
        if not p.is_cpu:
            torch.cuda.empty_cache()
    print(f"bound: {ops.table()}")
    if args.json:
        path = Path(args.json)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(
            json.dumps({"machine": p.name, "torch": torch.__version__, "ceilings": on.as_json, "ops": rows}, indent=2)
        )
        partial.replace(path)


if __name__ == "__main__":
    main()
