"""Perplexity of the demo model on its held-out text, for every scheme and KV cache, and with its tied head quantized too.

    python -m bench.accuracy            # the whole held-out text, windows of 512 tokens
    python -m bench.accuracy DIRECTORY --text FILE   # another model; a mixture of experts: scripts/train_demo.py --experts

Each window is a prompt of its own whose tokens' log-probabilities are summed from the second on, so every prediction is made
from at least one token and at most 511. The cache is read through attention, so its quantization counts as in serving.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from octavo import LLM, SamplingParams
from octavo.demo import HELDOUT, MODEL_DIR

RUNS = [(weights, kv, False) for weights in ("bf16", "fp8", "ptpc_fp8", "fp8_block") for kv in ("auto", "fp8")]
RUNS += [("ptpc_fp8", "fp8_e5m2", False), ("ptpc_fp8", "fp8_per_token_head", False)]
RUNS += [(weights, "auto", True) for weights in ("fp8", "ptpc_fp8", "fp8_block")]


def perplexity(llm: LLM, windows: list[list[int]]) -> float:
    outputs = llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    total, count = 0.0, 0
    for window, output in zip(windows, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            total -= entry[token].logprob
            count += 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(MODEL_DIR), metavar="DIRECTORY")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    base = None
    print("| weights | KV cache | perplexity | against BF16 |\n|---|---|---:|---:|")
    for weights, kv, head in RUNS:
        llm = LLM(args.model, quantization=weights, kv_cache_dtype=kv, quantize_lm_head=head)
        ids = llm.get_tokenizer().encode(args.text.read_text())
        windows = [w for at in range(0, len(ids), args.window) if len(w := ids[at : at + args.window]) > 1]
        value = perplexity(llm, windows)
        base = base or value
        name = weights + (", lm_head too" if head else "")
        print(f"| {name} | {'BF16' if kv == 'auto' else kv} | {value:.4f} | {100 * (value / base - 1):+.3f}% |", flush=True)
    print(f"\n{len(ids):,} tokens of {args.text.name}, windows of {args.window}")


if __name__ == "__main__":
    main()
