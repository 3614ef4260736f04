"""Decode by fp8_w8a16 beside ptpc_fp8 on a CPU: CPU time of a token, both engines in one process, their steps in turn.

    python -m bench.weight_only --size 25m 0.6b --requests 16 1

The rows of `bench.serving`, without HTTP: random Llamas and an FP8 cache. CPU time, which other work changes less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import octavo.engine  # noqa: F401 (says how torch's threads wait, before torch is loaded)

from bench.serving import COMMON, SIZES, prompts  # isort: skip
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.messages import EngineRequest, SamplingParams

SCHEMES = ("ptpc_fp8", "fp8_w8a16")


def ratios(size: str, requests: int, steps: int, context: int) -> list[float]:
    """Of each pair of decode steps: CPU time of ptpc_fp8's by fp8_w8a16's."""
    config = COMMON | SIZES[size]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        cores = {
            scheme: EngineCore(
                EngineConfig(
                    model=directory, load_format="dummy", quantization=scheme, kv_cache_dtype="fp8", device="cpu", threads=2,
                    max_model_len=context + steps + 8, max_num_seqs=requests, enable_prefix_caching=False,
                )
            )
            for scheme in SCHEMES
        }  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=steps + 4, ignore_eos=True)
    for core in cores.values():
        for i, prompt in enumerate(prompts(requests, context, int(str(config["vocab_size"])), 0)):
            core.add(EngineRequest(str(i), prompt, params))
        made = 0
        while made < 3 * requests:  # the prompts, and a step that is recorded
            made += sum(len(output.token_ids) for output in core.step()[0])
    found: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
    for step in range(steps):
        for scheme in SCHEMES if step % 2 else reversed(SCHEMES):
            began = time.process_time()
            cores[scheme].step()
            found[scheme].append(time.process_time() - began)
    for scheme, times in found.items():
        print(f"{size} x {requests} {scheme:>9}: {1e3 * statistics.median(times):.2f} ms of CPU time a step", flush=True)
    return [a / b for a, b in zip(found["ptpc_fp8"], found["fp8_w8a16"], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, nargs="*", default=list(SIZES))
    parser.add_argument("--requests", type=int, nargs="*", default=[16, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--context", type=int, default=16, help="tokens of a prompt")
    args = parser.parse_args()
    for size in args.size:
        for requests in args.requests:
            found = sorted(ratios(size, requests, args.steps, args.context))
            low, middle, high = (found[len(found) * part // 4] for part in (1, 2, 3))
            print(f"{size} x {requests}: fp8_w8a16 over ptpc_fp8 {middle:.3f}, quarters {low:.3f} and {high:.3f}", flush=True)


if __name__ == "__main__":
    main()
