"""FP8 over ranks, on the demo model: each number of them is as far from BF16 as one is (docs/accuracy.md)."""

from __future__ import annotations

import pytest
import torch
from models.test_quantized import CPU
from ranks import run_ranks
from torch import Tensor

from octavo import batch, ops
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.kvcache import KVCache, Layout
from octavo.models import build_model, read_config
from octavo.quant import SCHEMES, QuantRules
from octavo.text.tokenizer import load_tokenizer
from octavo.weights import Loader, SafetensorsSource, load

WINDOW, WINDOWS = 128, 12


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    tokenizer = load_tokenizer(str(MODEL_DIR))
    assert tokenizer is not None
    ids = tokenizer.encode(HELDOUT.read_text("utf-8"))
    step = len(ids) // WINDOWS  # from all over the text
    return [ids[i * step : i * step + WINDOW] for i in range(WINDOWS)]


def log_probabilities(windows: list[list[int]], scheme: str, size: int) -> Tensor:
    """FP64 [tokens, vocabulary], of a model whose values between products are FP32."""
    ops.bind(CPU)

    def run(tp: TensorParallel) -> Tensor:
        model = build_model(read_config(MODEL_DIR), tp, WINDOW)
        source = SafetensorsSource(MODEL_DIR)
        load(model, Loader(source, CPU, QuantRules(SCHEMES[scheme]), torch.float32, tp), model.ignored)  # type: ignore[arg-type]
        specs = model.kv_specs("auto", torch.float32, CPU.fp8_dtype, Layout.on(True))
        model.bind_cache(KVCache(specs, WINDOW // 16 + 1, 16, CPU.device).views)
        found = []
        with torch.inference_mode():
            for window in windows:
                built = batch.build([batch.Span(window, 0, range(1, WINDOW // 16 + 1))], 16, CPU.device)
                found.append(model.logits(model(built, model.embed(built.input_ids))))
            return Vocabulary(model.limits().vocab_size, tp).whole(torch.cat(found))

    return run_ranks(size, run)[0].double().log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    """Of q to p, in nats a token."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_ranks_lose_what_one_loses(windows: list[list[int]]) -> None:
    """Two roundings that have nothing in common are twice as far from each other as each is from BF16."""
    dense = log_probabilities(windows, "bf16", 1)
    assert kl(dense, log_probabilities(windows, "bf16", 4)) < 1e-9
    for scheme, sizes in {"fp8": (4,), "ptpc_fp8": (2, 4), "fp8_block": (2, 4)}.items():
        one = log_probabilities(windows, scheme, 1)
        lost = kl(dense, one)
        assert 0.002 < lost < 0.02
        for size in sizes:
            found = log_probabilities(windows, scheme, size)
            assert kl(dense, found) < 1.15 * lost, (scheme, size)
            assert kl(one, found) < 1.3 * lost, (scheme, size)
