"""How long pipeline stages wait for one another: the bubble, with steps in flight and with one at a time.

    python -m bench.pipeline_idle [--stages 2] [--requests 256]                       # on CPUs
    python -m bench.pipeline_idle --shape llama-3.1-8b --input-len 1024 --tokens 64   # on accelerators, ptpc_fp8, FP8 cache

A dense model of random weights. Of the steps that decode all requests: on CPUs the part of each stage's time in which its
process waits for a message of another stage; on accelerators the part in which its device replays no graph.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = dict(
    model_type="llama", vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=128, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=False,
)  # fmt: skip


class Busy:
    """The time that a device spends in replays of an engine's graphs."""

    def __init__(self, core: Any):
        self.marks: list[tuple[Any, Any]] = []
        for graph in {id(graph): graph for graph in core.runner.graphs._graphs.values()}.values():
            graph.replay = partial(self._run, graph.replay)

    def _run(self, replay: Callable[[], None]) -> None:
        import torch

        marks = [torch.Event(torch.accelerator.current_accelerator(), enable_timing=True) for _ in range(2)]
        marks[0].record()
        replay()
        marks[1].record()
        self.marks.append((marks[0], marks[1]))

    @property
    def seconds(self) -> float:
        import torch

        torch.accelerator.synchronize()
        return sum(float(first.elapsed_time(last)) for first, last in self.marks) / 1e3


def measured(
    place: Any, path: str, requests: int, length: int, tokens: int, depth: int | None, shape: bool
) -> tuple[float, float, int]:
    """Seconds of the decoding steps; those in which this stage waits; steps. depth: steps in flight, if not the engine's."""
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
        **on,
    )
    core = EngineCore(config, None, place)
    if depth is not None:
        core.depth = core.scheduler.stages = depth
    waited, before = 0.0, Stages.receive

    def receive(self: Stages, rank: int, stage: int) -> Any:
        nonlocal waited
        began = time.perf_counter()
        found = before(self, rank, stage)
        waited += time.perf_counter() - began
        return found

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number in range(requests):
        core.add(EngineRequest(str(number), [5 + number % 1000] * length, params, frozenset()))
    while len(core.scheduler.running) < requests or any(not r.num_output_tokens for r in core.scheduler.running):  # prompts
        core.step()
    if shape:
        busy = Busy(core)
    else:
        Stages.receive = receive  # type: ignore[method-assign]
    began, steps = time.perf_counter(), 0
    while core.has_work() and core.scheduler.running and min(r.num_output_tokens for r in core.scheduler.running) < tokens - 3:
        core.step()
        steps += 1
    if shape:
        spent = busy.seconds
    seconds = time.perf_counter() - began
    idle = seconds - spent if shape else waited
    Stages.receive = before  # type: ignore[method-assign]
    while core.has_work():
        core.step()
    return seconds, idle, steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=8)
    parser.add_argument(
        "--in-flight", type=int, choices=(0, 1), help="0: what the engine has, 1: one step at a time; default: both"
    )
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
            for label, depth in (("one step at a time", 1), ("a step a stage", None)):
                if args.in_flight is not None and bool(depth) != bool(args.in_flight):
                    continue
                given = args.requests, args.input_len, args.tokens, depth, args.shape is not None
                found = processes.run(measured, model, *given)
                idle = ", ".join(f"{100 * waited / seconds:.1f}%" for seconds, waited, _ in found)
                seconds, _, steps = found[0]
                print(f"{label}: {steps} steps in {seconds:.2f} s; stages wait {idle} of it", flush=True)
                each = ", ".join(f"{1e3 * (seconds - waited) / steps:.3f}" for seconds, waited, steps in found)
                print(f"    a step takes {1e3 * seconds / steps:.3f} ms, of which each stage computes {each} ms", flush=True)
        finally:
            processes.close()


if __name__ == "__main__":
    main()
