"""What is wrong with a checkpoint of experts or its config.json, a sentence each; what may be passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import cases
from conftest import LoadModel
from models.test_moe_quantized import tiny
from models.test_quantized import octavo_logits, scaled
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import OctavoError


def without(tensors: dict[str, Tensor], at: str) -> None:
    del tensors[f"{at}.2.up_proj.weight"]


def with_one_more(tensors: dict[str, Tensor], at: str) -> None:
    tensors |= {f"{at}.7.{n}.weight": tensors[f"{at}.6.{n}.weight"].clone() for n in ("gate_proj", "up_proj", "down_proj")}


def with_one_in_fp8(tensors: dict[str, Tensor], at: str) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors |= scaled("ptpc_fp8")(f"{at}.3.{name}.weight", tensors[f"{at}.3.{name}.weight"])


def of_another_size(tensors: dict[str, Tensor], at: str) -> None:
    tensors[f"{at}.4.gate_proj.weight"] = torch.zeros(41, 64)


def without_a_router(tensors: dict[str, Tensor], at: str) -> None:
    del tensors[at.replace("experts", "gate.weight")]


FAULTS = {
    "no tensor model.layers.1.mlp.experts.2.up_proj.weight": without,
    "does not have, the first is model.layers.1.mlp.experts.7.down_proj.weight": with_one_more,
    "model.layers.1.mlp.experts: expert 3 is stored in ptpc_fp8 and those before it in bf16": with_one_in_fp8,
    "model.layers.1.mlp.experts.4.gate_proj.weight has shape [41, 64], but config.json makes it [40, 64]": of_another_size,
    "no tensor model.layers.1.mlp.gate.weight": without_a_router,
}


@cases("said", FAULTS)
def test_a_checkpoint_whose_experts_are_not_all_alike_is_refused(said: str, tmp_path: Path, load_model: LoadModel) -> None:
    tiny(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    FAULTS[said](tensors, "model.layers.1.mlp.experts")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OctavoError) as raised:
        load_model(tmp_path)
    assert said in str(raised.value)
    assert str(raised.value).endswith((".", "?"))
    assert "\n" not in str(raised.value)


CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "a token cannot be sent to 9 of 7 experts": ("qwen3_moe", dict(num_experts_per_tok=9)),
    "a token cannot be sent to 3 of 9 experts of 1 of 9 groups": ("glm4_moe", dict(n_group=9)),
    "a token cannot be sent to 3 of 9 experts of 1 of 2 groups": ("glm4_moe", dict(n_group=2)),
    "n_shared_experts must be positive, not -1": ("glm4_moe", dict(n_shared_experts=-1)),
    "num_local_experts must be positive, not 0": ("mixtral", dict(num_local_experts=0)),
    "hidden_act 'gelu'": ("mixtral", dict(hidden_act="gelu")),
    "partial_rotary_factor of the rotary embedding must be": (
        "glm4_moe",
        dict(rope_parameters=dict(partial_rotary_factor="half")),
    ),
    "40 of a head's 16 dimensions cannot be rotated": ("glm4_moe", dict(rope_parameters=dict(partial_rotary_factor=2.5))),
    "3 of a head's 24 dimensions cannot be rotated": ("minimax_m2", dict(rotary_dim=3, rope_parameters=dict(rope_theta=1e4))),
    "qk_norm_type 'per_head'; this architecture is served with 'per_layer'": ("minimax_m2", dict(qk_norm_type="per_head")),
    "scoring_func 'softmax'": ("minimax_m2", dict(scoring_func="softmax")),
    "shared_intermediate_size 64": ("minimax_m2", dict(shared_intermediate_size=64)),
    "linear attention": ("minimax_m2", dict(attn_type_list=[1, 0, 1])),
}


@cases("said", CONFIGS)
def test_a_config_that_is_not_served_is_refused(said: str, tmp_path: Path, load_model: LoadModel) -> None:
    family, changes = CONFIGS[said]
    tiny(tmp_path, family)
    found = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | changes))
    with pytest.raises(OctavoError) as raised:
        load_model(tmp_path)
    assert said in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2"])
def test_layers_that_predict_further_tokens_are_passed_over(family: str, tmp_path: Path, load_model: LoadModel) -> None:
    tiny(tmp_path, family)
    expected = octavo_logits(load_model(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(64, 128)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules"):
        config[name] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(octavo_logits(load_model(tmp_path)), expected)
    for name in ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules"):
        config[name] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OctavoError, match=r"does not have, the first is model\.layers\.3\."):
        load_model(tmp_path)
