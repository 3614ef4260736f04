"""A decode step's layers in fewer launches, beside the same step op by op, and beside reading the weights as fast as a copy.

    python -m bench.decode_step --shape llama-3.1-8b --requests 1 2 8 32 --context 256 2000

Random weights, a graph each, the median of 20 replays. Needs an accelerator that has such launches.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from bench.timing import in_graph
from octavo import ops
from octavo.batch import Span
from octavo.config import EngineConfig
from octavo.engine.runner import ModelRunner
from octavo.platform import detect
from octavo.tools.bench.ceilings import measure_ceilings
from octavo.tools.bench.workloads import model_directory

ROUNDS = 20


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 2, 8, 32])
    parser.add_argument("--context", type=int, nargs="*", default=[256, 2000])
    parser.add_argument("-q", "--quantization", default="ptpc_fp8")
    parser.add_argument("--kv-cache-dtype", default="fp8")
    args = parser.parse_args()
    if detect().is_cpu:
        sys.exit("there is no accelerator here")
    with model_directory("", args.shape, None) as directory:
        config = EngineConfig(
            model=str(directory), load_format="dummy", quantization=args.quantization, kv_cache_dtype=args.kv_cache_dtype,
            enforce_eager=True, max_model_len=8192, max_num_seqs=64,
        )  # fmt: skip
        runner = ModelRunner(config)
    model, block = runner.model.model, runner.block_size
    if (decoder := model.fused) is None:
        sys.exit(f"steps go op by op here: {ops.table()}")
    parts = runner.model.parts()
    assert not isinstance(parts, str), parts
    read = sum(w.held_bytes for layer in parts.layers for w in layer.weights)
    bandwidth = measure_ceilings(runner.platform).bandwidth
    copied = 1e6 * read / bandwidth
    at_copy = f"{copied:,.0f} µs at {bandwidth / 1e12:.2f} TB/s"
    print(f"{args.shape} on {runner.platform.name}: {read / 1e9:.2f} GB of weights, {at_copy}")
    print("requests  context   op by op, µs   fused, µs   ratio   weights of that   by")
    for requests in args.requests:
        for context in args.context:
            each = -(-context // block)
            spans = [Span([5], context - 1, range(i * each, (i + 1) * each)) for i in range(requests)]
            batch = runner._batch(spans)
            model.fused = None
            many = in_graph([partial(runner.forward, batch)], 1, ROUNDS)
            if decoder.takes(requests, context):
                model.fused = decoder
                one = in_graph([partial(runner.forward, batch)], 1, ROUNDS)
                row = f"{requests:8} {context:8} {many:14,.0f} {one:11,.0f} {many / one:7.2f}"
                print(f"{row} {100 * copied / one:16.0f}%   {decoder.name}", flush=True)


if __name__ == "__main__":
    main()
