"""Plans of mixtures of experts, at their published sizes: parameters, bytes, and what a step reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import LoadModel
from models.test_moe_quantized import FAMILIES, tiny
from safetensors.torch import load_file, save_file
from tools.planner import plan_of
from tools.test_plan_sizes import subject_of
from torch import Tensor

from octavo.errors import OctavoError
from octavo.models.published import known_config
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, QuantRules
from octavo.tools.plan import walk
from octavo.tools.plan.explain import groups, refusals
from octavo.tools.plan.plan import show
from octavo.tools.plan.roofline import Costs
from octavo.tools.plan.subject import Variant
from octavo.tools.quantize.quantize import quantize_checkpoint

QWEN3_30B: dict[str, Any] = dict(
    model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, max_position_embeddings=40960, attention_bias=False,
    decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
    num_experts_per_tok=8, rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, sliding_window=None, use_sliding_window=False,
    max_window_layers=48, hidden_act="silu", tie_word_embeddings=False,
)  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = dict(
    model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, num_local_experts=8, num_experts_per_tok=2,
    rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, hidden_act="silu", tie_word_embeddings=False,
    router_aux_loss_coef=0.02,
)  # fmt: skip
GLM_4_5: dict[str, Any] = dict(
    model_type="glm4_moe", vocab_size=151552, hidden_size=5120, intermediate_size=12288, num_hidden_layers=92,
    num_attention_heads=96, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, attention_bias=True,
    use_qk_norm=True, partial_rotary_factor=0.5, moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=1,
    num_experts_per_tok=8, n_group=1, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True, first_k_dense_replace=3,
    num_nextn_predict_layers=1, rms_norm_eps=1e-5, rope_theta=1000000, rope_scaling=None, hidden_act="silu",
    tie_word_embeddings=False,
)  # fmt: skip
MINIMAX_M2: dict[str, Any] = dict(
    model_type="minimax_m2", vocab_size=200064, hidden_size=3072, intermediate_size=1536, num_hidden_layers=62,
    num_attention_heads=48, num_key_value_heads=8, head_dim=128, max_position_embeddings=196608, num_local_experts=256,
    num_experts_per_tok=8, rotary_dim=64, use_qk_norm=True, qk_norm_type="per_layer", scoring_func="sigmoid",
    use_routing_bias=True, shared_intermediate_size=0, attn_type_list=[1] * 62, num_mtp_modules=3, rms_norm_eps=1e-6,
    rope_theta=5000000, hidden_act="silu", tie_word_embeddings=False,
)  # fmt: skip

DEEPSEEK_V3: dict[str, Any] = dict(
    model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256, n_shared_experts=1,
    num_experts_per_tok=8, first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True,
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, attention_bias=False,
    max_position_embeddings=163840, num_nextn_predict_layers=1, rms_norm_eps=1e-6, rope_theta=10000, hidden_act="silu",
    rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0,
                      mscale_all_dim=1.0), tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK_V32 = DEEPSEEK_V3 | dict(model_type="deepseek_v32", index_n_heads=64, index_head_dim=128, index_topk=2048)

# config, transformers' family, its exact count, the routers' corrections (buffers there), 1e9 that multiply a token
PUBLISHED = {
    "Qwen3-30B-A3B": (QWEN3_30B, "Qwen3Moe", 30_532_122_624, 0, 3.04),
    "Mixtral-8x7B": (MIXTRAL_8X7B, "Mixtral", 46_702_792_704, 0, 12.75),
    "GLM-4.5": (GLM_4_5, "Glm4Moe", 352_797_814_784, 89 * 160, 32.85),
    "MiniMax-M2": (MINIMAX_M2, "MiniMaxM2", 228_689_748_992, 62 * 256, 10.42),
    "DeepSeek-V3": (DEEPSEEK_V3, "DeepseekV3", 671_026_404_352, 58 * 256, 36.62),
    "DeepSeek-V3.2": (DEEPSEEK_V32, "DeepseekV32", 671_877_929_216, 58 * 256, 37.48),
}


@cases("name", PUBLISHED)
def test_parameters_of_the_published_models(name: str) -> None:
    import transformers

    config, family, exact, corrections, active = PUBLISHED[name]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config").from_dict(config))
    walked = subject_of(config).base
    assert theirs.num_parameters() == exact
    assert walked.total("values") == exact + corrections
    assert walked.active / 1e9 == pytest.approx(active, abs=0.005)
    found = walked.parameters()
    parts = {n.rpartition(".experts.")[2]: p for n, p in theirs.named_parameters() if ".experts." in n and ".shared" not in n}
    layers = sum(n.endswith("experts.down_proj") for n, _ in theirs.named_parameters())
    assert found["experts"] == layers * sum(p.numel() for p in parts.values())
    routers = sum(p.numel() for n, p in theirs.named_parameters() if n.endswith(".gate.weight"))
    assert found["router"] == routers + corrections


@cases("name", PUBLISHED)
def test_bytes_of_the_published_models(name: str) -> None:
    """Linear layers take half of BF16's bytes and their scales; routers, embeddings and the head stay as they are."""
    config, _, exact, corrections, _ = PUBLISHED[name]
    subject = subject_of(config)
    operands = subject.walk(Variant("ptpc_fp8", False, "auto"), 1).operands
    fp8 = [o for o in operands if o.is_fp8]
    values, stored = (sum(getattr(o, what) for o in fp8) for what in ("values", "stored"))
    assert 0.5 < stored / (2 * values) < 0.51
    assert stored == values + 4 * sum(o.experts * o.shape[0] for o in fp8)
    kept = {"router", "norms", "embeddings", "lm_head"}
    kept |= {"attention"} if config.get("attention_bias") or "kv_lora_rank" in config else set()
    kept |= {"indexer"} if "index_topk" in config else set()
    assert {o.component for o in operands if not o.is_fp8} == kept
    matrices = [o for o in operands if o.component in ("attention", "indexer") and not (o.is_fp8 or o.is_vector)]
    of_mla = {"attention": "kv_b_proj", "indexer": "indexer.weights_proj"} if "kv_lora_rank" in config else {}
    assert {(name.rpartition("self_attn.")[2], o.why) for o in matrices for name in o.names} == {
        (name, walk.BY_HEAD if part == "attention" else walk.INDEX_WEIGHTS) for part, name in of_mla.items() if part in kept
    }
    assert sum(o.stored for o in operands) == stored + 2 * (exact + corrections - values) + 2 * corrections


