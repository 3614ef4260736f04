"""One engine and several behind one HTTP process, as clients see them: `octavo serve --data-parallel-size`.

    python -m bench.engines --shape llama-3.1-8b 1 2            # on two GPUs
    python -m bench.engines --shape llama-3.1-8b --num-layers 2 --requests 16 --seconds 900 1 2     # on a CPU

Each engine has its own client process and `--requests` streams of `--input` tokens in and `--output` out, which begin together;
the slowest client's time counts. Random weights, `ptpc_fp8` and an FP8 cache. Beside the rate stands what the HTTP process
took of a core, and CPU time a token, requests included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.api_process import cpu_seconds
from bench.large_models import BASE, PTPC, serving
from octavo.tools.bench import online
from octavo.tools.bench.workloads import Workload, model_directory

WARM = 8  # tokens of a stream that compiles and captures what the measured ones use


def client(w: Workload, number: int, begin: Path) -> None:
    """Prints `ready` once it has warmed up, waits until `begin` exists, and prints seconds and tokens of its streams."""
    server = online.Server.at(BASE, None)
    online.measure(server, replace(w, output_len=WARM), w.num_requests, f"warm-up {number}")
    print("ready", flush=True)
    while not begin.exists():
        time.sleep(0.001)
        if not begin.parent.exists():
            raise SystemExit("another client did not get ready")
    figures = online.measure(server, w, w.num_requests, f"measured {number} {os.getpid()}")
    print(json.dumps([figures["wall_s"], w.num_requests * w.output_len]), flush=True)


def rate(directory: Path, engines: int, args: argparse.Namespace) -> float:
    """Output tokens a second of so many engines; printed with the HTTP process's part."""
    flags = [*PTPC, "--data-parallel-size", str(engines)]
    with serving(directory, flags, args.seconds) as (process, took, _), tempfile.TemporaryDirectory() as place:
        begin = Path(place) / "begin"
        words = [sys.executable, "-m", "bench.engines", "--shape", args.shape, "--requests", str(args.requests)]
        words += ["--input", str(args.input), "--output", str(args.output), "--begin", str(begin)]
        clients = [
            subprocess.Popen([*words, "--client", str(number), str(engines)], stdout=subprocess.PIPE, text=True)
            for number in range(engines)
        ]
        for one in clients:
            assert one.stdout is not None
            if one.stdout.readline().strip() != "ready":
                raise SystemExit(f"a client of {engines} engines did not get ready")
        before, _ = cpu_seconds(process.pid)
        begin.touch()
        told = [json.loads(one.communicate()[0]) for one in clients]
        spent, wall, tokens = cpu_seconds(process.pid)[0] - before, max(t[0] for t in told), sum(t[1] for t in told)
    process_s = f"the HTTP process {spent / wall:.0%} of a core, {1e6 * spent / tokens:.1f} us a token"
    print(f"{engines} engines: {tokens / wall:10,.0f} output tok/s, ready after {took:.1f} s, {process_s}", flush=True)
    return tokens / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", type=int)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--requests", type=int, default=256, help="of each engine")
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=300, help="for which a start may take")
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        client(Workload("", args.requests, args.input, args.output), args.client, args.begin)
        return
    with model_directory("", args.shape, args.num_layers) as directory:
        rates = [rate(directory, engines, args) for engines in args.engines]
    for engines, of in zip(args.engines[1:], rates[1:], strict=True):
        print(f"{engines} engines over {args.engines[0]}: {of / rates[0]:.2f}")


if __name__ == "__main__":
    main()
