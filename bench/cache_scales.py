"""KL divergence of FP8 caches to one in the model's own dtype, by their scales: 1.0, measured at start, and those of each layer
or KV head that calibration writes; with keys rounded to nearest and by what queries read. Weights stay in BF16.

    python -m bench.cache_scales --work DIRECTORY                 # the demo model, and SmolLM2, which bench.calibration makes
    python -m bench.cache_scales --work DIRECTORY --far 9 MODEL   # keys 2^9 times as large, values 2^-9 times: the same model

Calibration reads Octavo's own text, the measurement the demo model's held-out text.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.calibration import measured, smollm2
from octavo import ops
from octavo.config import EngineConfig
from octavo.convert.cache_scales import STRATEGIES, scales_to_measure
from octavo.convert.calibrated_layer import TOGETHER, CalibratedLayer
from octavo.convert.key_rounding import write_key_rounding
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.engine.calibration_text import calibration_windows
from octavo.files import KEY_ROUNDING
from octavo.models import read_config
from octavo.platform import detect
from octavo.text.tokenizer import Tokenizer
from octavo.tools.compare.measure import Reference, Variant, cut, open_core
from octavo.tools.compare.read_text import hidden_states
from octavo.weights.checkpoint import Checkpoint

WEIGHTS = "model.safetensors"


def with_tensors(model: Path, out: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A copy of `model`, which has one file of weights, with these tensors beside its own or in their places."""
    shutil.copytree(model, out, dirs_exist_ok=True)
    save_file(load_file(model / WEIGHTS) | dict(tensors), out / WEIGHTS, {"format": "pt"})
    return out


def far(model: Path, out: Path, powers: int) -> Path:
    """The same model, in BF16 to the last bit, with keys 2^powers times as large and values 2^-powers times."""
    by = {"q_proj": -powers, "k_proj": powers, "v_proj": -powers, "o_proj": powers}
    names = {name: name.split(".")[-2] for name in load_file(model / WEIGHTS)}
    changed = {name: w * 2.0 ** by[names[name]] for name, w in load_file(model / WEIGHTS).items() if names[name] in by}
    return with_tensors(model, out, changed)


def calibrated(model: Path, out: Path, strategy: str, windows: list[list[int]]) -> Path:
    """`model` with the scales and the rounding of keys that calibration by `windows` writes, and with its own weights."""
    platform, config = detect("cpu"), read_config(model)
    ops.bind(platform)
    with closing(Checkpoint(model)) as checkpoint:
        scales = scales_to_measure(checkpoint, config, strategy)
    batches = [windows[at : at + TOGETHER] for at in range(0, len(windows), TOGETHER)]
    tensors, roundings, states = {}, {}, []
    for number in range(config["num_hidden_layers"]):
        layer = CalibratedLayer(model, config, number, max(map(len, windows)), platform, {}, scales)
        states = layer.quantize(batches, states or [layer.embed(batch) for batch in batches])  # type: ignore[arg-type]
        tensors |= layer.cache_scales
        assert layer.key_rounding is not None
        roundings[number] = layer.key_rounding
        layer.close()
    with_tensors(model, out, tensors)
    write_key_rounding(out / KEY_ROUNDING, roundings)
    return out


def rows(name: str, model: Path, work: Path, args: argparse.Namespace) -> None:
    """Prints the table's rows of one model."""
    how: dict[str, Any] = dict(device="cpu", threads=args.threads, dtype=args.dtype)
    ids = Tokenizer(model).encode(HELDOUT.read_text("utf-8"))
    text = cut(ids, 512, args.tokens, 1024)
    core = open_core(EngineConfig(model=str(model), **how), Variant(), text)
    reference = Reference(core.runner.model.head, [hidden_states(core.runner, window).cpu() for window in text.windows])
    windows = calibration_windows(model, "default", args.calibration_tokens)
    layer, head = (calibrated(model, work / f"{model.name}-{strategy}", strategy, windows) for strategy in STRATEGIES)
    bare = with_tensors(model, work / f"{model.name}-bare", {})
    shutil.copyfile(layer / KEY_ROUNDING, bare / KEY_ROUNDING)
    measured_at_start: dict[str, Any] = dict(calculate_kv_scales=True)
    ways = [("1.0", bare, {}), ("measured at start", bare, measured_at_start), ("a layer", layer, {}), ("a head", head, {})]
    for rounding in ("nearest", "calibrated"):
        for scales, path, options in ways:
            base = replace(EngineConfig(model=str(path), **how), kv_cache_rounding=rounding, **options)
            kl, error, same, _ = measured(base, Variant("bf16", "fp8_e4m3"), text, reference)
            print(f"| {name} | {scales} | {rounding} | {kl:.5f} ±{error:.5f} | {same:.1%} |", flush=True)
    kl, error, same, _ = measured(EngineConfig(model=str(model), **how), Variant("bf16", "fp8_per_token_head"), text, reference)
    print(f"| {name} | a token and head | nearest | {kl:.5f} ±{error:.5f} | {same:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--far", type=int, metavar="POWERS")
    parser.add_argument("--tokens", type=int, default=4096, help="to measure on")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    print("| model | scales | keys | KL | top-1 |\n|---|---|---|---:|---:|")
    for model in args.models or [MODEL_DIR, smollm2(args.work)]:
        name = "demo" if model.resolve() == MODEL_DIR else model.name
        if args.far is not None:
            model, name = far(model, args.work / f"{model.name}-far", args.far), f"{name}, far"
        rows(name, model, args.work, args)
    print(f"\n{args.tokens:,} tokens of {HELDOUT.name}, {args.dtype}; calibrated by {args.calibration_tokens:,}")


if __name__ == "__main__":
    main()