@cases("name", PUBLISHED)
def test_a_step_reads_the_experts_that_its_tokens_reach(name: str) -> None:
    config, *_ = PUBLISHED[name]
    subject = subject_of(config)
    operands = subject.walk(Variant("ptpc_fp8", False, "auto"), 1).operands
    costs = Costs.of(operands, subject.attention, [])
    experts = sum(o.stored for o in operands if o.component == "experts")
    count = next(o.experts for o in operands if o.component == "experts")
    chosen = config["num_experts_per_tok"]
    others = costs.moved(1, 1) - experts * chosen / count
    assert others < 0.12 * experts
    for tokens in (1, 4, 64, 4096):
        reached = 1 - (1 - chosen / count) ** tokens
        assert costs.moved(tokens, 1) == pytest.approx(others + experts * reached)


@cases(
    ("name", "said"),
    [
        ("Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
        ("Mixtral-8x7B", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("GLM-4.5", "zai-org/GLM-4.5"),
        ("MiniMax-M2", "MiniMaxAI/MiniMax-M2"),
        ("DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
        ("DeepSeek-V3.2", "deepseek-ai/DeepSeek-V3.2-Exp"),
    ],
)
def test_the_published_names_are_of_these_numbers(name: str, said: str) -> None:
    known = known_config(said)
    assert known is not None
    described = known[1].get("quantization_config")
    assert bool(described) == (name in ("MiniMax-M2", "DeepSeek-V3", "DeepSeek-V3.2"))
    plain = {key: value for key, value in known[1].items() if key != "quantization_config"}
    theirs = subject_of(PUBLISHED[name][0])
    assert subject_of(plain).base.operands == theirs.base.operands
    assert subject_of(plain).longest == theirs.longest
    by_name = subject_of(known[1]).base
    assert by_name.parameters() == theirs.base.parameters()
    assert {o.form for o in by_name.operands if o.component == "experts"} == {"fp8_block" if described else "bf16"}
    assert {o.form for o in by_name.operands if o.component == "router"} <= {"bf16", "float32"}


# GB in BF16, which is the baseline: 2 bytes a parameter (4 of a router's correction); GB and percent in ptpc_fp8 and fp8_block.
SIZES = {
    "Qwen3-30B-A3B": "61.1 | 31.3 (51.2%) | 31.2 (51.1%)",
    "Mixtral-8x7B": "93.4 | 47.0 (50.3%) | 47.0 (50.3%)",
    "GLM-4.5": "705.6 | 354.9 (50.3%) | 354.5 (50.2%)",
    "MiniMax-M2": "457.4 | 230.4 (50.4%) | 230.0 (50.3%)",
    "DeepSeek-V3": "1342.1 | 674.7 (50.3%) | 674.2 (50.2%)",
    "DeepSeek-V3.2": "1343.8 | 675.6 (50.3%) | 675.1 (50.2%)",
}


@cases("name", SIZES)
def test_the_sizes_that_the_page_of_memory_gives(name: str) -> None:
    subject = subject_of(PUBLISHED[name][0])
    stored = [subject.walk(Variant(s, False, "auto"), 1).total("stored") for s in ("bf16", "ptpc_fp8", "fp8_block")]
    quantized = (f"{n / 1e9:.1f} ({100 * n / stored[0]:.1f}%)" for n in stored[1:])
    assert " | ".join([f"{stored[0] / 1e9:.1f}", *quantized]) == SIZES[name]
    counts = f"{subject.base.total('values') / 1e9:.1f} B | {subject.base.active / 1e9:.1f} B"
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    assert f"| {name} | {counts} | {SIZES[name]} |" in page


def test_a_plan_of_a_config_alone(tmp_path: Path) -> None:
    """By the model's own modules, with a rank's part of each expert."""
    (tmp_path / "config.json").write_text(json.dumps(MINIMAX_M2))
    plan = plan_of(str(tmp_path), "--accelerator", "h200", "-q", "ptpc_fp8", "-tp", "4", "--num-accelerators", "4")
    assert plan.asked.fit is not None
    assert plan.asked.fit.requests > 1
    whole, part = (plan.question.subject.walk(plan.asked.variant, tp) for tp in (1, 4))
    assert whole.problems == part.problems == []
    experts = [sum(o.values for o in walk.operands if o.component == "experts") for walk in (whole, part)]
    assert experts[0] == 4 * experts[1]


# --- checkpoints on disk ------------------------------------------------------------------


def without(*ends: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(ends)]


def dense_again(tensors: dict[str, Tensor]) -> None:
    for i in (0, 1):
        name = f"model.layers.{i}.mlp.experts.3.down_proj.weight"
        tensors[name] = torch.randn(tensors[name].shape).bfloat16()
        del tensors[f"{name}_scale"]


def moved(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.7.down_proj.weight"] = tensors.pop("model.layers.1.mlp.experts.6.down_proj.weight")


def narrow(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors[name] = tensors[name][:, :-8].contiguous()


WRONG: dict[str, tuple[bool, Callable[[dict[str, Tensor]], object], str]] = {
    "an expert is missing": (False, without(*(f".1.mlp.experts.6.{n}_proj.weight" for n in ("gate", "up", "down"))),
                             "no tensor model.layers.1.mlp.experts.6.gate_proj.weight"),
    "a matrix is missing": (False, without(".2.mlp.experts.3.up_proj.weight"), "experts.3.up_proj.weight"),
    "a router is missing": (False, without(".1.mlp.gate.weight"), "no tensor model.layers.1.mlp.gate.weight"),
    "another number": (False, moved, "experts.6.down_proj.weight"),
    "another shape": (False, narrow, "experts.5.up_proj.weight has shape [40, 56]"),
    "a scale is missing": (True, without(".1.mlp.experts.3.up_proj.weight_scale"), "experts.3.up_proj.weight is stored"),
    "one is not quantized": (True, dense_again, "model.layers.0.mlp.experts: expert 3 is stored in bf16"),
}  # fmt: skip


@cases("wrong", WRONG)
def test_what_loading_refuses_is_refused_in_its_words(wrong: str, tmp_path: Path, load_model: LoadModel) -> None:
    is_quantized, change, part = WRONG[wrong]
    tiny(tmp_path / "model", "qwen3_moe")
    model = tmp_path / "model"
    if is_quantized:
        model = tmp_path / "out"
        quantize_checkpoint(tmp_path / "model", model, QuantRules(FP8_PER_CHANNEL), say=lambda line: None)
    assert not refusals(plan_of(str(model), "--accelerator", "h200"))
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(OctavoError) as raised:
        load_model(model)
    found = refusals(plan_of(str(model), "--accelerator", "h200"))
    assert part in str(raised.value)
    assert str(raised.value) in found
    assert len(found) < 5


def test_experts_that_loading_makes_alike_are_not_refused(tmp_path: Path, load_model: LoadModel) -> None:
    """One in BF16 beside codes is quantized to the scheme of the others, where that is the one asked for."""
    tiny(tmp_path / "model", "qwen3_moe")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", QuantRules(FP8_PER_CHANNEL), say=lambda line: None)
    tensors = load_file(tmp_path / "out/model.safetensors")
    dense_again(tensors)
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    for scheme, refused in ((FP8_PER_CHANNEL, False), (FP8_BLOCK, True)):
        found = refusals(plan_of(str(tmp_path / "out"), "--accelerator", "h200", "-q", scheme.name))
        assert bool(found) == refused, found
        if refused:
            with pytest.raises(OctavoError, match="expert 3 is stored in fp8_block and those before it in ptpc_fp8"):
                load_model(tmp_path / "out", scheme)
            assert "expert 3 is stored in fp8_block and those before it in ptpc_fp8" in found[0]
        else:
            load_model(tmp_path / "out", scheme)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_what_loading_reports(
    family: str, tmp_path: Path, load_model: LoadModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what weights are for, of the model as stored by transformers and as quantized."""
    tiny(tmp_path / "model", family).bfloat16().save_pretrained(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", QuantRules(FP8_PER_CHANNEL), say=lambda line: None)
    for path, scheme in ((tmp_path / "model", FP8_PER_CHANNEL), (tmp_path / "out", BF16)):
        report = load_model(path, scheme, dtype=torch.bfloat16).loader.report
        plan = plan_of(str(path), "--accelerator", "h200", "-q", scheme.name)
        roles: dict[str, int] = {}
        for (role, _), group in report.groups.items():
            name = {"embedding": "embeddings"}.get(role, role)
            roles[name] = roles.get(name, 0) + group.values
        assert plan.question.subject.base.parameters() == roles
        shown = [(group.component, group.format, group.why) for group in groups(plan)]
        assert ("router", "bf16", "small, and it decides which experts run") in shown
        assert [form for component, form, _ in shown if component == "experts"] == ["ptpc_fp8"]
        assert ("shared experts" in roles) == (family == "glm4_moe")
    show(plan, "")
    active = plan.question.subject.base.active
    assert (
        f"{plan.question.subject.base.total('values') / 1e3:.2f} k parameters, {active / 1e3:.2f} k active, from"
        in " ".join(capsys.readouterr().out.split())
    )
