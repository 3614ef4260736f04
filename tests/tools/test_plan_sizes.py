"""A plan's numbers against the published sizes, transformers' own counts and the tensors that octavo.quant makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from cases import cases
from tools.planner import answer

from octavo.config import EngineConfig
from octavo.kvcache import spec_for
from octavo.models.published import KNOWN, known_config
from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.model_source import source_of_config
from octavo.tools.plan.subject import Subject, Variant

# Of the models as published: parameters in 1e9, GB in BF16, GB with linears in FP8 of 128x128 tiles (or as
# the hub has them), KiB of BF16 cache a token, of which the indexer's. As printed: half of the last digit is their precision.
PUBLISHED = [
    ("Llama-3.1-8B", "8.03", "16.1", "9.1", "128", "0"),
    ("Llama-3.1-70B", "70.6", "141.1", "72.7", "320", "0"),
    ("Llama-3.1-405B", "405.9", "811.7", "410.2", "504", "0"),
    ("Qwen3-8B", "8.19", "16.4", "9.4", "144", "0"),
    ("Qwen3-30B-A3B", "30.5", "61.1", "31.2", "96", "0"),
    ("Qwen3-VL-235B-A22B", "235.7", "471.3", "237.0", "188", "0"),  # its tower, 0.58, in FP8 too
    ("DeepSeek-V3.2", "671.9", "1343.8", "674.0", "68.6", "7.9"),
    ("Kimi-K2.5", "1026.9", "2053.8", "595.1", "68.6", "0"),  # its tower, 0.47, is in BF16 on the hub
]


def subject_of(config: Mapping[str, Any]) -> Subject:
    return Subject(source_of_config("model", "its config.json", config), EngineConfig(), Accelerator("any", "any", 0))


def assert_printed(value: float, printed: str) -> None:
    """`value` rounds to `printed`, or is within 0.1% of it: the table's rounding is coarser where it has three digits."""
    half = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    assert abs(value - float(printed)) <= max(half * 1.0001, 1e-3 * float(printed)), (value, printed)


@cache
def published(name: str) -> dict[str, Any]:
    return answer(name, "--accelerator", "mi355x", "-q", "fp8_block", "--kv-cache-dtype", "auto")


@cases(("name", "parameters", "bf16", "fp8", "kv", "index"), PUBLISHED, ids=lambda text: str(text))
def test_published_sizes(name: str, parameters: str, bf16: str, fp8: str, kv: str, index: str) -> None:
    found = published(name)
    variants = found["variants"]
    native = known_config(name)[1].get("quantization_config") or name.startswith("Kimi")  # type: ignore[index]
    stored = answer(name, "--accelerator", "mi355x")["variants"]["native"] if native else variants["FP8 block"]
    assert_printed(found["parameters"] / 1e9, parameters)
    assert_printed(variants["BF16"]["weights"] / 1e9, bf16)
    # Codes on disk, held in the model's dtype: what makes MLA's keys and values, 128 heads of 128 + 128 from 512.
    decoded = 61 * 512 * 128 * 256 if name == "DeepSeek-V3.2" else 0
    assert_printed((stored["weights"] - decoded) / 1e9, fp8)
    subject = subject_of(known_config(name)[1])  # type: ignore[index]
    token, index_bytes = subject.token_bytes(Variant("bf16", False, "bfloat16"), 1)
    assert token + index_bytes == variants["BF16"]["token_bytes"]
    assert_printed(token / 1024, kv)
    assert_printed(index_bytes / 1024, index)


@cases("name", ["Llama-3.1-8B", "Llama-3.1-405B", "Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-VL-235B-A22B"])
def test_scales_are_all_that_the_schemes_differ_by(name: str) -> None:
    """`fp8` and `ptpc_fp8` hold an FP32 scale a row: for 512 columns or more, within 0.3% of a scale for 128x128 values."""
    variants = published(name)["variants"]
    assert variants["FP8"]["weights"] == variants["PTPC"]["weights"]
    assert variants["PTPC"]["weights"] == pytest.approx(variants["FP8 block"]["weights"], rel=3e-3)


