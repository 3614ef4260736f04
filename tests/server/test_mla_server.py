"""The page's command on MLA models, with and without `--kv-cache-dtype fp8`, through the openai client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import relative_error
from models.test_logits import deepseek_v3, deepseek_v32, randomize
from server.processes import Server

from octavo.demo import MODEL_DIR
from octavo.text.tokenizer import Tokenizer

PROMPT = "def median(values):\n    return sorted(values)[len(values) // 2]\n" * 3
FP8, AUTO = ("--kv-cache-dtype", "fp8"), ()
SAID = "KV cache: fp8_ds_mla (what --kv-cache-dtype {} means here)"
CASES = [
    ("deepseek_v32", FP8, SAID.format("fp8") + " and FP8 index keys, 52 + 20 bytes a token a layer, 216 bytes a token"),
    ("deepseek_v3", FP8, SAID.format("fp8") + ", 52 bytes a token a layer, 156 bytes a token"),
    ("kimi_k2", AUTO, "KV cache: bfloat16, 80 bytes a token a layer, 240 bytes a token"),
]


@pytest.mark.parametrize(("model_type", "flags", "said"), CASES)
def test_the_pages_command(model_type: str, flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """Log-probabilities are transformers' within FP8's error, and a stream is what comes whole."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=4096, hidden_size=128, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    reference = randomize(deepseek_v32(index_topk=24, **sizes) if model_type == "deepseek_v32" else deepseek_v3(**sizes))
    reference.bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | dict(model_type=model_type)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, tmp_path)
    ids = Tokenizer(tmp_path).encode(PROMPT)
    assert len(ids) > 30, "more than the indexer chooses"
    with torch.no_grad():
        logits = reference.float()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    command = (
        "--model",
        str(tmp_path),
        "--quantization",
        "fp8",
        *flags,
        "--max-model-len",
        "256",
        "--tensor-parallel-size",
        "1",
    )
    server = Server(*command, "--gpu-memory-utilization", "0.95", "--served-model-name", "tiny", "--threads", "1")
    try:
        log = "".join(server.log)
        assert said in log
        assert "KV scales" not in log
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            how: dict[str, Any] = dict(model="tiny", max_tokens=24, temperature=0, extra_body={"ignore_eos": True})
            echoed = client.completions.create(prompt=PROMPT, echo=True, logprobs=0, **how).choices[0]
            assert echoed.logprobs is not None
            found = torch.tensor((echoed.logprobs.token_logprobs or [])[1 : len(ids)])
            assert relative_error(found, expected) < 0.06
            assert echoed.text.startswith(PROMPT)
            whole = client.completions.create(prompt=PROMPT, **how).choices[0].text
            assert whole.strip()
            chunks = list(client.completions.create(prompt=PROMPT, stream=True, **how))
            assert "".join(chunk.choices[0].text for chunk in chunks) == whole
            messages: Any = [{"role": "user", "content": PROMPT}]
            for _ in range(2):  # the first puts the prefix into the cache, after which BF16 rounds otherwise
                chat = client.chat.completions.create(messages=messages, **how).choices[0]
            parts = list(client.chat.completions.create(messages=messages, stream=True, **how))
            assert "".join(part.choices[0].delta.content or "" for part in parts) == chat.message.content
            assert parts[-1].choices[0].finish_reason == chat.finish_reason == "length"
    finally:
        server.stop()
