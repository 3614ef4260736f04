"""Built-in config.json contents of published models, so that they can be planned and benched by name alone."""

from __future__ import annotations

import difflib
import re
from typing import Any

from octavo.errors import OctavoError

__all__ = ["KNOWN", "known_config", "unknown_model"]

Config = dict[str, Any]
FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KIMI_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
}


def _dense(model_type: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, length: int) -> Config:
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128, "vocab_size": vocab,
        "max_position_embeddings": length, "hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }  # fmt: skip


def _llama(hidden: int, inner: int, layers: int, heads: int, factor: float = 8.0, **more: Any) -> Config:
    rope = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = _dense("llama", hidden, inner, layers, heads, 8, 128256, 131072)
    return config | {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": rope, "eos_token_id": 128001} | more


def _qwen(model_type: str, hidden: int, inner: int, layers: int, heads: int, kv: int, length: int, moe: int = 0) -> Config:
    config = _dense(model_type, hidden, inner, layers, heads, kv, 151936, length) | {"eos_token_id": 151645}
    experts = {
        "moe_intermediate_size": moe, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }  # fmt: skip
    return config | experts if moe else config


def _qwen_vl(text: Config) -> Config:
    vision = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "num_position_embeddings": 2304,
        "out_hidden_size": text["hidden_size"], "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    return {"model_type": text["model_type"], "text_config": text | {"rope_theta": 5e6}, "vision_config": vision}


def _mla(
    model_type: str, heads: int, experts: int, dense_layers: int, vocab: int, stretched: float, beta_fast: int = 32, **more: Any
) -> Config:
    yarn = {
        "type": "yarn", "factor": stretched, "original_max_position_embeddings": 4096, "beta_fast": beta_fast, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    return {
        "model_type": model_type, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": heads, "num_key_value_heads": heads, "n_routed_experts": experts,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": dense_layers, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": vocab,
        "max_position_embeddings": int(4096 * stretched), "rope_scaling": yarn, "num_nextn_predict_layers": 0,
        "norm_topk_prob": True,
    } | more  # fmt: skip


_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
_GLM = {
    "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 3, "use_qk_norm": True,
    "attention_bias": True, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-5,
}  # fmt: skip
_MINIMAX = {
    "num_local_experts": 256, "num_experts_per_tok": 8, "rotary_dim": 64, "use_qk_norm": True, "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid", "use_routing_bias": True, "rope_theta": 5e6, "num_mtp_modules": 3,
    "quantization_config": FP8_BLOCKS,
}  # fmt: skip
_GROUPS: Config = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}
_DEEPSEEK = _mla("deepseek_v3", 128, 256, 3, 129280, 40.0, **_GROUPS, quantization_config=FP8_BLOCKS)
_KIMI: Config = {"rope_theta": 5e4, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}
_NATIVE_INT4: Config = {"rms_norm_eps": 1e-5, "quantization_config": KIMI_INT4}
_INDEXER = {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
_GLM_DSA: Config = {  # transformers' defaults
    "hidden_size": 6144, "intermediate_size": 12288, "num_hidden_layers": 78, "q_lora_rank": 2048, "qk_nope_head_dim": 192,
    "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "max_position_embeddings": 202752,
    "rope_scaling": None, "rope_theta": 1e6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
_KIMI_VISION = {
    "vt_hidden_size": 1152, "vt_intermediate_size": 4304, "vt_num_hidden_layers": 27, "vt_num_attention_heads": 16,
    "patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64, "merge_kernel_size": [2, 2],
}  # fmt: skip

KNOWN: dict[str, Config] = {
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64),
    "Llama-3.3-70B": _llama(8192, 28672, 80, 64),
    "Llama-3.1-405B": _llama(16384, 53248, 126, 128),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 32.0, head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 32.0, tie_word_embeddings=True),
    "Mistral-7B-v0.3": _dense("mistral", 4096, 14336, 32, 32, 8, 32768, 32768) | {"rms_norm_eps": 1e-5},
    "Mixtral-8x7B-v0.1": _dense("mixtral", 4096, 14336, 32, 32, 8, 32000, 32768) | _MIXTRAL,
    "Qwen2.5-7B": _dense("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768),  # the length of -Instruct; the base model's is longer
    "Qwen3-0.6B": _qwen("qwen3", 1024, 3072, 28, 16, 8, 40960) | {"tie_word_embeddings": True},
    "Qwen3-8B": _qwen("qwen3", 4096, 12288, 36, 32, 8, 40960),
    "Qwen3-30B-A3B": _qwen("qwen3_moe", 2048, 6144, 48, 32, 4, 40960, moe=768),
    "Qwen3-30B-A3B-FP8": _qwen("qwen3_moe", 2048, 6144, 48, 32, 4, 40960, moe=768) | {"quantization_config": FP8_BLOCKS},
    "Qwen3-VL-8B": _qwen_vl(_qwen("qwen3_vl", 4096, 12288, 36, 32, 8, 262144)),
    "Qwen3-VL-30B-A3B": _qwen_vl(_qwen("qwen3_vl_moe", 2048, 6144, 48, 32, 4, 262144, moe=768)),
    "Qwen3-VL-235B-A22B": _qwen_vl(_qwen("qwen3_vl_moe", 4096, 12288, 94, 64, 4, 262144, moe=1536)),
    "GLM-4.5": _dense("glm4_moe", 5120, 12288, 92, 96, 8, 151552, 131072) | _GLM,
    "MiniMax-M2": _dense("minimax_m2", 3072, 1536, 62, 48, 8, 200064, 196608) | _MINIMAX,
    "DeepSeek-V3": _DEEPSEEK,
    "DeepSeek-R1": _DEEPSEEK,
    "DeepSeek-V3.2": _DEEPSEEK | _INDEXER,
    "GLM-5": _mla("glm_moe_dsa", 64, 256, 3, 154880, 1.0, **_GLM_DSA),
    "Kimi-K2": _mla("kimi_k2", 64, 384, 1, 163840, 32.0, 1, **_KIMI, quantization_config=FP8_BLOCKS),
    "Kimi-K2-Thinking": _mla("kimi_k2", 64, 384, 1, 163840, 64.0, 1, **_KIMI, **_NATIVE_INT4),
    "Kimi-K2.5": {
        "model_type": "kimi_k25",
        "text_config": _mla("kimi_k2", 64, 384, 1, 163840, 64.0, **_KIMI, **_NATIVE_INT4),
        "vision_config": _KIMI_VISION,
    },
}


def known_config(name: str) -> tuple[str, Config] | None:
    """The known model named `name`, with its config. Case, owner and -Instruct are ignored."""
    wanted = _plain(name)
    return next(((known, config) for known, config in KNOWN.items() if _plain(known) == wanted), None)


def unknown_model(name: str) -> OctavoError:
    """The error for a name that is neither a known model nor a path."""
    near = difflib.get_close_matches(_plain(name), {_plain(known): known for known in KNOWN}, n=1)
    hint = next((f"; did you mean '{known}'?" for known in KNOWN if near and _plain(known) == near[0]), ".")
    return OctavoError(
        f"'{name}' is no directory, no config.json and no model that is known by name{hint} Known names: {', '.join(KNOWN)}."
    )


def _plain(name: str) -> str:
    """meta-llama/Meta-Llama-3.1-405B-Instruct -> llama-3.1-405b"""
    last = name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    return re.sub(r"-(instruct|chat|exp)(?=$|-v[\d.]+$)", "", last)
