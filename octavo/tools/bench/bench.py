"""`octavo bench`: measures serving speed, beside the limit of the machine."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig, config_fields
from octavo.errors import OctavoError
from octavo.models.published import KNOWN
from octavo.tools.bench import tables
from octavo.tools.bench.workloads import WORKLOADS, Workload, model_directory, parse_sampling, parse_workloads
from octavo.version import __version__

if TYPE_CHECKING:
    from octavo.engine.core import EngineCore

__all__ = ["add_arguments", "run"]

BASE_URL = "http://localhost:8000"
FREE = {"num_requests": 32, "input_len": 128, "output_len": 128}


def add_arguments(parser: argparse.ArgumentParser, mode: str) -> None:
    """The flags of one mode; the engine's mean what they mean to `octavo serve`."""
    group = parser.add_argument_group(f"bench {mode}")
    listed = "; ".join(f"{w.name} {w.num_requests} x {w.input_len}/{w.output_len}" for w in WORKLOADS.values())
    group.add_argument(
        "--workload",
        action="append",
        metavar="{" + ",".join(WORKLOADS) + "}",
        help=f"one or several, such as A,B: {listed} (requests x tokens in/out; F decodes what E put into the cache)",
    )
    for name, value in FREE.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=int, metavar="N", help=f"instead of a named workload (default: {value})")
    group.add_argument(
        "--sampling",
        metavar="NAME=NUMBER,...",
        help="how tokens are chosen, such as temperature=0.7,top_p=0.95 (default: greedy)",
    )
    if mode != "profile":
        group.add_argument(
            "--repeats", type=int, default=1, metavar="N", help="measured runs, of which the best counts (default: %(default)s)"
        )
    group.add_argument("--json", metavar="FILE", help="write every number here")
    if mode == "serve":
        group.add_argument("--base-url", default=BASE_URL, metavar="URL", help="the server (default: %(default)s)")
        group.add_argument(
            "--max-concurrency", type=int, metavar="N", help="most requests at a time (default: all of a workload)"
        )
        group.add_argument("--offline-json", metavar="FILE", help="what throughput mode wrote with --json, to compare with")
        group.add_argument(
            "--api-key", default=os.environ.get("OPENAI_API_KEY"), metavar="KEY", help="the server's (default: $OPENAI_API_KEY)"
        )
        return
    known = ", ".join(KNOWN)
    group.add_argument(
        "--shape", metavar="NAME", help=f"random weights of a known shape, FP8 where it is published so: {known}"
    )
    group.add_argument("--num-layers", type=int, metavar="N", help="with random weights: only this many layers")
    if mode == "profile":
        group.add_argument("--steps", type=int, default=8, metavar="N", help="decode steps to look at (default: %(default)s)")
        group.add_argument("--png", metavar="FILE", help="draw the table as stacked bars")


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Measures and prints. 0 if every workload ran."""
    given = {f.name: value for f in config_fields() if (value := getattr(args, f.name, None)) is not None}
    workloads = _workloads(args)
    _check(args, given)
    if args.mode == "serve":
        from octavo.tools.bench import online

        figures = online.bench(
            args.base_url, args.api_key, workloads, args.max_concurrency, args.repeats, args.offline_json, given.get("seed")
        )
        found = _stamp(args) | {"base_url": args.base_url} | figures
    else:
        found = _offline(args, config, given, workloads, started)
    if args.json:
        from octavo.convert.output_file import write_json
        from octavo.tools.json_numbers import finite

        write_json(Path(args.json), finite(found))
    {"serve": tables.show_serve, "profile": tables.show_profile}.get(args.mode, tables.show_offline)(found)
    return 0


def _workloads(args: argparse.Namespace) -> list[Workload]:
    numbers = {name: getattr(args, name) for name in FREE}
    asked = [f"--{name.replace('_', '-')}" for name, value in numbers.items() if value is not None]
    if args.workload and asked:
        raise OctavoError(f"--workload says how many requests of which lengths; leave out {asked[0]}, or --workload.")
    for name, value in [*numbers.items(), *((name, getattr(args, name, None)) for name in ("repeats", "steps"))]:
        if value is not None and value <= 0:
            raise OctavoError(f"--{name.replace('_', '-')} must be positive, not {value}.")
    requests, length, output = (value or FREE[name] for name, value in numbers.items())
    found = parse_workloads(args.workload) if args.workload else [Workload("custom", requests, length, output)]
    return found if args.sampling is None else [replace(w, sampling=parse_sampling(args.sampling)) for w in found]


def _check(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raises OctavoError for flags that do not go together, and files that cannot be written, before anything is loaded."""
    shape, layers, png = (getattr(args, name, None) for name in ("shape", "num_layers", "png"))  # a server has none of them
    if shape is not None and args.model is not None:
        raise OctavoError(f"Two models were given, {args.model} and --shape {shape}; give one.")
    if (shape is not None or layers is not None) and given.get("load_format", "dummy") != "dummy":
        raise OctavoError("--shape and --num-layers are for random weights; leave out --load-format, or make it dummy.")
    if layers is not None and shape is None and "load_format" not in given:
        raise OctavoError("--num-layers is for random weights; add --load-format dummy, or use --shape.")
    for flag, path in (("--json", args.json), ("--png", png)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise OctavoError(f"{flag} {path}: there is no directory {Path(path).absolute().parent}.")


def _offline(
    args: argparse.Namespace, config: EngineConfig, given: dict[str, Any], workloads: Sequence[Workload], started: float
) -> dict[str, Any]:
    """throughput, latency and profile: one engine in this process."""
    if args.mode == "profile" and config.num_ranks > 1:
        flag = "--tensor-parallel-size" if config.tensor_parallel_size > 1 else "--pipeline-parallel-size"
        raise OctavoError(f"octavo bench profile looks into one rank; leave {flag} out.")
    if args.mode == "profile" and args.png is not None:
        from octavo.tools.bench import profiling

        profiling.check()
    from octavo.engine import compile_process
    from octavo.frontend.model_files import with_files

    config = with_files(config)
    compile_process.begin(config)
    with model_directory(config.model, args.shape, args.num_layers) as directory:
        config = replace(config, model=str(directory))
        if args.shape is not None:
            config = replace(config, load_format="dummy")
        from octavo.frontend.loading_bar import LoadingBar
        from octavo.tools.bench import leading, offline

        config = offline.engine_options(config, workloads, given)
        with ExitStack() as ends:
            with closing(LoadingBar()) as progress:
                core = ends.enter_context(leading.engine(config, progress.update))
            found = _about(args, config, core, time.time() - started)
            first = [offline.warm_up(core, w, config.seed) for w in workloads]
            found["first_token_s"] = first[0] - started
            if args.mode == "profile":
                from octavo.tools.bench import profiling

                return profiling.profile_into(found, core, workloads, config.seed, args.steps, args.png)
            measured = offline.measure(core, workloads, config.seed, args.repeats)
            return _with_limits(found, config, core, measured)


def _stamp(args: argparse.Namespace) -> dict[str, Any]:
    """Command, version, date and sampling of a measurement."""
    command = shlex.join(["octavo", *sys.argv[1:]])
    return {
        "mode": args.mode, "command": command, "date": time.strftime("%Y-%m-%d"), "octavo": __version__,
        "sampling": args.sampling or "greedy",
    }  # fmt: skip


def _about(args: argparse.Namespace, config: EngineConfig, core: EngineCore, start_s: float) -> dict[str, Any]:
    """Machine, model and settings of a measurement."""
    import torch

    from octavo import ops

    layers = f", {args.num_layers} layers" if args.num_layers is not None else ""
    return _stamp(args) | {
        "machine": core.runner.platform.name,
        "torch": str(torch.__version__),
        "model": (args.shape or args.model or "the embedded demo model") + layers,
        "quantization": config.quantization or "as stored",
        "kv_cache_dtype": config.kv_cache_dtype,
        "engine": core.info.report,
        "ops": ops.table(),
        "start_s": start_s,
    }


def _with_limits(found: dict[str, Any], config: EngineConfig, core: EngineCore, measured: Sequence[Any]) -> dict[str, Any]:
    from octavo.tools.bench.ceilings import measure_ceilings, peak_memory
    from octavo.tools.bench.limit import costs_of, limit

    found["peak_memory_bytes"] = peak_memory(core.runner.platform)  # before measuring the ceilings, which takes memory
    ceilings, costs = measure_ceilings(core.runner.platform), costs_of(config)
    found["ceilings"] = ceilings.as_json
    found["workloads"] = {}
    for m in measured:
        seconds = limit(costs, ceilings, m.workload, config.max_num_seqs, config.pipeline_parallel_size).of(m.workload)
        figures = {"limit_s": seconds, "percent_of_limit": 100 * seconds / m.wall}
        found["workloads"][m.workload.name] = m.as_json() | figures
    return found
