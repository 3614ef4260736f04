"""Logits of every architecture against transformers, on tiny random checkpoints that transformers wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import cases
from conftest import COMMON, LoadModel, relative_error, tokens
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from octavo import LLM, SamplingParams
from octavo.errors import OctavoError

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)


def llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**(COMMON | changes)))


def qwen3_moe(**changes: object) -> PreTrainedModel:
    experts = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=40, norm_topk_prob=True, head_dim=16)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(COMMON | experts | changes)))


def mixtral(**changes: object) -> PreTrainedModel:
    experts = dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=72, sliding_window=None)
    return MixtralForCausalLM(MixtralConfig(**(COMMON | experts | changes)))


def glm4_moe(**changes: object) -> PreTrainedModel:
    experts = dict(
        n_routed_experts=9, num_experts_per_tok=3, moe_intermediate_size=40, n_shared_experts=1, first_k_dense_replace=1,
        routed_scaling_factor=2.5, head_dim=16, attention_bias=True, use_qk_norm=True,
    )  # fmt: skip
    return Glm4MoeForCausalLM(Glm4MoeConfig(**(COMMON | experts | changes)))


def minimax_m2(**changes: object) -> PreTrainedModel:
    experts = dict(num_local_experts=7, num_experts_per_tok=3, intermediate_size=40, head_dim=24, rotary_dim=16)
    return MiniMaxM2ForCausalLM(MiniMaxM2Config(**(COMMON | experts | changes)))


MLA = COMMON | dict(
    num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=40, n_group=4,
    topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, first_k_dense_replace=1, q_lora_rank=48, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
)  # fmt: skip
MLA_YARN = dict(YARN, factor=40.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=64)


def deepseek_v3(**changes: object) -> PreTrainedModel:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(MLA | dict(rope_parameters=MLA_YARN) | changes)))


def deepseek_v32(**changes: object) -> PreTrainedModel:
    """At least 16 index heads: with few, many scores are exactly zero, and what is first of them decides."""
    index = dict(index_n_heads=16, index_head_dim=16, index_topk=6, rope_parameters=MLA_YARN)
    return DeepseekV32ForCausalLM(DeepseekV32Config(**(MLA | index | changes)))


def glm_moe_dsa(**changes: object) -> PreTrainedModel:
    """The last of the three layers attends to what the second's indexer has chosen."""
    index = dict(index_n_heads=16, index_head_dim=16, index_topk=6, indexer_types=["full", "full", "shared"])
    return GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**(MLA | index | changes)))


