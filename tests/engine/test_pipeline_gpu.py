"""Two pipeline stages on two accelerators say what one accelerator says: replayed and not, fused and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cases

from octavo import LLM, SamplingParams
from octavo.frontend.outputs import CompletionOutput

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


TIE = 0.1  # nats between two tokens, of which sums in another order may choose either


def outputs(stages: int, params: list[SamplingParams], options: dict[str, Any]) -> list[list[CompletionOutput]]:
    """What is said to each prompt, and again from the prefix cache."""
    llm = LLM(
        device="cuda", pipeline_parallel_size=stages, max_model_len=1024, max_num_batched_tokens=256,
        kv_cache_memory_bytes=1 << 28, **options,
    )  # fmt: skip
    return [[one.outputs[0] for one in llm.generate(PROMPTS, params, False)] for _ in range(2)]


def tokens(said: list[list[CompletionOutput]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(one.token_ids) for one in run] for run in said]


@cases(
    "options",
    [
        dict(dtype="float32", max_num_seqs=24),
        dict(dtype="float32", max_num_seqs=24, enforce_eager=True),
        dict(max_num_seqs=1),  # in BF16 sums depend on how many requests a step has
    ],
)
def test_two_stages_say_what_one_says(options: dict[str, Any]) -> None:
    params = [SamplingParams(max_tokens=40, ignore_eos=n % 4 > 0, **KINDS[n % len(KINDS)]) for n in range(len(PROMPTS))]
    expected = tokens(outputs(1, params, options))
    assert len({token for one in expected[0] for token in one}) > 12, "outputs too dull to tell a mistake by"
    assert tokens(outputs(2, params, options)) == expected


def test_two_stages_in_fp8_differ_where_two_tokens_are_as_likely() -> None:
    """Between a stage's layers one launch sums in another order than the ops at its ends do, and a last bit changes a code."""
    options = dict(max_num_seqs=1, quantization="ptpc_fp8", kv_cache_dtype="fp8")
    params = [SamplingParams(max_tokens=40, ignore_eos=True, temperature=0, logprobs=2) for _ in PROMPTS]
    one, two = (outputs(stages, params, options) for stages in (1, 2))
    assert len({token for run in tokens(one) for said in run for token in said}) > 12, "outputs too dull to tell a mistake by"
    differ = 0
    for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True):
        at = next((n for n, pair in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if len(set(pair)) > 1), None)
        if at is not None:
            differ += 1
            assert a.logprobs is not None
            likely = sorted(found.logprob for found in a.logprobs[at].values())
            assert likely[-1] - likely[-2] < TIE, (a.token_ids, b.token_ids, at)
    assert differ <= len(PROMPTS) / 2, f"{differ} of {2 * len(PROMPTS)} answers differ"
