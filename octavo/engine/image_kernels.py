"""Compiles the kernels of known models into the user's caches, for an image: no GPU is needed.

python -m octavo.engine.image_kernels --accelerator h200 --models Llama-3.1-8B Qwen3-8B

Triton's cache names its own files by whole paths, so it is found where it was made: $HOME must be what it will be at run time.

What is compiled is what a start with default limits compiles before it serves: for a model that is published in BF16 as it is,
in `fp8` and in `ptpc_fp8`, over a cache in BF16 and in FP8; for one that is published quantized, as it is stored. A kernel is
made for the sizes of a model and for whether numbers, such as the width of the block tables that --max-model-len decides, are
multiples of 16: those of other models and other flags can be others, and a start then compiles what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton

from octavo.config import EngineConfig
from octavo.engine.rehearsal import Rehearsal, compile_in_processes, rehearsing
from octavo.errors import OctavoError
from octavo.models.published import KNOWN, known_config, unknown_model
from octavo.platform import Described

__all__ = ["ACCELERATORS", "main", "rehearse"]

META, GIB = torch.device("meta"), 1 << 30
FNUZ = torch.float8_e4m3fnuz


def _hopper(gib: int) -> Described:
    return Described(META, "sm_90", multiprocessors=132, shared_memory=227 << 10, free=gib * GIB, total=gib * GIB)


ACCELERATORS = {
    "h100": _hopper(79),
    "h200": _hopper(139),
    "mi300x": Described(META, "gfx942", FNUZ, multiprocessors=304, shared_memory=64 << 10, free=191 * GIB, total=192 * GIB),
    "mi355x": Described(META, "gfx950", multiprocessors=256, shared_memory=160 << 10, free=287 * GIB, total=288 * GIB),
}
SERVED = (("ptpc_fp8", "fp8"), ("ptpc_fp8", "auto"), ("fp8", "fp8"), ("fp8", "auto"), (None, "auto"))  # schemes and caches
STORED = ((None, "fp8"), (None, "auto"))
RANKS = (1, 2, 4, 8)


def rehearse(config: dict[str, Any], device: Described, scheme: str | None, cache: str) -> None:
    """Takes the steps of a start on as few ranks as hold the model. Raises OctavoError where none do."""
    with TemporaryDirectory(prefix="octavo-image-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        asked = EngineConfig(model=directory, load_format="dummy", quantization=scheme, kv_cache_dtype=cache)
        for ranks in RANKS:
            try:
                Rehearsal(replace(asked, tensor_parallel_size=ranks), device)
            except OctavoError:
                if ranks == RANKS[-1]:
                    raise
            else:
                return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", required=True, choices=ACCELERATORS)
    known_names = ", ".join(KNOWN)
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL", help=f"one or several words of: {known_names}")
    args = parser.parse_args()
    triton.knobs.compilation.store_binary_only = True  # nothing reads the other stages
    began, device = time.monotonic(), ACCELERATORS[args.accelerator]
    with rehearsing(device) as jobs:
        for name in " ".join(args.models).split():
            if (known := known_config(name)) is None:
                sys.exit(f"octavo: {unknown_model(name)}")
            before = len(jobs)
            for scheme, cache in STORED if "quantization_config" in known[1] else SERVED:
                try:
                    rehearse(known[1], device, scheme, cache)
                except OctavoError as error:
                    sys.exit(f"octavo: {known[0]} in {scheme or 'the format it has'}: {error}")
            print(f"{known[0]}: {len(jobs) - before} more kernels after {time.monotonic() - began:.0f} s", flush=True)
    failed = compile_in_processes(list(jobs.values()), len(os.sched_getaffinity(0)))
    print(f"{len(jobs) - failed} of {len(jobs)} kernels for {device.arch} compiled in {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
