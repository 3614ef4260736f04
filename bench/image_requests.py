"""Requests with images, without HTTP: time to the first token, other requests' tokens beside arriving images, memory of a large
image. Random weights and images; a request is 64 tokens of text around one image of 1024 x 1024 pixels.

    python -m bench.image_requests --schemes bf16 ptpc_fp8
    python -m bench.image_requests --schemes ptpc_fp8 --budgets 1024 2048 4096    # image tokens that a step encodes

Needs an accelerator.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import IMAGE_TOKENS
from octavo.engine.sequence import EncoderPart, RequestImage
from octavo.images import Grid, ImagePatches, PlacedImage
from octavo.messages import EngineRequest, SamplingParams
from octavo.platform import detect
from octavo.tools.bench.workloads import model_directory

IMAGE = 151655
USUAL = Grid(1, 64, 64)
LARGEST = Grid(1, 256, 256)  # 16,384 tokens
SEEDS = count()  # no image is seen twice, or it would not be encoded
DECODES, STEPS = 16, 150  # requests beside which images arrive, and their steps


def image(seed: int, grid: Grid = USUAL) -> ImagePatches:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (grid.patches, 3, 1, 256), dtype=np.uint8)
    values = np.linspace([-1] * 3, [1] * 3, 256, dtype=np.float32).T.copy()
    return ImagePatches(pixels, values, 2, grid, grid.patches // 4, rng.bytes(32))


def request(name: str, images: Sequence[ImagePatches], tokens: int = 1) -> EngineRequest:
    text = np.random.default_rng(len(name)).integers(5, 100_000, 64).tolist()
    ids = text[:32]
    placed = []
    for one in images:
        placed.append(PlacedImage(len(ids), one))
        ids += [IMAGE] * one.tokens
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return EngineRequest(name, ids + text[32:], params, images=tuple(placed))


def finish(core: EngineCore) -> None:
    while core.has_work():
        core.step()


def first_token(core: EngineCore, with_image: bool, rounds: int = 12) -> float:
    """Milliseconds, the median; the text alone is as long as text and image together."""
    took = []
    for number in range(rounds):
        asked = request(f"first {number}", [image(next(SEEDS))] if with_image else [])
        if not with_image:
            ids = np.random.default_rng(number).integers(5, 100_000, 64 + 1024).tolist()
            asked = EngineRequest(asked.request_id, ids, asked.params)
        began = time.perf_counter()
        core.add(asked)
        while not core.step()[0]:
            pass
        took.append(1e3 * (time.perf_counter() - began))
        finish(core)
    return statistics.median(took[2:])


def beside(core: EngineCore, images: Sequence[int], grid: Grid = USUAL) -> list[float]:
    """Milliseconds between the tokens of running requests; images[i] arrive in step i, each in a request of its own."""
    for number in range(DECODES):
        core.add(request(f"decode {number}", [], STEPS + 100))
    while not core.scheduler.running or core.scheduler.waiting:
        core.step()
    for _ in range(10):
        core.step()
    arriving = [[image(next(SEEDS), grid) for _ in range(number)] for number in images]
    took = []
    for step, found in enumerate(arriving):
        for n, one in enumerate(found):
            core.add(request(f"image {step} {n}", [one]))
        began = time.perf_counter()
        core.step()
        took.append(1e3 * (time.perf_counter() - began))
    for name in list(core.scheduler.request_ids):
        core.abort(name)
    finish(core)
    return sorted(took)


def told(took: list[float]) -> str:
    return f"p50 {took[len(took) // 2]:.2f}, p99 {took[int(0.99 * len(took))]:.1f}, longest {took[-1]:.1f} ms"


def largest(core: EngineCore) -> str:
    """Peak memory of encoding the largest image, beside what is planned for it."""
    encoder = core.runner.encoder
    assert encoder is not None
    found = image(1, LARGEST)
    given = [EncoderPart(RequestImage(0, found.tokens, b"largest", found))]
    for _ in range(2):  # the first compiles
        encoder.features.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        encoder.run(given, [])
        torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() - before
    planned = encoder.model.encoder_workspace_bytes(16_384, torch.bfloat16)
    encoder.features.clear()
    return f"{took:.0f} ms, peak {peak / 2**30:.2f} GiB, planned {planned / 2**30:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-vl-8b")
    parser.add_argument("--schemes", nargs="*", default=["bf16", "ptpc_fp8"])
    parser.add_argument("--budgets", type=int, nargs="*", default=[IMAGE_TOKENS])
    args = parser.parse_args()
    if detect().is_cpu:
        sys.exit("there is no accelerator here")
    for scheme in args.schemes:
        with model_directory("", args.shape, None) as directory:
            config = EngineConfig(
                model=str(directory), load_format="dummy", quantization=scheme, max_model_len=32_768,
                kv_cache_dtype="auto" if scheme == "bf16" else "fp8",
            )  # fmt: skip
            began = time.perf_counter()
            core = EngineCore(config)
        print(f"{args.shape}, {scheme}, on {core.runner.platform.name}; ready after {time.perf_counter() - began:.1f} s")
        print(f"  the largest image: {largest(core)}")
        texts, pictures = first_token(core, False), first_token(core, True)
        print(f"  first token: {pictures:.1f} ms with an image; {texts:.1f} ms with text of as many tokens", flush=True)
        print(f"  tokens of {DECODES} requests: {told(beside(core, [0] * STEPS))}")
        for budget in args.budgets:
            core.scheduler.image_tokens = budget
            one_by_one = beside(core, [int(step % 15 == 3) for step in range(STEPS)])
            at_once = beside(core, [8 * (step == 3) for step in range(STEPS)])
            print(f"  {budget} image tokens a step: an image every 15 steps {told(one_by_one)}")
            print(f"  {budget} image tokens a step: 8 at once {told(at_once)}", flush=True)
            huge = beside(core, [int(step == 3) for step in range(STEPS)], LARGEST)
            print(f"  {budget} image tokens a step: one of {LARGEST.patches // 4:,} tokens {told(huge)}", flush=True)
        del core


if __name__ == "__main__":
    main()
