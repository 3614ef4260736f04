"""Checkpoints that `octavo plan` reads by their headers: every format, and every kind of damage."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from cases import cases
from tools.planner import TINY_LLAMA, answer, checkpoint, llama_tensors, plan_of, write_headers

from octavo.errors import OctavoError
from octavo.tools.plan.explain import groups


@cases(
    ("scheme", "label"),
    [("bf16", "bf16"), ("fp8", "fp8"), ("channel", "ptpc_fp8"), ("block", "fp8_block"), ("int4", "int4")],
)
def test_stored_formats_are_found_by_the_headers(tmp_path: Path, scheme: str, label: str) -> None:
    found = answer(checkpoint(tmp_path, llama_tensors(scheme)), "--accelerator", "h200")
    stored = {group["component"]: group["format"] for group in found["groups"]}
    native = scheme != "bf16"
    assert stored["attention"] == stored["mlp"] == (label if native else "ptpc_fp8")
    assert stored["embeddings"] == stored["lm_head"] == "bf16"
    assert found["parameters_in_headers"] == found["parameters_by_component"]
    assert ("native" in found["variants"]) == native
    if scheme in ("channel", "block"):  # a scalar scale is held as one a row, INT4 has weight_shape beside it
        assert found["variants"]["native"]["weights"] == found["bytes_on_disk"]
    assert [text for text in found["refused"] if "INT4" not in text] == []


def test_what_is_still_bf16_follows_the_option(tmp_path: Path) -> None:
    tensors = llama_tensors("block")
    mixed = {name: entry for name, entry in tensors.items() if "mlp" not in name}
    mixed |= {name: entry for name, entry in llama_tensors("bf16").items() if "mlp" in name}
    plan = plan_of(checkpoint(tmp_path, mixed), "--accelerator", "h200", "-q", "ptpc_fp8")
    assert plan.asked.variant.label == "native, rest PTPC"
    assert {g.component: g.format for g in groups(plan)}["attention"] == "fp8_block"
    assert {g.component: g.format for g in groups(plan)}["mlp"] == "ptpc_fp8"


@cases("tied", [False, True])
@cases(("scheme", "label"), [("fp8", "fp8"), ("channel", "ptpc_fp8"), ("block", "fp8_block"), ("int4", "")])
def test_a_quantized_head_takes_the_scheme_of_the_checkpoint(tmp_path: Path, scheme: str, label: str, tied: bool) -> None:
    tensors = llama_tensors(scheme)
    if tied:
        del tensors["lm_head.weight"]
    path = checkpoint(tmp_path, tensors, tie_word_embeddings=tied)
    found = answer(path, "--accelerator", "h200", "--quantize-lm-head")
    stored = {group["component"]: group["format"] for group in found["groups"]}
    assert stored["lm_head"] == (label or "bf16")
    assert stored["embeddings"] == (label if tied and label else "bf16")
    assert bool(label) != any("--quantize-lm-head needs a scheme" in text for text in found["refused"])


def test_a_checkpoint_that_does_not_match_its_config(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.1.self_attn.q_norm.weight"] = ("BF16", (64,))
    tensors["model.norm.weight"] = ("BF16", (128,))
    text = "\n".join(answer(checkpoint(tmp_path, tensors), "--accelerator", "h200")["refused"])
    assert "has no tensor model.layers.1.mlp.up_proj.weight, which the model needs" in text
    assert "holds 1 tensor(s)" in text
    assert "q_norm" in text
    assert "tensor model.norm.weight has shape [128], but config.json makes it [256]" in text


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint(tmp_path, llama_tensors())
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OctavoError, match=r"model\.safetensors is truncated or corrupt \(.*\); download it again\."):
        plan_of(str(tmp_path), "--accelerator", "h200")
    for content in (b"", b"\x00" * 8, b"\xff" * 8, (5).to_bytes(8, "little") + b"[1,2]", (2).to_bytes(8, "little") + b"{"):
        path.write_bytes(content)
        with pytest.raises(OctavoError, match=r"model\.safetensors is truncated or corrupt"):
            plan_of(str(tmp_path), "--accelerator", "h200")


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    write_headers(tmp_path / "one.safetensors", llama_tensors())
    index = tmp_path / "model.safetensors.index.json"
    for content, message in {
        "{": "is not valid JSON",
        json.dumps(
            {"weight_map": {"a": "two.safetensors"}}
        ): r"two\.safetensors is missing, but the checkpoint's index names it",
        json.dumps({"weight_map": {"a": "one.safetensors"}}): r"names the tensor a, which one\.safetensors does not hold",
    }.items():
        index.write_text(content)
        with pytest.raises(OctavoError, match=message):
            plan_of(str(tmp_path), "--accelerator", "h200")


@cases(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'?"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": -1}, "config.json: hidden_size must be positive, not -1."),
        ({"num_hidden_layers": "two"}, "config.json: num_hidden_layers must be of type int, not 'two'."),
        ({"model_type": "qwen3_vl"}, "config.json has no text_config"),
    ],
)
def test_a_config_that_is_wrong_names_the_field(tmp_path: Path, config: dict[str, object], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | config))
    with pytest.raises(OctavoError, match=re.escape(message)):
        plan_of(str(tmp_path), "--accelerator", "h200")


def test_an_unknown_quantization_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"quantization_config": {"quant_method": "awq"}}))
    assert (
        "this checkpoint is quantized with 'awq', which Octavo does not read"
        in answer(str(tmp_path), "--accelerator", "h200")["refused"][0]
    )
