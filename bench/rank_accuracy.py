"""KL of FP8 on 1, 2 and 4 ranks to BF16, and to one rank, on the demo model: processes of this CPU over gloo.

    python -m bench.rank_accuracy [--windows 24] [--dtype bfloat16]

Twice where a token has one scale: as it is served, each rank with a scale of its part ("own"), and with the scale of the whole
token, for which ranks would exchange their largest magnitudes. Products are of dequantized codes. The last column is
one rank whose embeddings are changed by a millionth, to itself: what a last bit does.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from octavo import batch, ops
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.distributed import file_store, join, leave
from octavo.engine.vocabulary import Vocabulary
from octavo.kvcache import KVCache, Layout
from octavo.layers.linear import RowParallelLinear
from octavo.models import build_model, read_config
from octavo.ops.contract import values_of
from octavo.ops.reference import SCALE_FLOOR
from octavo.platform import Platform
from octavo.quant import SCHEMES, QTensor, QuantRules, dequantize
from octavo.text.tokenizer import load_tokenizer
from octavo.weights import Loader, SafetensorsSource, load

WINDOW, BLOCK_SIZE = 128, 16
ON = Platform(torch.device("cpu"), "reference", widened_dtype=torch.float32)
RUNS = [("bf16", "own"), ("fp8", "own"), ("fp8", "token's"), ("ptpc_fp8", "own"), ("ptpc_fp8", "token's"), ("fp8_block", "own")]
Found = dict[tuple[str, str], Tensor]


class Keeping(Loader):
    """A Loader that keeps the stored weight beside the packed one."""

    def pack(self, q: QTensor, *, row_lookup: bool = False) -> ops.PackedWeight:
        packed = super().pack(q, row_lookup=row_lookup)
        packed.stored = q
        return packed


class WholeTokens:
    """RowParallelLinear.forward with one scale a token, whose part each rank has."""

    def __init__(self, layer: RowParallelLinear):
        self.layer = layer

    def __call__(self, x: ops.Operand) -> Tensor:
        values, weight = values_of(x), self.layer.weight.stored
        assert weight is not None
        peak = self.layer.tp.max_reduce(values.float().abs().amax(1, keepdim=True))
        scale = (peak / 448).clamp(min=SCALE_FLOOR)
        codes = (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        return self.layer.tp.all_reduce(((codes * scale) @ dequantize(weight).mT).to(values.dtype))


def rank_main(rank: int, size: int, directory: str, windows: list[list[int]], dtype: torch.dtype) -> None:
    """Log-probabilities of every run, FP64 [tokens, vocabulary], to a file of rank 0's."""
    torch.set_num_threads(1)
    store = f"{directory}/store{size}"
    tp = join(rank, size, partial(file_store, store, size), store, ON.device)
    ops.bind(ON)
    found: Found = {}
    for scheme, scales in [*RUNS, *((scheme, "last bit") for scheme in ("fp8", "ptpc_fp8", "fp8_block") if size == 1)]:
        model: Any = build_model(read_config(MODEL_DIR), tp, WINDOW)
        load(model, Keeping(SafetensorsSource(MODEL_DIR), ON, QuantRules(SCHEMES[scheme]), dtype, tp), model.ignored)
        for layer in model.modules() if scales == "token's" else ():
            if isinstance(layer, RowParallelLinear):
                layer.forward = WholeTokens(layer)  # type: ignore[method-assign]
        specs = model.kv_specs("auto", dtype, ON.fp8_dtype, Layout.on(True))
        model.bind_cache(KVCache(specs, WINDOW // BLOCK_SIZE + 1, BLOCK_SIZE, ON.device).views)
        parts = []
        with torch.inference_mode():
            for number, window in enumerate(windows):
                built = batch.build([batch.Span(window, 0, range(1, WINDOW // BLOCK_SIZE + 1))], BLOCK_SIZE, ON.device)
                x = model.embed(built.input_ids)
                if scales == "last bit":
                    noise = torch.randn(x.x.shape, generator=torch.Generator().manual_seed(number))
                    x = x._replace(x=(x.x * (1 + 1e-6 * noise)).to(dtype))
                parts.append(Vocabulary(model.limits().vocab_size, tp).whole(model.logits(model(built, x))))
        found[scheme, scales] = torch.cat(parts).double().log_softmax(-1)
    if not rank:
        torch.save(found, f"{directory}/{size}.pt")
    leave()


def kl(p: Tensor, q: Tensor) -> float:
    """Of q to p, in nats a token."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    tokenizer = load_tokenizer(str(MODEL_DIR))
    assert tokenizer is not None
    ids = tokenizer.encode(HELDOUT.read_text("utf-8"))
    step = len(ids) // args.windows  # from all over the text
    windows = [ids[i * step : i * step + WINDOW] for i in range(args.windows)]
    with tempfile.TemporaryDirectory() as directory:
        for size in (1, 2, 4):
            spawn(rank_main, (size, directory, windows, getattr(torch, args.dtype)), nprocs=size)
        one, two, four = (torch.load(Path(directory) / f"{size}.pt", weights_only=True) for size in (1, 2, 4))
    dense = one["bf16", "own"]
    print("| weights | scales | 1 to BF16 | 2 to BF16 | 4 to BF16 | 2 to 1 | 4 to 1 | 1 to itself |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for run in RUNS:
        base, last = one[run[0], "own"], one.get((run[0], "last bit"), dense)
        values = [kl(dense, found[run]) for found in (one, two, four)] + [kl(base, found[run]) for found in (two, four)]
        values.append(kl(base, last))
        print(f"| `{run[0]}` | {run[1]} | " + " | ".join(f"{value:.4f}" for value in values) + " |")


if __name__ == "__main__":
    main()
