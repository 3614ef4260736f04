"""Images a second of a vision tower, FP8 beside BF16, with random weights.

    python -m bench.vision                                 # 1, 2, 4 and 8 images of 1024 x 1024 pixels at once
    python -m bench.vision --images 8 --side 512 --profile

The limit is what the operations of products and attention would take at the card's measured rates: products at the rate of
their scheme, attention (heads of 72 values) at BF16's. Needs an accelerator.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.engine.encoder import Encoder
from octavo.images import Grid
from octavo.models import architecture, read_config
from octavo.platform import Platform, detect
from octavo.quant import SCHEMES, QuantRules
from octavo.tools.bench.ceilings import measure_ceilings
from octavo.tools.bench.workloads import model_directory
from octavo.weights import DummySource, Loader, load

__all__ = ["tower"]


def tower(directory: Path, scheme: str, platform: Platform) -> Any:
    """The model of a config.json, of whose modules only the tower's are loaded, with random weights in BF16."""
    config = read_config(directory)
    arch = architecture(config)
    model = arch.Model(arch.Config.from_json(config), TensorParallel(), 1024, vision=True)
    loader = Loader(DummySource(), platform, QuantRules(SCHEMES[scheme]), torch.bfloat16)
    for name in model.tower_names:
        load(getattr(model, name), loader, ())
    return model


def operations(c: Any, grids: list[Grid], merged: int) -> tuple[float, float]:
    """Of products and of attention."""
    patches = sum(grid.patches for grid in grids)
    own = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
    joined = c.hidden_size * merged**2
    mergers = (1 + len(c.deepstack_visual_indexes)) * joined * (joined + c.out_hidden_size) / merged**2
    products = 2 * patches * (c.depth * own + mergers)
    return products, sum(4 * grid.frames * (grid.rows * grid.columns) ** 2 * c.hidden_size * c.depth for grid in grids)


@torch.inference_mode()
def timed(encoder: Encoder, patches: Tensor, grids: list[Grid], rounds: int) -> tuple[float, float]:
    """Milliseconds of a pass: on the device, and of the host until all is launched."""
    device, host = [], []
    for _ in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        began = time.perf_counter()
        encoder.encode(patches, grids)
        host.append(1e3 * (time.perf_counter() - began))
        end.record()
        end.synchronize()
        device.append(start.elapsed_time(end))
    return statistics.median(device[3:]), statistics.median(host[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-vl-8b")
    parser.add_argument("--images", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--schemes", nargs="*", default=["bf16", "ptpc_fp8"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a pass of the most images")
    args = parser.parse_args()
    platform = detect()
    if platform.is_cpu:
        sys.exit("there is no accelerator here")
    ops.bind(platform)
    ceilings = measure_ceilings(platform)
    print(f"{args.shape} on {platform.name}; measured FP8 {ceilings.fp8 / 1e12:.0f}, BF16 {ceilings.plain / 1e12:.0f} TFLOP/s")
    print("scheme     images      ms   images/s   of the limit   host, ms   differs from the first scheme by")
    features: dict[int, Tensor] = {}
    for scheme in args.schemes:
        with model_directory("", args.shape, None) as directory:
            model = tower(directory, scheme, platform)
        encoder = Encoder(model, platform)
        if not args.enforce_eager:
            encoder.capture()
        c = model.config.vision
        side = args.side // c.patch_size
        for count in args.images:
            grids = [Grid(1, side, side)] * count
            generator = torch.Generator(platform.device).manual_seed(0)
            patches = torch.rand(count * side**2, model.patch_size_values, generator=generator, device=platform.device) * 2 - 1
            found, host = timed(encoder, patches, grids, args.rounds)
            products, attention = operations(c, grids, 2)
            rate = ceilings.plain if scheme == "bf16" else ceilings.fp8
            limit = 1e3 * (products / rate + attention / ceilings.plain)
            with torch.inference_mode():
                out = encoder.encode(patches, grids).float()
            other = features.setdefault(count, out)
            apart = float((out - other).norm() / other.norm())
            row = f"{scheme:10} {count:6} {found:7.2f} {1e3 * count / found:10.1f} {100 * limit / found:13.0f}% {host:10.2f}"
            print(f"{row} {100 * apart:10.2f}%", flush=True)
        if args.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, torch.inference_mode():
                encoder.encode(patches, grids)
            print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=70))


if __name__ == "__main__":
    main()
