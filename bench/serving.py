"""Serving throughput over HTTP against transformers' `generate`, both in one run on this machine.

    python -m bench.serving                 # the 25 M and the 0.6 B Llama, random weights
    python -m bench.serving --size 25m --requests 1

Every request sends 128 random tokens and asks for 128, greedy, ignoring EOS, streamed. Octavo runs as a user runs it, a server
process and this client beside it on the same cores; the servers of several settings run at once and take a batch each in turn.
transformers gets the whole batch at once, in its own process before, in BF16 and in FP32 (a CPU without BF16 instructions runs
its BF16 at a tenth of the speed). The ratio is to the faster of the two.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SIZES = {
    "25m": dict(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=16384,
    ),
    "0.6b": dict(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=20,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=32768,
    ),
}
COMMON = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_theta=10000.0,
    hidden_act="silu",
    torch_dtype="bfloat16",
)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(length)] for _ in range(count)]


async def stream(port: int, prompt: list[int], output: int) -> tuple[int, float]:
    """Tokens received and seconds to the first. A bare socket: the client shares the server's cores and should cost nothing."""
    body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)
    start, first, last = time.perf_counter(), 0.0, b""
    async for line in reader:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            last = line
    writer.close()
    return json.loads(last[6:])["usage"]["completion_tokens"], first


async def workload(port: int, batch: list[list[int]], output: int) -> tuple[float, float]:
    """Output tokens a second of the whole batch, and the mean time to a first token."""
    start = time.perf_counter()
    results = await asyncio.gather(*(stream(port, prompt, output) for prompt in batch))
    seconds = time.perf_counter() - start
    assert all(count == output for count, _ in results), "a request came back short"
    return sum(count for count, _ in results) / seconds, sum(first for _, first in results) / len(results)


@contextlib.contextmanager
def octavo(directory: Path, flags: list[str]) -> Iterator[tuple[int, float]]:
    """The port of a server of that model, and the seconds until it listened."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "octavo.cli",
        "serve",
        str(directory),
        "--load-format",
        "dummy",
        "--port",
        str(port),
        *flags,
    ]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"octavo did not start: {server.stderr.read() if server.stderr else ''}")
                time.sleep(0.02)
        yield port, time.perf_counter() - start
    finally:
        server.terminate()
        server.wait()


def measure(directory: Path, size: str, args: argparse.Namespace, runs: dict[str, list[str]], peer: float) -> None:
    """Every server takes one batch a round, so that a machine's slow minutes fall on all of them."""
    vocab = int(str(SIZES[size]["vocab_size"]))
    with contextlib.ExitStack() as servers:
        ports = {name: servers.enter_context(octavo(directory, flags)) for name, flags in runs.items()}
        got: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for seed in range(args.repeats + 1):
            for name, (port, _) in ports.items():
                got[name].append(asyncio.run(workload(port, prompts(args.requests, args.input, vocab, seed), args.output)))
    for name, batches in got.items():
        speeds = sorted(speed for speed, _ in batches[1:])  # the first is the warm-up
        best, first = max(batches[1:])
        ratio = f"  {best / peer:.2f}x transformers" if peer else ""
        print(
            f"{size:>5}  octavo {name:<33} {best:9.1f} out tok/s (median {statistics.median(speeds):.1f}){ratio}"
            f"  ready in {ports[name][1]:.1f} s, first token {first * 1000:.0f} ms",
            flush=True,
        )


PEER = """
import json, sys, time, torch, transformers
from bench.serving import prompts
config, args = json.loads(sys.argv[1]), json.loads(sys.argv[2])
transformers.logging.set_verbosity_error()
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(getattr(torch, args["dtype"])).eval()
best = 0.0
for seed in range(args["repeats"] + 1):
    ids = torch.tensor(prompts(args["requests"], args["input"], config["vocab_size"], seed))
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args["output"], min_new_tokens=args["output"],
                         do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - start
    assert out.shape[1] == args["input"] + args["output"]
    best = max(best, seed and out.shape[0] * args["output"] / seconds)
print(best)
"""


def transformers(config: dict[str, object], args: argparse.Namespace, dtype: str) -> float:
    settings = {"dtype": dtype, "repeats": 1, **{name: getattr(args, name) for name in ("requests", "input", "output")}}
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", PEER, json.dumps(config), json.dumps(settings)]
    return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, nargs="*", default=list(SIZES))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="measured batches of each, of which the best counts")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--all", action="store_true", help="also fp8_block, fp8_w8a16, an FP8 head, and BF16 weights and cache")
    args = parser.parse_args()
    runs = {"ptpc_fp8 + FP8 KV": ["--quantization", "ptpc_fp8", "--kv-cache-dtype", "fp8"]}
    if args.all:
        for scheme in ("fp8_block", "fp8_w8a16"):
            runs[f"{scheme} + FP8 KV"] = ["--quantization", scheme, "--kv-cache-dtype", "fp8"]
        runs["ptpc_fp8 + FP8 KV, head FP8 too"] = [*runs["ptpc_fp8 + FP8 KV"], "--quantize-lm-head"]
        runs["bf16"] = []
    print(f"{args.requests} requests of {args.input} in, {args.output} out; {len(os.sched_getaffinity(0))} cores")
    for size in args.size:
        config = COMMON | SIZES[size]
        peers = {} if args.no_peer else {dtype: transformers(config, args, dtype) for dtype in ("bfloat16", "float32")}
        for dtype, speed in peers.items():
            print(f"{size:>5}  transformers generate {dtype:<18} {speed:9.1f} out tok/s", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(config))
            measure(Path(directory), size, args, runs, max(peers.values(), default=0.0))


if __name__ == "__main__":
    main()
