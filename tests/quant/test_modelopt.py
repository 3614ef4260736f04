"""The ways in which NVIDIA's ModelOpt says what it did to a checkpoint, and the scales that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import cases
from conftest import COMMON, LoadModel, relative_error, tokens
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.cli import main
from octavo.quant import FP8_BLOCK, FP8_PER_TENSOR, dequantize, quantize
from octavo.quant.checks import check_format
from octavo.quant.stored_format import stored_format_of

MODELOPT = [
    dict(quant_method="modelopt", quant_algo="FP8"),
    dict(quant_method="modelopt", producer=dict(name="modelopt", version="0.29.0"), quantization=dict(quant_algo="FP8")),
    dict(producer=dict(name="modelopt"), quantization=dict(quant_algo="FP8", exclude_modules=["lm_head"])),
    dict(quant_algo="fp8"),
    dict(quant_method="modelopt", quant_algo="fp8_pb_wo"),
    dict(quant_method="modelopt", quantization=dict(quant_algo=None, kv_cache_quant_algo="FP8")),
    dict(quant_method="modelopt"),
]


@cases("quantization", MODELOPT, ids=str)
@cases("own_file", [True, False])
@cases("tiles", [True, False])
def test_checkpoints_of_modelopts_forms(
    quantization: dict[str, Any], own_file: bool, tiles: bool, tmp_path: Path, load_model: LoadModel
) -> None:
    """Every way in which it says what it did, beside weights in its names, gives the logits of transformers' BF16 weights."""
    config = LlamaConfig(**COMMON | dict(hidden_size=128, intermediate_size=256, head_dim=32))
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).eval()
    said = quantization.get("quantization", quantization)
    state, stored = reference.state_dict(), {}
    for name, value in state.items():
        stored[name] = value.contiguous()
        if said.get("quant_algo") and "_proj" in name:
            q = quantize(value, FP8_BLOCK if tiles else FP8_PER_TENSOR)
            assert q.scale is not None
            n, k = q.scale.shape
            stored |= {name: q.data, f"{name}_scale": q.scale.view(n, 1, k, 1) if tiles else q.scale[0, 0]}
            state[name].copy_(dequantize(q))
        elif not said.get("quant_algo") and name.endswith(("k_proj.weight", "v_proj.weight")):
            stored[f"{name.removesuffix('weight')}{'k' if 'k_proj' in name else 'v'}_scale"] = torch.tensor(1.0)
    save_file(stored, tmp_path / "model.safetensors")
    described = json.loads(config.to_json_string(use_diff=False)) | dict(model_type="llama")
    if own_file:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    else:
        described["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(described))
    check_format(described, tmp_path)
    ids = tokens(20)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    # the activations are rounded to codes where weights are, by token or by 128 values
    assert relative_error(load_model(tmp_path).logits(ids), expected) < (0.06 if said.get("quant_algo") else 1e-4)
    if not said.get("quant_algo"):
        return
    (stored,) = {stored_format_of(described, tmp_path if own_file else None)}
    assert stored is not None
    out = tmp_path / "out"
    scheme = "fp8_block" if tiles else "fp8"
    assert main(["quantize", str(tmp_path), "--scheme", scheme, "--output", str(out), "--verify"]) == 0
    assert relative_error(load_model(out).logits(ids), load_model(tmp_path).logits(ids)) < 1e-6  # the same codes
