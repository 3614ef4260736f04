"""--decode-activations bf16: a step is fp8_w8a16's up to 32 tokens, ptpc_fp8's beyond; what is refused, and what is said."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases

from octavo import LLM, SamplingParams, ops
from octavo.config import EngineConfig
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.errors import OctavoError
from octavo.quant import SCHEMES, QuantRules
from octavo.tools.quantize.quantize import quantize_checkpoint

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")],
)
DECODE = {"decode_activations": "bf16"}


def start(device: str, scheme: str | None = "ptpc_fp8", model: Path = MODEL_DIR, **options: Any) -> LLM:
    """Without a prefix cache, which would leave fewer tokens of a prompt to a step."""
    if device == "cuda":
        options = {"enforce_eager": True, "kv_cache_memory_bytes": 200_000_000, **options}
    sizes: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 40, "threads": 1, "cpu_kv_cache_gib": 0.1}
    return LLM(model, quantization=scheme, device=device, enable_prefix_caching=False, **(sizes | options))


@cache
def ids() -> list[int]:
    return LLM(device="cpu", threads=1, load_format="dummy", cpu_kv_cache_gib=0.01).encode(HELDOUT.read_text("utf-8"))[:4000]


def answers(llm: LLM, requests: int, prompt: int, tokens: int) -> list[Any]:
    """Tokens with their log-probabilities, of which the last bit tells how a product was computed."""
    prompts = [ids()[100 * at : 100 * at + prompt] for at in range(requests)]
    params = SamplingParams(max_tokens=tokens, temperature=0, logprobs=1, ignore_eos=True)
    return [one.outputs[0].logprobs for one in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_which_steps_are_exact(device: str) -> None:
    """Steps of up to 32 tokens, prompts as well as decode; a step's tokens count, whosever they are."""
    ids()  # by an engine of a CPU, whose ops a process has after it
    hybrid, exact, rounded = start(device, **DECODE), start(device, "fp8_w8a16"), start(device)
    for requests, prompt, tokens, like, unlike in (
        (1, 32, 12, exact, rounded),
        (4, 8, 6, exact, rounded),  # 32 tokens in the first step
        (1, 33, 1, rounded, exact),
        (2, 100, 1, rounded, exact),
        (33, 1, 4, rounded, exact),  # each step is of 33
    ):
        found = answers(hybrid, requests, prompt, tokens)
        assert found == answers(like, requests, prompt, tokens), (requests, prompt)
        assert found != answers(unlike, requests, prompt, tokens), (requests, prompt)
    mixed = answers(hybrid, 1, 33, 12)
    assert mixed[0][0] == answers(rounded, 1, 33, 12)[0][0]
    assert mixed not in (answers(rounded, 1, 33, 12), answers(exact, 1, 33, 12))


def test_what_is_said_of_it_and_what_it_takes() -> None:
    plain, llm = start("cpu", "fp8", quantize_lm_head=True), start("cpu", "fp8", quantize_lm_head=True, **DECODE)
    assert "linear[fp8+decode_bf16]" in ops.table()
    assert any("mlp" in line and "fp8+decode_bf16" in line for line in llm.info.report)
    sizes = [{role: size for role, _, size in one.info.weights} for one in (plain, llm)]
    assert sizes[0] == sizes[1]
    assert {scheme for _, scheme, _ in llm.info.weights} == {"bf16", "fp8+decode_bf16"}


def test_a_stored_checkpoint(tmp_path: Path) -> None:
    quantize_checkpoint(MODEL_DIR, tmp_path / "codes", QuantRules(SCHEMES["ptpc_fp8"]), threads=1, say=lambda _: None)
    stored, online = start("cpu", None, tmp_path / "codes", **DECODE), start("cpu", **DECODE)
    assert answers(stored, 1, 40, 6) == answers(online, 1, 40, 6)
    saved = start("cpu", save_quantized=str(tmp_path / "saved"), **DECODE)
    assert answers(saved, 1, 40, 6) == answers(online, 1, 40, 6)
    quantize_checkpoint(MODEL_DIR, tmp_path / "tiles", QuantRules(SCHEMES["fp8_block"]), threads=1, say=lambda _: None)
    with pytest.raises(OctavoError, match=r"for ptpc_fp8 and fp8, and model\.layers\.0\.\S+ is in fp8_block; leave it out"):
        start("cpu", None, tmp_path / "tiles", **DECODE)


def test_where_it_would_change_nothing() -> None:
    for scheme in (None, "bf16"):
        with pytest.raises(OctavoError, match="changes nothing here: no weight is multiplied by activations in FP8"):
            start("cpu", scheme, **DECODE)


@cases(
    ("options", "sentence"),
    [
        ({"quantization": "fp8_block"}, "is for ptpc_fp8 and fp8, and fp8_block has no product for them; leave it out"),
        ({"quantization": "fp8_w8a16"}, "and fp8_w8a16 leaves no activations in FP8; leave it out"),
        ({"decode_activations": "fp16"}, "--decode-activations 'fp16' is not known"),
    ],
)
def test_what_is_refused_at_once(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(OctavoError, match=sentence):
        EngineConfig(**(DECODE | options))


def test_a_quantization_config_may_ask_for_it(tmp_path: Path) -> None:
    file = tmp_path / "q.json"
    file.write_text(json.dumps({"quantization": "ptpc_fp8", "decode_activations": "bfloat16"}))
    assert EngineConfig(quantization_config=str(file)).decode_activations == "bf16"
    assert EngineConfig(quantization_config=str(file), decode_activations="bf16").decode_activations == "bf16"
