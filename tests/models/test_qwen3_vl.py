"""The text of Qwen3-VL, dense and with experts, as transformers writes it: below `model.language_model.`, beside a tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMON, LoadModel
from models.test_kimi import check_ranks
from models.test_logits import randomize
from models.test_quantized import BOUND, CPU, error, fake_quantize, logits, octavo_logits
from transformers import (
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from octavo.quant import FP8_PER_CHANNEL

TOWER = dict(
    depth=2, hidden_size=32, intermediate_size=36, num_heads=4, out_hidden_size=64, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, num_position_embeddings=16, deepstack_visual_indexes=[0],
)  # fmt: skip
TEXT = COMMON | dict(head_dim=16, rope_theta=5e6)
EXPERTS = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=40, norm_topk_prob=True)
SPECIAL = dict(image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253)


def qwen3_vl(tower: Mapping[str, Any] = TOWER, **changes: Any) -> PreTrainedModel:
    tied = dict(tie_word_embeddings=changes.pop("tied", False))
    return randomize(
        Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=TEXT | changes, vision_config=tower, **SPECIAL, **tied))
    )


def qwen3_vl_moe(tower: Mapping[str, Any] = TOWER, **changes: Any) -> PreTrainedModel:
    text = TEXT | EXPERTS | changes
    return randomize(Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=tower, **SPECIAL)))


CASES = {"dense": lambda: qwen3_vl(), "tied": lambda: qwen3_vl(tied=True), "experts": lambda: qwen3_vl_moe()}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_text_equal_transformers_on_any_number_of_ranks(case: str, tmp_path: Path, load_model: LoadModel) -> None:
    torch.manual_seed(0)
    model = CASES[case]()
    model.save_pretrained(tmp_path)
    check_ranks(tmp_path, model, load_model)


def test_text_in_fp8_is_what_float64_makes_of_it(tmp_path: Path, load_model: LoadModel) -> None:
    """The tower is in the checkpoint, is not loaded, and that is said."""
    torch.manual_seed(0)
    model = qwen3_vl()
    model.save_pretrained(tmp_path)
    dense = logits(model)
    fake_quantize(model, "ptpc_fp8", but=("lm_head",))
    expected = logits(model)
    loaded = load_model(tmp_path, FP8_PER_CHANNEL, on=CPU)
    assert error(octavo_logits(loaded), expected) < BOUND
    assert error(expected, dense) > 0.01
    assert any("tensor(s) model.visual.* not loaded" in note for note in loaded.loader.report.notes)
