"""A model in several ways on the same accelerators: ranks that split layers, pipeline stages, engines side by side.

    python -m bench.ways --shape llama-3.1-8b 2x1x1 1x2x1 1x1x2                # TP x PP x engines, on two GPUs
    python -m bench.ways --shape llama-3.1-70b 4x1x1 2x2x1 2x1x2               # on four

Workloads are those of `octavo bench throughput`, with random weights, `ptpc_fp8` and an FP8 cache. Engines side by side share
a workload's requests out evenly, and are processes that start to measure together; the slowest one's time counts.
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
from typing import Any


def measured(shape: str, names: str, tp: int, pp: int, part: range, options: dict[str, Any], begin: Path) -> dict[str, Any]:
    """What one engine has done: seconds and tokens of its share of each workload, the requests of `part`, whose step is the
    number of engines. begin: is made when all may begin."""
    from octavo.config import EngineConfig
    from octavo.tools.bench import leading, offline
    from octavo.tools.bench.workloads import model_directory, parse_workloads

    shares = [replace(w, num_requests=len(range(part.start, w.num_requests, part.step))) for w in parse_workloads([names])]
    shares = [share for share in shares if share.num_requests]
    if not shares:
        print("ready", flush=True)
        return {}
    with model_directory("", shape, None) as directory:
        given: dict[str, Any] = dict(load_format="dummy", tensor_parallel_size=tp, pipeline_parallel_size=pp) | options
        config = offline.engine_options(EngineConfig(model=str(directory), **given), shares, {})
        with leading.engine(config, lambda stage, fraction: None) as core:
            for share in shares:
                offline.warm_up(core, share, config.seed)
            print("ready", flush=True)
            while not begin.exists():
                time.sleep(0.01)
                if not begin.parent.exists():
                    raise SystemExit("another engine did not start")
            return {
                m.workload.name: (m.wall, m.input_tokens, m.output_tokens) for m in offline.measure(core, shares, config.seed)
            }


def figure(name: str, found: list[dict[str, Any]]) -> str:
    """Tokens per second of a workload that several engines have shared, counted as `octavo bench` does."""
    walls, given, made = zip(*(one[name] for one in found if name in one), strict=True)
    counted = sum(given) + sum(made) if name == "A" else sum(given) if name in "DE" else sum(made)
    return f"{counted / max(walls):,.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ways", nargs="+", help="TPxPPxENGINES")
    parser.add_argument("--shape", required=True)
    parser.add_argument("--workload", default="C,B,A,D")
    parser.add_argument("--options", type=json.loads, default=dict(quantization="ptpc_fp8", kv_cache_dtype="fp8"))
    parser.add_argument("--one", nargs=2, metavar=("NUMBER", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        tp, pp, engines = map(int, args.ways[0].split("x"))
        number, out = int(args.one[0]), Path(args.one[1])
        part = range(number, 1 << 30, engines)
        found = measured(args.shape, args.workload, tp, pp, part, args.options, out.parent / "begin")
        out.write_text(json.dumps(found))
        return
    import torch

    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.accelerator.device_count())))
    names = args.workload.split(",")
    print("  ".join(f"{word:>12}" for word in ("way", *names)), flush=True)
    for way in args.ways:
        tp, pp, engines = map(int, way.split("x"))
        with tempfile.TemporaryDirectory() as directory:
            outs, processes = [Path(directory) / f"{n}.json" for n in range(engines)], []
            for number, out in enumerate(outs):
                own = devices.split(",")[number * tp * pp : (number + 1) * tp * pp]
                words = [sys.executable, "-m", "bench.ways", way, "--shape", args.shape, "--workload", args.workload]
                words += ["--options", json.dumps(args.options), "--one", str(number), str(out)]
                where = os.environ | dict(CUDA_VISIBLE_DEVICES=",".join(own))
                processes.append(subprocess.Popen(words, env=where, stdout=subprocess.PIPE, text=True))
            for process in processes:
                assert process.stdout is not None
                if "ready" not in next(iter(process.stdout.readline, ""), ""):
                    raise SystemExit(f"{way} did not start")
            (Path(directory) / "begin").touch()
            if any(process.wait() for process in processes):
                raise SystemExit(f"{way} failed")
            all_found = [json.loads(out.read_text()) for out in outs]
        print("  ".join(f"{word:>12}" for word in (way, *(figure(name, all_found) for name in names))), flush=True)


if __name__ == "__main__":
    main()
