"""Checkpoints of models that read images: their towers are quantized on disk as they are while loading, or left in BF16."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from engine.test_core import run as answers
from engine.test_core import token_ids
from engine.test_images import ENGINE, IMAGE, image, prompt
from models.test_kimi import kimi, write
from models.test_moe_quantized import in_bytes
from models.test_qwen3_vl import qwen3_vl, qwen3_vl_moe
from tools.planner import plan_of
from tools.test_quantize import SCHEMES, dequantized, run, tensors_of
from transformers import CompressedTensorsConfig, Qwen3VLForConditionalGeneration

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.quant import Scheme, dequantize, quantize
from octavo.tools.plan.explain import refusals
from octavo.weights.load_report import role_of

LINEAR = re.compile(r"(_proj|attn\.qkv|attn\.proj|linear_fc[12])\.weight$")
TOWER = "model.visual."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3_vl")
    torch.manual_seed(0)
    model = qwen3_vl()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(3 if p.ndim > 1 and "layers" in name else 1)
    model.bfloat16().save_pretrained(path)
    return path


def served(path: Path, family: str = "qwen3_vl", **options: Any) -> tuple[list[int], torch.Tensor, Any]:
    """Tokens that follow a picture, the tower's outputs for it, and the load report."""
    core = EngineCore(EngineConfig(model=str(path), **ENGINE | dict(dtype="bfloat16") | options))
    asked = prompt("a", [10, 11, IMAGE, 12, 13], image(family, 1))
    ids = token_ids(answers(core, [asked])[0])["a"]
    assert core.runner.encoder is not None
    (features,) = core.runner.encoder.features.values()
    return ids, features, core.runner.report


@dequantized
@cases("scheme", SCHEMES, ids=lambda s: s.name)
def test_towers_are_quantized_as_a_start_quantizes_them(scheme: Scheme, checkpoint: Path, tmp_path: Path) -> None:
    """Every linear layer and nothing else; transformers reads the same values; outputs for a picture are equal to the bit."""
    run(checkpoint, tmp_path / "out", scheme)
    before, after = tensors_of(checkpoint), tensors_of(tmp_path / "out")
    how: dict[str, Any] = dict(dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    theirs, info = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True, **how)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    read = theirs.state_dict()
    linears = {name for name in before if LINEAR.search(name) and before[name].ndim == 2}
    assert len([name for name in linears if name.startswith(TOWER)]) == 2 * 4 + 2 * 2
    for name, w in before.items():
        if name in linears:
            q = quantize(w, scheme)
            assert in_bytes(after[name]) == in_bytes(q.data), name
            assert torch.equal(read[name], dequantize(q)), name
        else:
            assert in_bytes(after[name]) == in_bytes(w), name
            assert torch.equal(read[name], w.float()), name
    assert after.keys() == {*before, *(f"{name}_scale" for name in linears)}
    words = ("--accelerator", "h200", "--kv-cache-dtype", "auto")
    by_headers, by_config = (plan_of(str(path), *words) for path in (tmp_path / "out", tmp_path / "out/config.json"))
    assert refusals(by_headers) == refusals(by_config) == []
    assert by_headers.asked.components == by_config.asked.components

    ids, features, report = served(checkpoint, quantization=scheme.name)
    saved = str(tmp_path / "saved")
    for path, more in ((tmp_path / "out", {}), (checkpoint, dict(quantization=scheme.name, save_quantized=saved))):
        own, seen, said = served(path, **more)
        assert own == ids
        assert torch.equal(seen, features)
        assert said.groups == report.groups
    assert report.groups["vision", scheme.name].tensors == 2 * 4 + 2 * 2
    assert len(set(ids)) > 3


@cases("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_tower_beside_experts_in_int4(scheme: Scheme, tmp_path: Path) -> None:
    """Kimi-K2.5: its experts' codes stay, its tower and projector get the scheme."""
    write(tmp_path / "model", kimi(), int4=True)
    run(tmp_path / "model", tmp_path / "out", scheme)
    found = served(tmp_path / "model", "kimi_k25", quantization=scheme.name)
    written = served(tmp_path / "out", "kimi_k25")
    assert written[0] == found[0]
    assert torch.equal(written[1], found[1])
    assert written[2].groups == found[2].groups
    assert found[2].groups["vision", scheme.name].tensors == 2 * 4 + 2
    assert not torch.equal(found[1], served(tmp_path / "model", "kimi_k25")[1])


def test_a_tower_left_in_bf16(checkpoint: Path, tmp_path: Path) -> None:
    """The usual recipe. What stays is named in config.json, so that other engines look for no scales of it."""
    run(checkpoint, tmp_path / "out", ignore=["model.visual.*"])
    before, after = tensors_of(checkpoint), tensors_of(tmp_path / "out")
    assert all(in_bytes(after[name]) == in_bytes(w) for name, w in before.items() if name.startswith(TOWER))
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    linears = {name.removesuffix(".weight") for name, w in before.items() if LINEAR.search(name) and w.ndim == 2}
    assert {name for name in ignored if name.startswith(TOWER)} == {name for name in linears if name.startswith(TOWER)}
    _, info = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = [
        served(checkpoint, quantization="ptpc_fp8", quantization_ignore=["model.visual.*"]),
        served(tmp_path / "out"),
        served(checkpoint, quantization="ptpc_fp8", quantization_ignore=["model.visual.*"], save_quantized=str(tmp_path / "s")),
    ]
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], served(checkpoint)[1])
    assert {role for role, scheme in found[0][2].groups if scheme == "ptpc_fp8"} == {"attention", "mlp"}
    assert found[0][2].groups == found[1][2].groups == found[2][2].groups
    # the pattern is no typing error where the tower is not loaded
    words = ("-q", "ptpc_fp8", "--quantization-ignore", "model.visual.*", "--language-model-only", "--accelerator", "h200")
    assert refusals(plan_of(str(checkpoint), *words)) == []
    text = dict(quantization="ptpc_fp8", quantization_ignore=["model.visual.*"], language_model_only=True)
    assert EngineCore(EngineConfig(model=str(checkpoint), **ENGINE | text)).runner.encoder is None


def test_a_tower_has_a_role_of_its_own_in_the_load_report(tmp_path: Path) -> None:
    """All of it: norms, biases, positions; and nothing of the text model."""
    torch.manual_seed(0)
    model = qwen3_vl_moe()
    model.bfloat16().save_pretrained(tmp_path)
    core = EngineCore(EngineConfig(model=str(tmp_path), **ENGINE | dict(quantization="fp8")))
    groups = core.runner.report.groups
    tower = sum(p.numel() for name, p in model.named_parameters() if "visual." in name)
    assert sum(group.values for (role, _), group in groups.items() if role == "vision") == tower
    assert sum(group.values for group in groups.values()) == model.num_parameters()
    assert {role for role, scheme in groups if scheme == "fp8"} == {"attention", "experts", "vision"}
    lines = "\n".join(core.info.report)
    assert re.search(r"^  vision +fp8 +", lines, re.MULTILINE)
    assert role_of("mm_projector.proj.0") == role_of("vision_tower.encoder.blocks.0.wqkv") == "vision"
