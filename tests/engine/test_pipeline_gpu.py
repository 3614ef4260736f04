"""Two pipeline stages on two accelerators say what one accelerator says: replayed and not, fused and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cases

from octavo import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

PROMPTS = [[5 + (37 * n + 11 * i) % 900 for i in range(1 + 29 * n % 300)] for n in range(24)]  # in chunks, too
KINDS: tuple[dict[str, Any], ...] = (
    dict(temperature=0),
    dict(temperature=0.8, top_p=0.9, seed=7),
    dict(temperature=0, repetition_penalty=1.2),
    dict(temperature=0, logprobs=2),  # which the host must read before the next token
    dict(temperature=0.7, presence_penalty=0.5, seed=3, min_tokens=20),
)


def said(stages: int, options: dict[str, Any]) -> list[list[tuple[int, ...]]]:
    """Tokens of each prompt, and again from the prefix cache."""
    llm = LLM(
        device="cuda", pipeline_parallel_size=stages, max_model_len=1024, max_num_batched_tokens=256,
        kv_cache_memory_bytes=1 << 28, **options,
    )  # fmt: skip
    params = [SamplingParams(max_tokens=40, ignore_eos=n % 4 > 0, **KINDS[n % len(KINDS)]) for n in range(len(PROMPTS))]
    return [[tuple(one.outputs[0].token_ids) for one in llm.generate(PROMPTS, params, False)] for _ in range(2)]


@cases(
    "options",
    [
        dict(dtype="float32", max_num_seqs=24),
        dict(dtype="float32", max_num_seqs=24, enforce_eager=True),
        dict(max_num_seqs=1),  # in BF16 sums depend on how many requests a step has
        dict(max_num_seqs=1, quantization="ptpc_fp8", kv_cache_dtype="fp8"),
    ],
)
def test_two_stages_say_what_one_says(options: dict[str, Any]) -> None:
    expected = said(1, options)
    assert len({token for one in expected[0] for token in one}) > 12, "outputs too dull to tell a mistake by"
    assert said(2, options) == expected
