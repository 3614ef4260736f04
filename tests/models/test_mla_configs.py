"""config.json of models with MLA, as hubs and as transformers write it: what is built of it and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import LoadModel, relative_error, tokens
from models.test_kimi import INT4
from models.test_logits import deepseek_v3, randomize
from tools.test_plan_sizes import subject_of
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GlmMoeDsaConfig,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
)

from octavo.distributed import TensorParallel
from octavo.engine.kv_setup import cache_specs
from octavo.errors import OctavoError
from octavo.kvcache import Layout
from octavo.layers.indexer import Indexer
from octavo.models import architecture, build_model
from octavo.models.published import KNOWN
from octavo.platform import Platform
from octavo.quant.checks import check_format

# What the published files hold besides what no engine reads.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
}  # fmt: skip
V32 = V3 | {
    "model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    "quantization_config": V3["quantization_config"] | {"scale_fmt": "ue8m0"},
}  # fmt: skip
K2 = V3 | {
    "model_type": "kimi_k2", "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "max_position_embeddings": 131072,
    "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "seq_aux": True, "topk_group": 1,
    "vocab_size": 163840,
    "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
}  # fmt: skip
THINKING = K2 | {
    "max_position_embeddings": 262144, "rms_norm_eps": 1e-05, "rope_scaling": K2["rope_scaling"] | {"factor": 64.0},
    "quantization_config": INT4,
}  # fmt: skip
# transformers' names for the fields of K25's vision_config
TOWER = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14, pos_emb_height=64,
    pos_emb_width=64, pos_emb_time=4, merge_kernel_size=[2, 2],
)  # fmt: skip
K25: dict[str, Any] = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "media_placeholder_token_id": 163605,
    "text_config": THINKING | {"rope_scaling": THINKING["rope_scaling"] | {"beta_fast": 32.0}},
    "tie_word_embeddings": False, "use_unified_vision_chunk": True,
    "vision_config": {
        "init_pos_emb_height": 64, "init_pos_emb_time": 4, "init_pos_emb_width": 64, "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool", "mm_hidden_size": 1152, "mm_projector_type": "patchmerger", "patch_size": 14,
        "pos_emb_type": "divided_fixed", "text_hidden_size": 7168, "vt_hidden_size": 1152, "vt_intermediate_size": 4304,
        "vt_num_attention_heads": 16, "vt_num_hidden_layers": 27,
    },
}  # fmt: skip
GLM5 = V3 | {
    "model_type": "glm_moe_dsa", "hidden_size": 6144, "intermediate_size": 12288, "num_hidden_layers": 78, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256,
    "n_group": 1, "topk_group": 1, "max_position_embeddings": 1048576, "rms_norm_eps": 1e-5, "vocab_size": 154880,
    "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048, "indexer_rope_interleave": True, "rope_interleave": True,
    "index_topk_pattern": None, "index_topk_freq": 4, "index_skip_topk_offset": 3, "rope_theta": None, "rope_scaling": None,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
}  # fmt: skip
# Of each its positions, the softmax's magnitude, its indexers, and the bytes of a token in BF16 with each --kv-cache-dtype.
PUBLISHED = {
    "DeepSeek-V3": (V3, 163840, 0.1 * math.log(40) + 1, 0, {"auto": 61 * 1152, "fp8_e4m3": 61 * 656}),
    "DeepSeek-V3.2": (V32, 163840, 0.1 * math.log(40) + 1, 61, {"auto": 61 * 788, "bfloat16": 61 * (1152 + 132)}),
    "Kimi-K2": (K2, 131072, 0.1 * math.log(32) + 1, 0, {"auto": 61 * 1152, "fp8_e4m3": 61 * 656}),
    "Kimi-K2-Thinking": (THINKING, 262144, 0.1 * math.log(64) + 1, 0, {"auto": 61 * 1152, "fp8_e4m3": 61 * 656}),
    "Kimi-K2.5": (K25, 262144, 0.1 * math.log(64) + 1, 0, {"auto": 61 * 1152, "fp8_e4m3": 61 * 656}),
    "GLM-5.2": (GLM5, 1048576, 1.0, 21, {"auto": 78 * 656 + 21 * 132}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_build_their_models(name: str) -> None:
    config, positions, magnitude, indexers, bytes_per_token = PUBLISHED[name]
    check_format(config)
    model: Any = build_model(config, TensorParallel(), None)
    config, c = config.get("text_config", config), model.config
    assert model.max_len == positions
    assert c.softmax_scale == pytest.approx((c.qk_nope_head_dim + 64) ** -0.5 * magnitude**2)
    found = [module for module in model.modules() if isinstance(module, Indexer)]
    assert len(found) == indexers
    assert {one.interleaved for one in found} <= {name == "GLM-5.2"}
    assert [c.is_dense(i) for i in range(5)] == [i < config["first_k_dense_replace"] for i in range(5)]
    for kv, expected in bytes_per_token.items():
        specs = model.kv_specs(kv, torch.bfloat16, torch.float8_e4m3fn, Layout.PLAIN)
        assert sum(spec.bytes_per_token for spec in specs) == expected
    assert (f"model.layers.{c.num_hidden_layers}.*" in model.ignored) == bool(config["num_nextn_predict_layers"])


def test_layers_whose_latents_are_not_fp8() -> None:
    """By number, indexers aside; not where attention is sparse, which reads FP8 latents alone."""
    on = Platform(torch.device("cpu"), "test")
    dense = build_model(K2, TensorParallel(), 64)
    specs = cache_specs(dense, "fp8_e4m3", torch.bfloat16, on, ["2", "60"])
    assert [layer for layer, spec in enumerate(specs) if spec.name == "bfloat16"] == [2, 60]
    assert {spec.name for spec in specs} == {"bfloat16", "fp8_ds_mla"}
    with pytest.raises(OctavoError, match=r"names layer 61; the model's are 0 to 60\."):
        cache_specs(dense, "fp8_e4m3", torch.bfloat16, on, ["61"])
    sparse = build_model(GLM5, TensorParallel(), 64)
    with pytest.raises(OctavoError, match="cannot keep layers in bfloat16: this model's sparse attention reads a cache in FP8"):
        cache_specs(sparse, "fp8_e4m3", torch.bfloat16, on, ["3"])


def test_kimi_k25_has_the_parameters_of_transformers_classes() -> None:
    """Of the published config.json, which the built-in one is as far as it matters, and Kimi-K2-Thinking's too."""
    text = {name: value for name, value in K25["text_config"].items() if name not in ("quantization_config", "model_type")}
    with torch.device("meta"):
        theirs = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(text))
        one_layer = {name: text[name] for name in ("hidden_size", "num_attention_heads")} | dict(num_hidden_layers=1)
        with_tower = Kimi_K25ForConditionalGeneration(
            Kimi_K25Config(
                text_config=one_layer | dict(model_type="deepseek_v3"), vision_config=TOWER, projection_hidden_size=1152
            )
        ).model
    tower = sum(p.numel() for part in (with_tower.vision_tower, with_tower.mm_projector) for p in part.parameters())
    corrections = [b.numel() for name, b in theirs.named_buffers() if name.endswith("e_score_correction_bias")]
    assert (theirs.num_parameters(), sum(corrections)) == (1_026_408_209_408, 60 * 384)
    for config, name in ((K25, "Kimi-K2.5"), (THINKING, "Kimi-K2-Thinking")):
        walked, known = subject_of(config), subject_of(KNOWN[name])
        found = walked.base.parameters()
        assert found.pop("vision", 0) == (tower if config is K25 else 0)
        assert sum(found.values()) == theirs.num_parameters() + sum(corrections)
        assert walked.base.operands == known.base.operands
        assert walked.model(1).config == known.model(1).config
        experts = [o for o in walked.base.operands if o.component == "experts"]
        assert sum(o.stored for o in experts) == sum(o.values for o in experts) * 9 // 16
        assert {o.form for o in walked.base.operands if o.component != "experts"} == {"bf16", "float32"}