CASES = {
    "llama": lambda: llama(),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, head_dim apart from hidden": lambda: llama(head_dim=24),
    "llama, every head its own keys": lambda: llama(num_key_value_heads=4),
    "llama, rope llama3": lambda: llama(rope_parameters=LLAMA3),
    "llama, rope linear": lambda: llama(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "llama, rope yarn": lambda: llama(rope_parameters=YARN),
    "llama, rope yarn with attention factor": lambda: llama(rope_parameters=YARN | dict(attention_factor=0.8, beta_fast=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None, head_dim=16)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
    "qwen2, sliding window from layer 1": lambda: Qwen2ForCausalLM(
        Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=32)),
    "qwen3_moe": lambda: qwen3_moe(),
    "qwen3_moe, weights as they are": lambda: qwen3_moe(norm_topk_prob=False),
    "qwen3_moe, some layers dense": lambda: qwen3_moe(mlp_only_layers=[0]),
    "qwen3_moe, every second layer": lambda: qwen3_moe(decoder_sparse_step=2),
    "mixtral": lambda: mixtral(),
    "mixtral, sliding window, one expert": lambda: mixtral(sliding_window=7, num_local_experts=1, num_experts_per_tok=1),
    "glm4_moe": lambda: glm4_moe(),
    "glm4_moe, groups, two shared experts, no dense layer": lambda: glm4_moe(
        n_group=3, topk_group=2, n_shared_experts=2, first_k_dense_replace=0, norm_topk_prob=False
    ),
    "glm4_moe, plain attention": lambda: glm4_moe(attention_bias=False, use_qk_norm=False, first_k_dense_replace=2),
    "glm4_moe, all of a head rotated": lambda: glm4_moe(partial_rotary_factor=1.0),
    "glm4_moe, rope yarn": lambda: glm4_moe(rope_parameters=YARN | dict(partial_rotary_factor=0.5)),
    "minimax_m2": lambda: minimax_m2(),
    "minimax_m2, one key head": lambda: minimax_m2(num_key_value_heads=1),
    "deepseek_v3": lambda: deepseek_v3(),
    "deepseek_v3, no latent of queries": lambda: deepseek_v3(q_lora_rank=None, attention_bias=True),
    "deepseek_v3, half-split rotation, one group": lambda: deepseek_v3(
        rope_interleave=False, n_group=1, topk_group=1, n_shared_experts=2, rope_parameters=dict(rope_type="default")
    ),
    "deepseek_v32": lambda: deepseek_v32(),
    "deepseek_v32, all chosen": lambda: deepseek_v32(index_topk=512, attention_bias=True),
    "deepseek_v3, odd latents, magnitudes that differ": lambda: deepseek_v3(
        kv_lora_rank=36, q_lora_rank=45, n_shared_experts=2, rope_parameters=MLA_YARN | dict(mscale=0.707)
    ),
    "glm_moe_dsa": lambda: glm_moe_dsa(),
    "glm_moe_dsa, all chosen": lambda: glm_moe_dsa(index_topk=512),
    "glm_moe_dsa, one indexer, experts first": lambda: glm_moe_dsa(
        indexer_types=["full", "shared", "shared"], mlp_layer_types=["sparse", "dense", "sparse"], rope_parameters=MLA_YARN
    ),
    "qwen3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True)),
}


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Norms and biases start as ones and zeros, which would hide a mistake in them."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (1.0 if "norm" in name else 0.0))
            else:
                p.mul_(4)  # the default 0.02 makes attention nearly uniform, and a wrong mask hard to see
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of scores between 0 and 1
                buffer.copy_(torch.randn(buffer.shape, generator=g) * 0.3)
    return model.eval()


@cases("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path, load_model: LoadModel) -> None:
    torch.manual_seed(0)
    reference = randomize(CASES[case]())
    reference.save_pretrained(tmp_path)
    ids = tokens(70)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    loaded = load_model(tmp_path)
    assert relative_error(loaded.logits(ids), expected) < 1e-4
    # The same positions in uneven parts, single tokens among them, over the cache.
    assert relative_error(loaded.logits(ids, (1, 30, 1, 1, 37)), expected) < 1e-4


def test_a_wrong_rope_would_be_seen(tmp_path: Path, load_model: LoadModel) -> None:
    """The bound above is far under what dropping the context extension does."""
    torch.manual_seed(0)
    reference = randomize(llama(rope_parameters=LLAMA3))
    reference.save_pretrained(tmp_path)
    ids = tokens(70)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"llama3"', '"default"'))
    assert relative_error(load_model(tmp_path).logits(ids), expected) > 1e-2


LENGTHS = {
    "linear": (dict(rope_type="linear", rope_theta=10000.0, factor=4.0), 256),
    "linear, of an original length": (
        dict(rope_type="linear", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=50), 200,
    ),
    "yarn": (dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64), 256),
    "yarn, written out": (dict(rope_type="yarn", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=32), 64),
    "llama3": (LLAMA3 | dict(original_max_position_embeddings=8), 64),
    "dynamic": (dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0), 64),
    "default": (dict(rope_type="default", rope_theta=10000.0), 64),
}  # fmt: skip


@cases("kind", LENGTHS)
def test_the_longest_context_and_what_is_beyond_the_positions(kind: str, tmp_path: Path) -> None:
    """Of 64 positions; prompts as long as the context is have transformers' log-probabilities."""
    rope, longest = LENGTHS[kind]
    torch.manual_seed(0)
    reference = randomize(llama(max_position_embeddings=64, rope_parameters=rope))
    reference.save_pretrained(tmp_path)
    how = dict(dtype="float32", threads=1, cpu_kv_cache_gib=0.05)
    llm = LLM(tmp_path, **how)
    assert llm.info.max_model_len == longest
    assert LLM(tmp_path, max_model_len=longest, **how).info.max_model_len == longest
    with pytest.raises(OctavoError, match=f"{longest + 1} is over the {longest} positions"):
        LLM(tmp_path, max_model_len=longest + 1, **how)
    ids = tokens(longest - 1)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    entries = llm.generate([ids], params, use_tqdm=False)[0].prompt_logprobs
    found = torch.tensor([entry[token].logprob for entry, token in zip(entries[1:], ids[1:], strict=True)])
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert relative_error(found, expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]) < 1e-4
