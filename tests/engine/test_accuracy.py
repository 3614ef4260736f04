"""Perplexity of the demo model on text it was never trained on: what each FP8 scheme and cache costs."""

from __future__ import annotations

import math

import pytest
import torch
from cases import cases
from transformers import LlamaForCausalLM

from octavo import LLM, SamplingParams
from octavo.demo import HELDOUT, MODEL_DIR

WINDOW, WINDOWS = 256, 16


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    ids = LLM(MODEL_DIR, device="cpu", threads=1, load_format="dummy").encode(HELDOUT.read_text("utf-8"))
    step = len(ids) // WINDOWS  # from all over the text
    return [ids[i * step : i * step + WINDOW] for i in range(WINDOWS)]


def perplexity(windows: list[list[int]], **options) -> float:
    llm = LLM(MODEL_DIR, device="cpu", threads=1, max_model_len=512, **options)
    found = llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    values = [
        p[token].logprob for out in found for token, p in zip(out.prompt_token_ids, out.prompt_logprobs, strict=True) if p
    ]
    assert len(values) == WINDOWS * (WINDOW - 1)
    return math.exp(-sum(values) / len(values))


@pytest.fixture(scope="module")
def dense(windows) -> float:
    return perplexity(windows)


def test_bf16_is_the_model_itself(windows, dense):
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.double() for ids in torch.tensor(windows).split(4)]
    exact = float(torch.stack(losses).mean().exp())
    assert dense == pytest.approx(exact, rel=0.005)
    assert exact < 200, "the demo model has learnt nothing; the comparisons here would mean nothing"


@cases(
    ("scheme", "kv", "bound"),
    [
        ("bf16", "fp8", 0.01),
        ("fp8", "auto", 0.01),
        ("fp8", "fp8", 0.015),
        ("ptpc_fp8", "auto", 0.005),
        ("ptpc_fp8", "fp8", 0.01),
        ("ptpc_fp8", "fp8_per_token_head", 0.01),
    ],
)
def test_fp8_costs_little(windows, dense, scheme, kv, bound):
    found = perplexity(windows, quantization=scheme, kv_cache_dtype=kv)
    assert found == pytest.approx(dense, rel=bound)
    assert found != dense  # something was quantized


def test_quantizing_the_tied_head_costs_little(windows, dense):
    """Head and look-up read the same codes; a look-up's row is within a sixteenth of the BF16 one."""
    found = perplexity(windows, quantization="ptpc_fp8", quantize_lm_head=True)
    assert found == pytest.approx(dense, rel=0.01)
    assert found != perplexity(windows, quantization="ptpc_fp8")