def test_kimis_spelling_has_deepseeks_logits(tmp_path: Path, load_model: LoadModel) -> None:
    """transformers has no class of Kimi-K2's name; the hub's has `rope_scaling`, a type of yarn and both betas at 1."""
    torch.manual_seed(0)
    rope = K2["rope_scaling"] | dict(original_max_position_embeddings=64)
    new = {k: v for k, v in rope.items() if k != "type"} | dict(rope_type="yarn", rope_theta=50000.0)
    reference = randomize(deepseek_v3(n_group=1, topk_group=1, routed_scaling_factor=2.827, rope_parameters=new))
    reference.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    del found["rope_parameters"], found["num_nextn_predict_layers"]
    own = {name: K2[name] for name in ("model_type", "scoring_func", "topk_method", "moe_layer_freq", "rope_theta", "seq_aux")}
    (tmp_path / "config.json").write_text(json.dumps(found | own | dict(rope_scaling=rope)))
    ids = tokens(70)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    assert relative_error(load_model(tmp_path).logits(ids), expected) < 1e-4


@pytest.mark.parametrize("said", [{}, {"factor": None}])
def test_a_stretch_that_only_positions_say_is_in_the_softmax_too(
    said: dict[str, Any], tmp_path: Path, load_model: LoadModel
) -> None:
    """Without a factor the positions are so many times the original ones: transformers' logits are those of that factor."""
    torch.manual_seed(0)
    yarn = dict(rope_type="yarn", rope_theta=10000.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=64)
    reference = randomize(deepseek_v3(max_position_embeddings=256, rope_parameters=yarn | dict(factor=4.0)))
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | dict(rope_parameters=yarn | said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = tokens(70)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    assert relative_error(load_model(tmp_path).logits(ids), expected) < 1e-4


def test_layers_share_indexers_as_transformers_has_it() -> None:
    """However config.json says it."""
    said: list[dict[str, Any]] = [
        dict(index_topk_pattern=[["full", "shared"][i % 3 > 0] for i in range(78)]),
        dict(index_topk_pattern="F" * 40 + "S" * 38, index_topk_freq=3),
        dict(indexer_types=["full", "shared"] * 39, index_topk_pattern="F" * 78),
        *(dict(index_topk_freq=freq, index_skip_topk_offset=offset) for freq in (0, 1, 2, 4) for offset in (0, 1, 3, 7)),
        *(dict(index_topk_freq=freq) for freq in (1, 5)),
    ]
    plain = {name: value for name, value in GLM5.items() if not name.startswith(("index_topk_", "index_skip"))}
    for case in said:
        theirs = GlmMoeDsaConfig(num_hidden_layers=78, **case).indexer_types
        if theirs[0] == "full":
            assert architecture(GLM5).Config.from_json(plain | case).kinds_of_indexers == theirs, case
        else:
            with pytest.raises(OctavoError, match="no layer before it has an indexer to share"):
                architecture(GLM5).Config.from_json(plain | case)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk_method is 'greedy'; this architecture is served with 'noaux_tc'": (V3, dict(topk_method="greedy")),
    "scoring_func is 'softmax'; this architecture is served with 'sigmoid'": (V32, dict(scoring_func="softmax")),
    "moe_layer_freq is 2; this architecture is served with 1": (K2, dict(moe_layer_freq=2)),
    "does not serve model_type 'deepseek_v2' yet; did you mean 'deepseek_v3": (V3, dict(model_type="deepseek_v2")),
    "kv_lora_rank must be a multiple of 4, not 510": (V3, dict(kv_lora_rank=510)),
    "json: qk_rope_head_dim must be even, since pairs of dimensions are rotated, not 63": (GLM5, dict(qk_rope_head_dim=63)),
    "has no q_lora_rank, which this architecture needs": (V32, dict(q_lora_rank=None)),
    "index_head_dim must be a power of two of at least qk_rope_head_dim 64": (V32, dict(index_head_dim=96)),
    "has no index_topk, which this architecture needs": (V32, dict(index_topk=None)),
    "a token cannot be sent to 8 of 256 experts of 1 of 64 groups": (V3, dict(n_group=64, topk_group=1)),
    "asks for rope_type 'longrope'": (V3, dict(rope_scaling=dict(type="longrope"))),
    "indexer_types must list 'full' or 'shared' for each of the 78 layers": (GLM5, dict(index_topk_pattern="F" * 77 + "X")),
    "indexer_types must list 'full' or 'shared'": (GLM5, dict(indexer_types="full")),
    "mlp_layer_types must list 'dense' or 'sparse' for each of the 78 layers": (GLM5, dict(mlp_layer_types=["dense"])),
    "indexer_types begins with 'shared'": (GLM5, dict(index_topk_pattern="S" * 78)),
}  # fmt: skip


@cases("said", REFUSED)
def test_what_is_not_served_is_refused_in_a_sentence(said: str) -> None:
    config, change = REFUSED[said]
    with pytest.raises(OctavoError) as raised:
        build_model(config | change, TensorParallel(), None)
    assert said in str(raised.value)
    assert str(raised.value).endswith(".")
    assert "\n" not in str(raised.value)
