"""How long pipeline stages wait for one another: the bubble, with steps in flight and with one at a time.

    python -m bench.pipeline_idle [--stages 2] [--requests 256]                       # on CPUs
    python -m bench.pipeline_idle --shape llama-3.1-8b --input-len 1024 --tokens 64   # on accelerators, ptpc_fp8, FP8 cache

A dense model of random weights. Of the steps that decode all requests: on CPUs the part of each stage's time in which its
process waits for a message of another stage; on accelerators the part in which its device replays no graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.host_parts import HostParts, Replays

CONFIG: dict[str, Any] = dict(
    model_type="llama", vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=128, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=False,
)  # fmt: skip


@dataclass
class Found:
    """Of one stage: seconds of `steps` decoding steps, and those in which it waits. parts: microseconds of a step that its host
    spends in each part, over other steps. gaps: of Replays, over the first ones."""

    seconds: float
    idle: float
    steps: int
    parts: dict[str, float] = field(default_factory=dict)
    gaps: tuple[float, float, int] = (0.0, 0.0, 0)


def measured(
    place: Any, path: str, requests: int, length: int, tokens: int, depth: int | None, shape: bool, options: dict[str, Any]
) -> Found:
    """Decodes on one rank. depth: steps in flight, if not the engine's. options: of its EngineConfig."""
    from octavo.config import EngineConfig
    from octavo.engine.core import EngineCore
    from octavo.messages import EngineRequest, SamplingParams
    from octavo.stages import Stages

    on: dict[str, Any] = dict(device="cpu", dtype="float32", threads=1, max_num_batched_tokens=4096)
    if shape:
        on = dict(device="cuda", quantization="ptpc_fp8", kv_cache_dtype="fp8", max_model_len=length + tokens + 1)
        place = replace(place, device=place.rank)
    config = EngineConfig(
        model=path,
        load_format="dummy",
        pipeline_parallel_size=place.size,
        max_num_seqs=requests,
        enable_prefix_caching=False,
        **on | options,
    )
    core = EngineCore(config, None, place)
    if depth is not None:
        core.depth = depth
        if depth == 1:
            core.scheduler.stages = 1
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number in range(requests):
        core.add(EngineRequest(str(number), [5 + number % 1000] * length, params, frozenset()))

    def fewest() -> int:
        return min(request.num_output_tokens for request in core.scheduler.running)

    def decode(until: int) -> tuple[float, int]:
        began, steps = time.perf_counter(), 0
        while core.scheduler.running and fewest() < until:
            core.step()
            steps += 1
        return time.perf_counter() - began, steps

    while len(core.scheduler.running) < requests or not fewest():  # prompts
        core.step()
    gc.collect()
    gc.freeze()  # as an engine's process does
    half = (tokens - 3) // 2 if shape else tokens - 3
    with HostParts() as parts:
        if shape:
            replays = Replays(core)
        else:
            parts.wrap("waits", Stages, "receive", "receive_numbers")
        seconds, steps = decode(half)
        if shape:
            found = Found(seconds, seconds - replays.busy, steps, gaps=replays.gaps())
            parts.wrap_engine(core)
            _, steps = decode(tokens - 3)
            longest = sorted(parts.seconds.items(), key=lambda part: -part[1])
            found.parts = {label: 1e6 * spent / steps for label, spent in longest}
        else:
            found = Found(seconds, parts.seconds["waits"], steps)
    while core.has_work():
        core.step()
    return found


def report(label: str, found: list[Found]) -> None:
    """Prints what all stages have found."""
    seconds, steps = found[0].seconds, found[0].steps
    idle = ", ".join(f"{100 * one.idle / one.seconds:.1f}%" for one in found)
    print(f"{label}: {steps} steps in {seconds:.2f} s; stages wait {idle} of it", flush=True)
    each = ", ".join(f"{1e3 * (one.seconds - one.idle) / one.steps:.3f}" for one in found)
    print(f"    a step takes {1e3 * seconds / steps:.3f} ms, of which each stage computes {each} ms", flush=True)
    for number, one in enumerate(found):
        if one.parts:
            host, device, late = (value / one.steps for value in one.gaps)
            asks = f"{1e6 * host:.0f} us until its host asks ({100 * late:.0f}% of steps), then {1e6 * device:.0f} us"
            print(f"    stage {number} between replays: {asks}; its host in a step, us:", flush=True)
            print("        " + ", ".join(f"{part} {us:.0f}" for part, us in one.parts.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=8)
    way = "steps in flight; 1: one at a time, 0: as the engine has them (default: 1 0)"
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 0], help=way)
    parser.add_argument("--options", type=json.loads, default={}, help='of the engine, such as {"quantize_lm_head": true}')
    parser.add_argument("--shape", help="a shape of octavo bench, on accelerators")
    args = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from rank_processes import RankProcesses

    with ExitStack() as ends:
        directory = ends.enter_context(tempfile.TemporaryDirectory())
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        processes = RankProcesses(args.stages, Path(directory))
        model = directory
        if args.shape is not None:
            from octavo.tools.bench.workloads import model_directory

            model = str(ends.enter_context(model_directory("", args.shape, None)))
        try:
            for depth in args.in_flight:
                given = args.requests, args.input_len, args.tokens, depth or None, args.shape is not None, args.options
                report(f"{depth} in flight" if depth else "as the engine has them", processes.run(measured, model, *given))
        finally:
            processes.close()


if __name__ == "__main__":
    main()
