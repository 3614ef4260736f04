"""How long pipeline stages on CPUs wait for one another: the bubble, with steps in flight and with one at a time.

    python -m bench.pipeline_idle [--stages 2] [--requests 256]

A dense model of random weights, large enough that products dominate. Of the steps that decode all requests: the part of each
stage's time in which its process waits for a message of another stage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = dict(
    model_type="llama", vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=128, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=False,
)  # fmt: skip


def measured(place: Any, path: str, requests: int, tokens: int, depth: int | None) -> tuple[float, float, int]:
    """Seconds of the decoding steps; those in which this stage waits; steps. depth: steps in flight, if not the engine's."""
    from octavo.config import EngineConfig
    from octavo.distributed import Stages
    from octavo.engine.core import EngineCore
    from octavo.messages import EngineRequest, SamplingParams

    config = EngineConfig(
        model=path, load_format="dummy", device="cpu", dtype="float32", threads=1, pipeline_parallel_size=place.size,
        max_num_seqs=requests, max_num_batched_tokens=4096,
    )  # fmt: skip
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
        core.add(EngineRequest(str(number), [5 + number % 1000] * 8, params, frozenset()))
    for _ in range(8):  # prompts
        core.step()
    Stages.receive = receive  # type: ignore[method-assign]
    began, steps = time.perf_counter(), 0
    while core.has_work() and core.scheduler.running and min(r.num_output_tokens for r in core.scheduler.running) < tokens - 3:
        core.step()
        steps += 1
    seconds, idle = time.perf_counter() - began, waited
    Stages.receive = before  # type: ignore[method-assign]
    while core.has_work():
        core.step()
    return seconds, idle, steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from rank_processes import RankProcesses

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        processes = RankProcesses(args.stages, Path(directory))
        try:
            for label, depth in (("one step at a time", 1), ("a step a stage", None)):
                found = processes.run(measured, directory, args.requests, args.tokens, depth)
                idle = ", ".join(f"{100 * waited / seconds:.1f}%" for seconds, waited, _ in found)
                seconds, _, steps = found[0]
                print(f"{label}: {steps} steps in {seconds:.2f} s; stages wait {idle} of it", flush=True)
        finally:
            processes.close()


if __name__ == "__main__":
    main()
