"""What a plan says that each of several ranks holds is what ranks allocate, within 2%; rank 0 holds the most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from ranks import storage_bytes
from tools.planner import plan_of
from tools.test_plan_sizes import KIMI_VISION, QWEN_ROPE, QWEN_VISION

from octavo import ops
from octavo.cli import engine_config, make_parser
from octavo.distributed import TensorParallel
from octavo.engine.kv_setup import cache_specs
from octavo.engine.loading import load_model, make_model
from octavo.platform import detect
from octavo.tools.plan import plan as tool

# Widths of which no number of ranks has equal parts; 8 heads, with fewer of keys, which ranks share.
DENSE: dict[str, Any] = dict(
    vocab_size=1000, hidden_size=192, intermediate_size=344, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=512, rope_theta=1e4, rms_norm_eps=1e-6,
)  # fmt: skip
EXPERTS = dict(moe_intermediate_size=72, num_experts=10, num_experts_per_tok=2, norm_topk_prob=True)
MLA = DENSE | dict(
    num_key_value_heads=8, moe_intermediate_size=72, n_routed_experts=12, n_shared_experts=2, num_experts_per_tok=2, n_group=4,
    topk_group=2, first_k_dense_replace=1, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=24, routed_scaling_factor=1.0, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc",
)  # fmt: skip
VISION = dict(num_heads=8, hidden_size=64, out_hidden_size=192)
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE | dict(model_type="llama"),
    "tied, with biases": DENSE | dict(model_type="qwen2", tie_word_embeddings=True),
    "experts": DENSE | EXPERTS | dict(model_type="qwen3_moe"),
    "MLA": MLA | dict(model_type="deepseek_v3"),
    "indexer": MLA | dict(model_type="deepseek_v32", index_n_heads=16, index_head_dim=16, index_topk=6),
    "images": dict(
        model_type="qwen3_vl", text_config=DENSE | QWEN_ROPE | dict(model_type="qwen3_vl_text"),
        vision_config=QWEN_VISION | VISION, tie_word_embeddings=False,
    ),
    "images and MLA": dict(
        model_type="kimi_k25", text_config=MLA | dict(model_type="deepseek_v3"), projection_hidden_size=64,
        vision_config=KIMI_VISION | dict(num_attention_heads=8, hidden_size=64), tie_word_embeddings=False,
    ),
}  # fmt: skip
WHOLE_EXPERTS, WHOLE_TOWERS = ["--enable-expert-parallel"], ["--mm-encoder-tp-mode", "data"]
SIZES = (1, 2, 4, 8)


class Alone:
    """A rank whose others only seem to be there: bytes do not depend on values."""

    def __init__(self, size: int):
        self.size = size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    max_reduce = all_reduce

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x] * self.size


@cases(
    "name, scheme, words",
    [
        ("dense", "ptpc_fp8", []), ("dense", "fp8_block", []), ("dense", "bf16", []), ("tied, with biases", "fp8", []),
        ("experts", "ptpc_fp8", []), ("experts", "ptpc_fp8", WHOLE_EXPERTS), ("MLA", "fp8_block", []),
        ("MLA", "bf16", WHOLE_EXPERTS), ("indexer", "ptpc_fp8", []), ("images", "ptpc_fp8", []),
        ("images", "bf16", WHOLE_TOWERS), ("images and MLA", "ptpc_fp8", []), ("images and MLA", "ptpc_fp8", WHOLE_TOWERS),
    ],
)  # fmt: skip
def test_ranks_hold_what_was_planned(name: str, scheme: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    platform = detect("cpu", 0, 1)
    ops.bind(platform)
    for size in SIZES:
        line = [str(tmp_path), "--device", "cpu", "--load-format", "dummy", "-q", scheme, "--cpu-kv-cache-gib", "0.01"]
        line += ["--num-accelerators", str(size), "-tp", str(size), *words]
        plan, config = plan_of(*line), engine_config(make_parser("plan", tool.add_arguments).parse_args(line))
        fit, token = plan.asked.fit, sum(plan.question.subject.token_bytes(plan.asked.variant, size))
        assert fit is not None
        found = []
        for rank in range(size):
            whole = dict(expert_parallel=bool(config.enable_expert_parallel), whole_towers=words == WHOLE_TOWERS)
            tp = TensorParallel(rank, size, Alone(size), **whole)
            model, _ = make_model(MODELS[name], tp, config, platform, torch.bfloat16)
            load_model(model, config, platform, torch.bfloat16, None, tp)
            found.append(storage_bytes(model))  # type: ignore[arg-type]
            assert token == sum(spec.bytes_per_token for spec in cache_specs(model, "auto", torch.bfloat16, platform))
        assert fit.weights + fit.positions == pytest.approx(found[0], rel=0.02), (size, found)
        assert max(found) == found[0], (size, found)
