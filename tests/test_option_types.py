"""Options of `LLM` and EngineConfig in Python: values of other types than a flag's text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cases

from octavo.config import EngineConfig
from octavo.errors import OctavoError


@cases(
    ("given", "taken"),
    [
        (dict(dtype=torch.bfloat16), "bfloat16"),
        (dict(dtype=torch.float16), "bfloat16"),
        (dict(seed=None), 0),
        (dict(seed="1"), 1),
        (dict(max_num_seqs="4"), 4),
        (dict(gpu_memory_utilization="0.8"), 0.8),
        (dict(gpu_memory_utilization=None), 0.92),
        (dict(gpu_memory_utilization=1), 1),
        (dict(max_model_len=1024.0), 1024),
        (dict(max_model_len="auto"), None),
        (dict(kv_cache_dtype=None), "auto"),
        (dict(kv_cache_dtype_skip_layers=3), ("3",)),
    ],
)
def test_what_is_meant_is_taken(given: dict[str, Any], taken: Any) -> None:
    (name,) = given
    if name == "gpu_memory_utilization" and given[name] is None:
        taken = EngineConfig().gpu_memory_utilization
    assert getattr(EngineConfig(**given), name) == taken


@cases(
    ("given", "sentence"),
    [
        (dict(enforce_eager="false"), "--enforce-eager must be True or False, not 'false'"),
        (dict(enable_prefix_caching=1), "--enable-prefix-caching must be True or False, not 1"),
        (dict(max_model_len=True), "--max-model-len must be a whole number, not True"),
        (dict(max_num_batched_tokens=2.5), "--max-num-batched-tokens must be a whole number, not 2.5"),
        (dict(max_num_seqs="many"), "--max-num-seqs must be a whole number, not 'many'"),
        (dict(download_dir=3), "--download-dir must be a string, not 3"),
        (dict(quantization=8), "--quantization must be a string, not 8"),
    ],
)
def test_what_is_not_is_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OctavoError, match=f"^{sentence}"):
        EngineConfig(**given)
