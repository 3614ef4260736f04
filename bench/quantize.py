"""Time and memory of `octavo quantize` as a process, against llm-compressor's two ways to do the same job.

    python -m bench.quantize                                    # a random 3 GB BF16 Llama, all schemes
    python -m bench.quantize --peer-python /path/to/venv/bin/python --schemes ptpc_fp8

The peer's environment needs llmcompressor (which pins its own transformers). The jobs run in turn, --repeat times, and the
best wall time counts, since other work on the machine only adds to it. Wall time includes Python's start and imports. Peak
memory is the largest resident set of the child. The input is in the page cache; nothing waits for the disk at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

SCHEMES = ("ptpc_fp8", "fp8", "fp8_block")
PEER_SCHEMES = {"ptpc_fp8": "FP8_DYNAMIC", "fp8": "FP8", "fp8_block": "FP8_BLOCK"}
PEERS = {
    "llm-compressor, model_free_ptq": """
import sys
from llmcompressor import model_free_ptq
model, out, scheme = sys.argv[1:]
model_free_ptq(model, out, scheme=scheme, ignore=["lm_head"], max_workers=2, device="cpu")
""",
    "llm-compressor, oneshot": """
import sys
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
path, out, scheme = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
model.save_pretrained(out, save_compressed=True)
""",
}
LAYER = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048)}
MLP = {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}


def write_model(path: Path, layers: int, layers_per_file: int = 8) -> int:
    """A Llama of `layers` layers of 61 M values each; gives its bytes."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": normal(32000, 2048, generator)}
    weight_map: dict[str, str] = {}
    total = 0

    def flush() -> None:
        nonlocal total
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
        tensors.clear()

    for i in range(layers):
        shapes = {f"self_attn.{n}_proj": s for n, s in LAYER.items()} | {f"mlp.{n}_proj": s for n, s in MLP.items()}
        tensors.update({f"model.layers.{i}.{name}.weight": normal(*shape, generator) for name, shape in shapes.items()})
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(2048, dtype=torch.bfloat16)
        if (i + 1) % layers_per_file == 0:
            flush()
    tensors["model.norm.weight"] = torch.ones(2048, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = normal(32000, 2048, generator)
    flush()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32000, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=4096,
        rms_norm_eps=1e-5, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return total


def normal(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, k, generator=generator).mul_(0.02).bfloat16()


@dataclass
class Job:
    """A command that writes to the directory that is its last argument but `after`."""

    name: str
    command: list[str]
    best: float = float("inf")
    cpu: float = float("inf")
    peak: int = 0
    failed: str = ""

    def run(self, out: Path) -> None:
        """Runs as a grandchild: getrusage's maximum is over all children of a process, so each needs its own parent."""
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        child = subprocess.run([sys.executable, __file__, "--measure", *self.command], capture_output=True, text=True)
        wall = time.perf_counter() - started
        if child.returncode:
            self.failed = (child.stderr.strip().splitlines() or ["?"])[-1]
            return
        found = json.loads(child.stdout.splitlines()[-1])
        if found["wall"] < self.best:
            self.best, self.cpu = found["wall"], found["cpu"]
        self.peak = max(self.peak, found["peak"])
        assert wall >= found["wall"]


def measure(command: list[str]) -> int:
    """Runs one command and prints what it took, as JSON."""
    started = time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}).returncode
    wall, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({"wall": wall, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024}))
    return code


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        return measure(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=23)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--scale-search", action="store_true", help="time --scale-search mse too")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has llmcompressor")
    parser.add_argument(
        "--directory", type=Path, help="where to put the checkpoints; default: the system's temporary directory"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        model, out = Path(place) / "model", Path(place) / "out"
        model.mkdir()
        nbytes = write_model(model, args.layers)
        print(f"{nbytes / 1e9:.2f} GB BF16, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}", flush=True)
        jobs = []
        for scheme in args.schemes:
            ours = [sys.executable, "-m", "octavo.cli", "quantize", str(model), "-o", str(out), "--scheme", scheme]
            jobs.append(Job(f"octavo quantize, {scheme}", ours))
            if args.scale_search:
                jobs.append(Job(f"octavo quantize, {scheme}, scale search", [*ours, "--scale-search", "mse"]))
            if args.peer_python:
                for name, code in PEERS.items():
                    peer = [args.peer_python, "-c", code, str(model), str(out), PEER_SCHEMES[scheme]]
                    jobs.append(Job(f"{name}, {PEER_SCHEMES[scheme]}", peer))
        for _ in range(args.repeat):
            for job in jobs:
                job.run(out)
        print(f"{'':44} {'wall s':>8} {'GB/s':>6} {'CPU s':>7} {'peak MB':>8}")
        for job in jobs:
            if job.failed:
                print(f"{job.name:44} failed: {job.failed}")
            else:
                print(f"{job.name:44} {job.best:8.1f} {nbytes / 1e9 / job.best:6.2f} {job.cpu:7.1f} {job.peak / 1e6:8.0f}")
        print(f"load at the end {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