COMMON: dict[str, Any] = dict(
    vocab_size=256, hidden_size=64, intermediate_size=136, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
EXPERTS = dict(moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2)
MLA: dict[str, Any] = COMMON | dict(
    num_key_value_heads=4, moe_intermediate_size=48, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=2, n_group=4,
    topk_group=2, first_k_dense_replace=1, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=24,
)  # fmt: skip
QWEN_VISION = dict(
    depth=3, hidden_size=32, intermediate_size=68, num_heads=4, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
    in_channels=3, num_position_embeddings=64, out_hidden_size=64, deepstack_visual_indexes=[0, 1],
)  # fmt: skip
QWEN_ROPE = {"rope_parameters": dict(rope_type="default", rope_theta=5e6, mrope_section=[3, 3, 2], mrope_interleaved=True)}
KIMI_VISION = dict(
    patch_size=14, pos_emb_height=8, pos_emb_width=6, pos_emb_time=4, num_attention_heads=4, num_hidden_layers=2,
    hidden_size=32, intermediate_size=68, merge_kernel_size=[2, 2],
)  # fmt: skip
GLM_ATTENTION = dict(attention_bias=True, use_qk_norm=True)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", COMMON),
    "llama, tied, biases": ("Llama", COMMON | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=24)),
    "mistral": ("Mistral", COMMON),
    "qwen2": ("Qwen2", COMMON),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=32)),
    "qwen3_moe": ("Qwen3Moe", COMMON | EXPERTS | dict(head_dim=32)),
    "qwen3_moe, some layers dense": ("Qwen3Moe", COMMON | EXPERTS | dict(decoder_sparse_step=2, num_hidden_layers=5)),
    "qwen3_moe, one layer dense": ("Qwen3Moe", COMMON | EXPERTS | dict(mlp_only_layers=[1])),
    "mixtral": ("Mixtral", COMMON | dict(num_local_experts=8, num_experts_per_tok=2)),
    "glm4_moe": (
        "Glm4Moe",
        COMMON | dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=2, head_dim=32),
    ),
    "glm4_moe, with all": (
        "Glm4Moe",
        COMMON | dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48) | GLM_ATTENTION,
    ),
    "minimax_m2": ("MiniMaxM2", COMMON | dict(num_local_experts=8, num_experts_per_tok=2, head_dim=32)),
    "deepseek_v3": ("DeepseekV3", MLA),
    "deepseek_v3, biases": ("DeepseekV3", MLA | dict(attention_bias=True)),
    "deepseek_v32": ("DeepseekV32", MLA | dict(index_n_heads=16, index_head_dim=16, index_topk=6)),
    "qwen3_vl": ("Qwen3VL", dict(text_config=COMMON | QWEN_ROPE, vision_config=QWEN_VISION, tie_word_embeddings=False)),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        dict(text_config=COMMON | EXPERTS | QWEN_ROPE, vision_config=QWEN_VISION, tie_word_embeddings=False),
    ),
    "kimi_k25": (
        "Kimi_K25",
        dict(
            text_config=MLA | dict(model_type="deepseek_v3"), vision_config=KIMI_VISION, projection_hidden_size=32,
            tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def count_parameters() -> Callable[[str, dict[str, Any]], tuple[int, dict[str, Any]]]:
    """(transformers' own count, of which a vision tower's, its config.json) of a model that is never given memory; with a
    router's corrections."""
    import transformers

    def count(family: str, values: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
        config = getattr(transformers, f"{family}Config")(**values)
        kind = "ForConditionalGeneration" if "vision_config" in values else "ForCausalLM"
        with torch.device("meta"):
            model = getattr(transformers, family + kind)(config)
        corrections = [b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
        tower = [
            p.numel() for name, p in model.named_parameters() if re.search(r"visual\.|vision_tower\.|mm_projector\.", name)
        ]
        return model.num_parameters() + sum(corrections), sum(tower), json.loads(config.to_json_string(use_diff=False))

    return count


@cases("name", [*CONFIGS, "Qwen3-VL-8B", "Qwen3-VL-235B-A22B"])
def test_parameters_are_those_of_transformers(name: str, count_parameters: Any) -> None:
    """The tower's on any number of ranks, too: what is split, times the ranks, and what is whole on each."""
    if (published := KNOWN.get(name)) is not None:
        family = "Qwen3VLMoe" if "moe" in published["model_type"] else "Qwen3VL"
        parameters, tower, _ = count_parameters(family, {key: published[key] for key in ("text_config", "vision_config")})
        config = published
    else:
        parameters, tower, config = count_parameters(*CONFIGS[name])
        assert config["model_type"] == name.split(",")[0]
    subject = subject_of(config)
    assert subject.base.total("values") == parameters
    for tp in (1, 2, 4, 8) if published else (1, 2, 4) if tower else ():
        parts = [o for o in subject.walk(Variant("fp8", False, "auto"), tp).operands if o.component == "vision"]
        split = sum(o.values * (1 if o.whole == o.shape else tp) for o in parts)
        assert tower <= split <= (1.02 if published else 1.4) * tower, (
            tp
        )  # the first rank's part, the largest where rows are split unevenly


def test_the_page_s_no_is_a_yes() -> None:
    """Qwen3-VL-235B-A22B in FP8 on eight MI300X: the tower splits and is FP8, and memory has room for what images need."""
    words = ["Qwen3-VL-235B-A22B", "--accelerator", "mi300x", "--num-accelerators", "8", "-q", "fp8", "--kv-cache-dtype", "fp8"]
    found, text = answer(*words), answer(*words, "--language-model-only")
    assert found["verdict"].startswith("It fits: FP8 + FP8 KV on 8 x AMD Instinct MI300X holds ")
    assert found["refused"] == []
    (tower,) = [g for g in found["groups"] if (g["component"], g["format"]) == ("vision", "fp8")]
    assert tower["remarks"] == []  # 4304 rows over 8 ranks: five have 544, three 528, and none is padded
    # 4 GiB of features, of 4 x 4,096 BF16 values a token; a tower's step of 16,384 tokens takes some bytes more
    asked, without = (plan["variants"][plan["asked"]] for plan in (found, text))
    kept = 4 * 2**30
    assert kept < asked["fit"]["images"] < 2.5 * kept
    assert without["fit"]["images"] == 0
    assert asked["fit"]["weights"] - without["fit"]["weights"] == asked["rank_weights"]["8"] - without["rank_weights"]["8"] > 0
    assert without["fit"]["room"] - asked["fit"]["room"] == pytest.approx(
        asked["fit"]["images"] + asked["fit"]["weights"] - without["fit"]["weights"], abs=2
    )
    fewer = answer(*words, "--mm-processor-cache-gb", "0")["variants"][found["asked"]]["fit"]["images"]
    assert asked["fit"]["images"] - fewer == kept - 16_384 * 4 * 4096 * 2  # one image of any size always has room
    assert "vision" not in text["parameters_by_component"]
    assert any("--language-model-only" in note for note in text["notes"])


def test_the_known_names_are_known_by_their_aliases() -> None:
    for alias, name in {
        "meta-llama/Llama-3.1-405B-Instruct": "Llama-3.1-405B",
        "meta-llama/Meta-Llama-3.1-8B": "Llama-3.1-8B",
        "qwen/qwen3-vl-235b-a22b-instruct": "Qwen3-VL-235B-A22B",
        "deepseek-ai/DeepSeek-V3.2-Exp": "DeepSeek-V3.2",
        "moonshotai/Kimi-K2.5": "Kimi-K2.5",
        "moonshotai/Kimi-K2-Thinking": "Kimi-K2-Thinking",
    }.items():
        found = known_config(alias)
        assert found is not None
        assert found[0] == name
    assert known_config("Qwen3-30B-A3B-Instruct-2507") is None  # another context length
    assert all(known_config(name) == (name, config) for name, config in KNOWN.items())


@cases("kv", ["auto", "bfloat16", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head"])
@cases("dtype", [torch.bfloat16, torch.float32])
@cases("family", ["qwen3", "qwen3_moe"])
def test_bytes_of_a_token_are_the_caches(kv: str, dtype: torch.dtype, family: str) -> None:
    heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=64, hidden_size=512)
    subject = subject_of(COMMON | EXPERTS | heads | {"model_type": family})
    variant = Variant("bf16", False, kv, dtype.itemsize)
    for tp in (1, 2, 4, 8):
        spec = spec_for(kv, max(1, 4 // tp), 64, dtype, torch.float8_e4m3fn)
        assert subject.token_bytes(variant, tp) == (3 * spec.bytes_per_token, 0)
    assert subject.token_bytes(Variant("bf16", False, "auto"), 1) == (3 * 2 * 4 * 64 * 2, 0)


# name, --dtype's bytes, --kv-cache-dtype -> bytes of a latent with its rope part, and of an index key, on every rank.
MLA_BYTES = [
    ("DeepSeek-V3", 2, "auto", 1152, 0), ("DeepSeek-V3", 2, "fp8_e4m3", 656, 0), ("DeepSeek-V3", 4, "auto", 2304, 0),
    ("DeepSeek-V3.2", 2, "auto", 656, 132), ("DeepSeek-V3.2", 2, "bfloat16", 1152, 132),
    ("DeepSeek-V3.2", 2, "fp8_ds_mla", 656, 132), ("DeepSeek-V3.2", 4, "auto", 2304, 512),
    ("DeepSeek-V3.2", 4, "fp8_e4m3", 656, 132), ("Kimi-K2", 2, "auto", 1152, 0), ("Kimi-K2.5", 2, "fp8_e4m3", 656, 0),
]  # fmt: skip


def test_bytes_of_a_token_of_mla() -> None:
    for name, itemsize, kv, latent, index in MLA_BYTES:
        subject = subject_of(known_config(name)[1])  # type: ignore[index]
        variant = Variant("bf16", True, kv, itemsize)
        assert {subject.token_bytes(variant, tp) for tp in (1, 8)} == {(61 * latent, 61 * index)}, (name, itemsize, kv)
        stored = {656: "fp8_ds_mla", 1152: "bfloat16", 2304: "float32"}[latent]
        assert subject.cache_format(variant) == stored


def test_a_rank_holds_its_part_and_what_is_whole_everywhere() -> None:
    rank = answer("Llama-3.1-405B", "--accelerator", "mi300x")["variants"]["BF16"]["rank_weights"]
    whole = 2 * 253 * 16384  # norms
    ends, part = (2 * 2 * rows * 16384 for rows in (128256, 126 * 128))  # embeddings and lm_head, split by tiles of rows
    assert rank["8"] == (rank["1"] - ends - whole) // 8 + part + whole
    shared = answer("Qwen3-30B-A3B", "--accelerator", "mi300x")["variants"]["BF16"]["rank_weights"]
    assert shared["8"] > (shared["4"] - 0) / 2  # 4 KV heads: at 8 ranks two share one
