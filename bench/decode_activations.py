"""What exact activations in decode alone would save: a prompt read in `ptpc_fp8`, its continuation in `fp8_w8a16`.

    python -m bench.decode_activations MODEL [--text FILE] [--windows 24] [--prompt 128] [--decoded 64]

KL to BF16, nats a token, over the text's own tokens behind each prompt, one at a time as decode steps compute them. All schemes
have the same codes of weights; the cache is BF16. Keys and values of a prompt come from the scheme that read it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import batch, ops
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.distributed import TensorParallel
from octavo.kvcache import KVCache, Layout
from octavo.models import build_model, read_config
from octavo.platform import detect
from octavo.quant import SCHEMES, QuantRules
from octavo.text.tokenizer import load_tokenizer
from octavo.weights import Loader, SafetensorsSource, load

BLOCK_SIZE = 16
WAYS = [("ptpc_fp8", "ptpc_fp8"), ("ptpc_fp8", "fp8_w8a16"), ("fp8_w8a16", "fp8_w8a16")]  # of prompts, of decode steps


class Reader:
    """A model under one scheme, over a cache that others may share."""

    def __init__(self, directory: Path, scheme: str, tokens: int):
        self.on = detect("cpu")
        ops.bind(self.on)
        self.model: Any = build_model(read_config(directory), TensorParallel(), tokens)
        rules = QuantRules(SCHEMES[scheme])
        load(self.model, Loader(SafetensorsSource(directory), self.on, rules, torch.bfloat16), self.model.ignored)

    def make_cache(self, requests: int, tokens: int) -> KVCache:
        specs = self.model.kv_specs("auto", torch.bfloat16, self.on.fp8_dtype, Layout.on(True))
        return KVCache(specs, requests * -(-tokens // BLOCK_SIZE) + 1, BLOCK_SIZE, self.on.device)

    def read(self, cache: KVCache, windows: list[list[int]], start: int, stop: int) -> Tensor:
        """Log-probabilities behind the last of tokens [start, stop) of each window, FP64 [windows, vocabulary]."""
        self.model.bind_cache(cache.views)
        each = -(-len(windows[0]) // BLOCK_SIZE)
        blocks = [range(1 + at * each, 1 + (at + 1) * each) for at in range(len(windows))]
        spans = [batch.Span(window[start:stop], start, own) for window, own in zip(windows, blocks, strict=True)]
        built = batch.build(spans, BLOCK_SIZE, self.on.device)
        hidden = self.model(built, self.model.embed(built.input_ids))
        ends = torch.arange(1, len(windows) + 1) * (stop - start) - 1
        log_probabilities: Tensor = self.model.logits(hidden[ends]).double().log_softmax(-1)
        return log_probabilities


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL_DIR)
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decoded", type=int, default=64)
    args = parser.parse_args()
    tokenizer = load_tokenizer(str(args.model))
    assert tokenizer is not None
    ids, length = tokenizer.encode(args.text.read_text("utf-8")), args.prompt + args.decoded
    step = (len(ids) - length) // args.windows  # from all over the text
    windows = [ids[i * step : i * step + length] for i in range(args.windows)]

    def continued(prompts: Reader, decodes: Reader) -> Tensor:
        cache = prompts.make_cache(len(windows), length)
        prompts.read(cache, windows, 0, args.prompt)
        return torch.stack([decodes.read(cache, windows, at, at + 1) for at in range(args.prompt, length)])

    dense = Reader(args.model, "bf16", length)
    expected = continued(dense, dense)
    readers = {scheme: Reader(args.model, scheme, length) for scheme in ("ptpc_fp8", "fp8_w8a16")}
    print("| prompts | decode steps | KL | ± | top-1 |\n|---|---|---:|---:|---:|")
    for ways in WAYS:
        found = continued(*(readers[scheme] for scheme in ways))
        each = (expected.exp() * (expected - found)).sum(-1)
        same = (found.argmax(-1) == expected.argmax(-1)).double().mean()
        error = each.mean(0).std() / len(windows) ** 0.5  # windows are independent, tokens of one are not
        print(f"| `{ways[0]}` | `{ways[1]}` | {each.mean():.4f} | {error:.4f} | {same:.1%} |", flush=True)


if __name__ == "__main__":
    main()
