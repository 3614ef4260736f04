"""--hf-overrides: the model is that of a config.json with these values written in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import COMMON
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.models import architecture
from octavo.models.overrides import overridden
from octavo.models.published import KNOWN

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OLD = {"model_type": "llama", **COMMON, "rope_theta": 5e5, "rope_scaling": LLAMA3}
NEW = {"model_type": "llama", **COMMON, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}


def made(config: dict[str, Any]) -> Any:
    return architecture(config).Config.from_json(config)


@cases("config", [OLD, NEW], ids=["rope_scaling", "rope_parameters"])
@cases(
    ("overrides", "written"),
    [
        ({"max_position_embeddings": 32}, {**OLD, "max_position_embeddings": 32}),
        ({"rope_theta": 7.0}, {**OLD, "rope_theta": 7.0}),
        ({"rope_scaling": YARN}, {**OLD, "rope_scaling": YARN}),
        ({"rope_parameters": {**YARN, "rope_theta": 9.0}}, {**OLD, "rope_scaling": YARN, "rope_theta": 9.0}),
        ({"rope_scaling": None}, {**OLD, "rope_scaling": None}),
        ({"rope_scaling": YARN, "rope_theta": 8.0}, {**OLD, "rope_scaling": YARN, "rope_theta": 8.0}),
        ({"vocab_size": OLD["vocab_size"]}, OLD),  # what the file says already
    ],
)
def test_an_override_is_as_if_it_were_written(
    config: dict[str, Any], overrides: dict[str, Any], written: dict[str, Any]
) -> None:
    before = json.dumps(config)
    assert made(overridden(config, overrides)) == made(written)
    assert json.dumps(config) == before


@cases(
    ("overrides", "sentence"),
    [
        ({"architectures": ["X"]}, "--hf-overrides cannot change architectures, which the checkpoint's tensors follow"),
        ({"torch_dtype": "float64"}, "torch_dtype changes nothing that model_type 'llama' is made of; leave it out."),
        ({"rope_theta": 2.0, "max_positions": 4}, "max_positions changes nothing"),
        ({"quantization_config": {}}, "--hf-overrides cannot change quantization_config"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings must be of type int, not 'long'."),
        ({"rope_scaling": {"rope_type": "spiral"}}, "config.json asks for rope_type 'spiral'"),
    ],
)
def test_what_changes_nothing_or_is_wrong_is_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OctavoError, match=sentence.replace("(", "\\(")):
        overridden(OLD, overrides)


def test_a_model_within_a_model() -> None:
    config = KNOWN["Qwen3-VL-8B"]
    longer = {"max_position_embeddings": 400_000}
    changed = overridden(config, {"text_config": longer})
    assert made(changed) == made({**config, "text_config": {**config["text_config"], **longer}}) != made(config)
    with pytest.raises(OctavoError, match=r'it may belong into {"text_config": \.\.\.}, or leave it out'):
        overridden(config, longer)


def test_short_forms_are_overrides() -> None:
    config = EngineConfig(rope_scaling=json.dumps(YARN), rope_theta=9.0, hf_overrides={"max_position_embeddings": 4})
    assert config.hf_overrides == {"max_position_embeddings": 4, "rope_scaling": YARN, "rope_theta": 9.0}
    with pytest.raises(OctavoError, match=r"--rope-theta and --hf-overrides give two values of rope_theta; give one."):
        EngineConfig(rope_theta=9.0, hf_overrides='{"rope_theta": 8.0}')


def test_an_engine_s_tokens_are_transformers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = LlamaConfig(**{**COMMON, "max_position_embeddings": 64})
    LlamaForCausalLM(plain).save_pretrained(tmp_path)
    ids = torch.randint(3, COMMON["vocab_size"], (1, 100), generator=torch.Generator().manual_seed(1))
    config = AutoConfig.from_pretrained(tmp_path)
    config.rope_parameters = {**YARN, "rope_theta": 10000.0}
    reference = LlamaForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.float32)
    want = reference.generate(ids, max_new_tokens=4, do_sample=False)[0, 100:].tolist()
    llm = LLM(tmp_path, rope_scaling=YARN, dtype="float32", enforce_eager=True)
    assert llm.info.max_model_len == 256
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    assert llm.generate(ids[0].tolist(), params)[0].outputs[0].token_ids == want
