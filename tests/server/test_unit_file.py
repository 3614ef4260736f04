"""A command line as it stands in a unit file for vLLM starts as it is."""

from __future__ import annotations

import openai
import pytest
from server.processes import Server

from octavo.demo import MODEL_DIR

UNIT = f"""
--model {MODEL_DIR} --served-model-name llama --api-key K
--trust-remote-code --dtype half --max-model-len 512 --gpu-memory-utilization 0.92 --tensor-parallel-size 1
--pipeline-parallel-size 1 --max-num-seqs 64 --max-num-batched-tokens 2048 --enable-prefix-caching --enable-chunked-prefill
--swap-space 4 --disable-log-requests --enable-auto-tool-choice --tool-call-parser hermes
--chat-template-content-format auto --generation-config auto --max-logprobs 20 --kv-cache-dtype auto
--distributed-executor-backend mp --uvicorn-log-level info --block-size 16 --seed 0 --load-format auto
--override-generation-config {{"temperature":0}} --hf-overrides.max_position_embeddings 768 --threads 1
""".split()


def test_a_unit_file_starts() -> None:
    server = Server(*UNIT)
    try:
        log = "".join(server.log)
        assert "octavo: taken without effect: --trust-remote-code, --swap-space.\n" in log
        assert "octavo: --dtype half is served in bfloat16, which has the same size and a wider range.\n" in log
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="K", max_retries=0, timeout=60) as client:
            first, second = (client.completions.create(model="llama", prompt="def f", max_tokens=8, logprobs=20) for _ in "ab")
            assert first.choices[0].text == second.choices[0].text  # temperature 0
            assert client.models.retrieve("llama").max_model_len == 512  # type: ignore[attr-defined]
            with pytest.raises(openai.BadRequestError, match="logprobs must be between 0 and 20, not 21"):
                client.completions.create(model="llama", prompt="def f", logprobs=21)
    finally:
        server.stop()


# What the vendor's page on FP8 and its neighbours set: variables that choose vLLM's kernels, and sizes for large GPUs.
VARIABLES = {
    "VLLM_USE_TRITON_FLASH_ATTN": "0", "VLLM_ROCM_USE_AITER": "1", "VLLM_ROCM_USE_AITER_MHA": "0",
    "VLLM_ROCM_USE_AITER_FP8BMM": "0", "AITER_ENABLE_VSKIP": "0",
}  # fmt: skip


def test_the_pages_environment_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    flags = (
        "--quantization fp8 --kv-cache-dtype fp8 --block-size 1 --max-num-seqs 4096 --max-num-batched-tokens 65536 --threads 1"
    )
    server = Server("--max-model-len", "512", *flags.split())
    try:
        log = "".join(server.log)
        assert [log.count(name) for name in ("VLLM_USE_TRITON_FLASH_ATTN", "VLLM_ROCM_USE_AITER,", "AITER_ENABLE")] == [1, 1, 1]
        named = f"octavo: ignoring the environment variables {', '.join(sorted(VARIABLES))}, which mean nothing here.\n"
        assert named in log
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="K", max_retries=0, timeout=60) as client:
            model = client.models.list().data[0].id
            assert client.completions.create(model=model, prompt="def f", max_tokens=8).choices[0].text
    finally:
        server.stop()
