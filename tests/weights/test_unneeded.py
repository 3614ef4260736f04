"""Tensors that tools leave in checkpoints and that no model needs: skipped, and said where somebody might miss them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import COMMON, tokens
from safetensors.torch import load_file, save_file
from tools.planner import plan_of
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM, SamplingParams
from octavo.cli import main
from octavo.errors import OctavoError
from octavo.quant import FP8_PER_CHANNEL, QuantRules
from octavo.tools.plan.explain import refusals
from octavo.tools.quantize.quantize import quantize_checkpoint

ATTENTION = "model.layers.0.self_attn"
ONE = torch.ones(())
TABLES = {
    "inv_freq of a layer": {f"{ATTENTION}.rotary_emb.inv_freq": torch.ones(8)},
    "inv_freq of the model": {"model.rotary_emb.inv_freq": torch.ones(8)},
    "original_inv_freq": {"model.rotary_emb.original_inv_freq": torch.ones(8)},
    "cosines and sines": {f"{ATTENTION}.rotary_emb.{name}_cached": torch.ones(1, 1, 8, 16) for name in ("cos", "sin")},
    "both in one": {f"{ATTENTION}.rotary_emb.cos_sin_cache": torch.ones(8, 16)},
}
SCALES = {
    "of a head in BF16": {"lm_head.weight_scale": torch.ones(256, 1)},
    "of the head's activations": {"lm_head.input_scale": ONE},
    "of an embedding in BF16": {"model.embed_tokens.weight_scale": ONE},
}
ACTIVATIONS = {
    "outputs": {"model.layers.0.mlp.down_proj.output_scale": ONE, f"{ATTENTION}.o_proj.output_scale": ONE},
    "inputs": {"model.layers.0.mlp.down_proj.input_scale": ONE, f"{ATTENTION}.q_proj.input_zero_point": ONE.char()},
    "AutoFP8's first name": {f"{ATTENTION}.q_proj.act_scale": ONE},
    "fbgemm's bound": {f"{ATTENTION}.q_proj.input_scale_ub": ONE},
    "Hugging Face's": {f"{ATTENTION}.q_proj.activation_scale": ONE},
    "queries": {f"{ATTENTION}.q_scale": ONE, f"{ATTENTION}.attn.q_scale": ONE},
    "probabilities": {f"{ATTENTION}.attn.prob_scale": ONE, f"{ATTENTION}.prob_output_scale": ONE},
    "offsets of a cache": {f"{ATTENTION}.k_zero_point": ONE.char(), f"{ATTENTION}.v_proj.v_bias": torch.ones(4)},
    "ModelOpt's maxima": {f"{ATTENTION}.q_proj.weight_quantizer._amax": ONE},
    "masks": {f"{ATTENTION}.masked_bias": ONE, "model.embeddings.position_ids": torch.arange(4)},
    "biases of 0": {f"{ATTENTION}.q_proj.bias": torch.zeros(64)},
    "zero points of 0": {f"{ATTENTION}.q_proj.weight_zero_point": torch.zeros(64, 1).to(torch.float8_e4m3fn)},
    "Quark's, of biases": {f"{ATTENTION}.q_proj.bias_zero_point": torch.zeros(1).int()},
}
EXTRA: dict[str, dict[str, torch.Tensor]] = {
    "tables": {name: tensor for entry in TABLES.values() for name, tensor in entry.items()},
    "skipped": {name: tensor for entry in ACTIVATIONS.values() for name, tensor in entry.items()},
    **SCALES,
}
HOW: dict[str, Any] = dict(dtype="float32", threads=1, cpu_kv_cache_gib=0.01)


def write(directory: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON | changes)).bfloat16()
    model.save_pretrained(directory)
    return directory


def add(directory: Path, extra: dict[str, torch.Tensor]) -> None:
    file = directory / "model.safetensors"
    save_file(load_file(file) | {name: tensor.clone() for name, tensor in extra.items()}, file, metadata={"format": "pt"})


def say(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logprobs(llm: LLM) -> list[float]:
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=0, ignore_eos=True)
    found = llm.generate([tokens(20)], params, use_tqdm=False)[0].outputs[0]
    assert found.logprobs is not None
    return [entry[token].logprob for entry, token in zip(found.logprobs, found.token_ids, strict=True)]


@cases("tied", [False, True])
@cases("name", EXTRA)
def test_what_no_model_needs_is_skipped(name: str, tied: bool, tmp_path: Path) -> None:
    expected = logprobs(LLM(write(tmp_path, tie_word_embeddings=tied), **HOW))
    add(tmp_path, EXTRA[name])
    llm = LLM(tmp_path, **HOW)
    assert logprobs(llm) == expected
    told = [line for line in llm.info.report if "not used: what they would scale is not quantized" in line]
    assert [extra in "".join(told) for extra in EXTRA[name]] == [name in SCALES] * len(EXTRA[name])
    noted = " ".join(line for line in llm.info.report if line.startswith("note: skipped"))
    ends = {extra.rpartition(".")[2] for extra in EXTRA[name]}
    assert {end for end in ends if f" 1 {end}" in noted or f" 2 {end}" in noted} == (ends if name == "skipped" else set())
    assert refusals(plan_of(str(tmp_path), "--accelerator", "cpu")) == []


@cases("name", EXTRA)
def test_quantize_takes_it_too(name: str, tmp_path: Path) -> None:
    source, plain, out = (tmp_path / part for part in ("source", "plain", "out"))
    write(source)
    assert main(["quantize", str(source), "--output", str(plain), "--scheme", "ptpc_fp8"]) == 0
    add(source, EXTRA[name])
    assert main(["quantize", str(source), "--output", str(out), "--scheme", "ptpc_fp8"]) == 0
    assert logprobs(LLM(out, **HOW)) == logprobs(LLM(plain, **HOW))


NEEDED = {
    f"{ATTENTION}.q_proj.bias": (torch.ones(64), "a bias that config.json does not announce"),
    f"{ATTENTION}.q_proj.pre_quant_scale": (torch.ones(64), "factors on the activations"),
    f"{ATTENTION}.q_proj.weight_scale_2": (ONE, "second scales, of FP4 weights"),
    f"{ATTENTION}.q_proj.weight_g_idx": (torch.zeros(64).int(), "an order of the columns"),
    f"{ATTENTION}.q_proj.weight_zero_point": (torch.ones(64, 1).char(), "zero points of weights"),
    f"{ATTENTION}.q_proj.R4_input.weight": (torch.ones(4, 4), "rotations at run time"),
    "model.layers.3.self_attn.q_proj.weight": (torch.ones(4, 4), "they are of different models"),
}


@cases("name", NEEDED)
def test_what_changes_the_model_is_refused_by_what_it_means(name: str, tmp_path: Path) -> None:
    tensor, what = NEEDED[name]
    add(write(tmp_path), {name: tensor})
    with pytest.raises(OctavoError, match=f"{name}.*{what}") as raised:
        LLM(tmp_path, **HOW)
    assert str(raised.value).endswith(".")
    seen_in_headers = not name.endswith(("bias", "weight_zero_point"))  # what is no fault if it is 0
    assert refusals(plan_of(str(tmp_path), "--accelerator", "cpu")) == [str(raised.value)] * seen_in_headers


@cases("scale", [{"weight_zero_point": torch.ones(64, 1).char()}, {"pre_quant_scale": torch.ones(64)}], ids=str)
def test_quantize_reads_no_codes_of_another_meaning(scale: dict[str, torch.Tensor], tmp_path: Path) -> None:
    stored = load_file(write(tmp_path) / "model.safetensors")
    name = f"{ATTENTION}.q_proj"
    codes = {f"{name}.weight": stored[f"{name}.weight"].to(torch.float8_e4m3fn), f"{name}.weight_scale": ONE}
    add(tmp_path, codes | {f"{name}.{end}": tensor for end, tensor in scale.items()})
    with pytest.raises(OctavoError, match="without it the model would be another"):
        quantize_checkpoint(tmp_path, tmp_path / "out", QuantRules(FP8_PER_CHANNEL))
    assert not (tmp_path / "out").exists()


@cases("listed", [None, "ignore", "modules_to_not_convert", "exclude"])
def test_a_scale_beside_a_layer_that_is_not_quantized(listed: str | None, tmp_path: Path) -> None:
    """Its BF16 values may be codes that somebody cast, with which the scale belongs, unless the checkpoint says otherwise."""
    expected = logprobs(LLM(write(tmp_path), **HOW))
    add(tmp_path, {"model.layers.0.mlp.down_proj.weight_scale": ONE})
    if listed is None:
        with pytest.raises(OctavoError, match=r"down_proj\.weight is stored as torch\.bfloat16 with a scale beside it"):
            LLM(tmp_path, **HOW)
        return
    method = {"ignore": "compressed-tensors", "exclude": "quark"}.get(listed, "fp8")
    say(tmp_path, quantization_config={"quant_method": method, listed: ["lm_head", "model.layers.0.mlp.down_proj"]})
    llm = LLM(tmp_path, **HOW)
    assert logprobs(llm) == expected
    assert any("model.layers.0.mlp.down_proj.weight_scale not used" in line for line in llm.info.report)


@cases("name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"])
@cases("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_are_no_values(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Read as numbers they would be wrong by their scale, without a word."""
    stored = load_file(write(tmp_path) / "model.safetensors")
    add(tmp_path, {name: stored[name].to(dtype)})
    with pytest.raises(OctavoError, match=f"{name} is stored as {dtype}, which Octavo reads of linear layers only"):
        LLM(tmp_path, **HOW)


KEYS_AND_VALUES = {
    "llm-compressor's, of a fused layer": {"qkv_proj.k_scale": 0.5, "qkv_proj.v_scale": 0.25},
    "beside the attention": {"k_scale": 0.5, "v_scale": 0.25},
    "of a name that vLLM's own reader makes": {"qkqkv_proj.k_scale": 0.5, "qkqkv_proj.v_scale": 0.25},
    "ModelOpt's": {"k_proj.k_scale": 0.5, "v_proj.v_scale": 0.25},
    "Quark's and AutoFP8's": {"k_proj.output_scale": 0.5, "v_proj.output_scale": 0.25},
    "AutoFP8's first, one for both": {"kv_scale": 0.5},
    "keys alone": {"k_scale": 0.5},
    "keys alone, of a fused layer": {"qkv_proj.k_scale": 0.5},
}


@pytest.mark.parametrize("name", KEYS_AND_VALUES)
def test_scales_of_a_cache(name: str, tmp_path: Path) -> None:
    scales = KEYS_AND_VALUES[name]
    write(tmp_path)
    add(tmp_path, {f"model.layers.{n}.self_attn.{end}": torch.tensor(value) for n in range(3) for end, value in scales.items()})
    llm = LLM(tmp_path, kv_cache_dtype="fp8", **HOW)
    found, from_checkpoint = llm._core.runner.model.kv_scales()
    assert from_checkpoint
    assert [float(scale) for scale in found] == [0.5, 0.25 if len(scales) == 2 else 0.5] * 3
    assert "note: KV scales taken from the checkpoint" in llm.info.report
    for dtype in ("auto", "fp8_per_token_head"):
        report = LLM(tmp_path, kv_cache_dtype=dtype, **HOW).info.report
        assert f"note: the checkpoint has KV scales, which --kv-cache-dtype {dtype} does not use; fp8 does" in report


@cases("said", [{"kv_cache_quant_algo": "NVFP4"}, {"kv_cache_scheme": {"type": "int", "num_bits": 8}}], ids=str)
def test_scales_of_a_cache_of_another_format(said: dict[str, Any], tmp_path: Path) -> None:
    """NVFP4's are for values of up to 6 x 448: an FP8 cache with them would clip keys and values at a sixth of the largest."""
    add(write(tmp_path), {f"model.layers.{n}.self_attn.{end}_scale": ONE for n in range(3) for end in "kv"})
    say(tmp_path, quantization_config={"quant_method": "modelopt", "quant_algo": None, **said})
    LLM(tmp_path, **HOW)
    LLM(tmp_path, kv_cache_dtype="fp8", calculate_kv_scales=True, **HOW)
    with pytest.raises(OctavoError, match=r"KV scales are for a cache in (NVFP4|INT8), and no FP8") as raised:
        LLM(tmp_path, kv_cache_dtype="fp8", **HOW)
    assert refusals(plan_of(str(tmp_path), "--accelerator", "cpu", "--kv-cache-dtype", "fp8")) == [str(raised.value.__cause__)]


def test_scales_of_some_layers(tmp_path: Path) -> None:
    add(write(tmp_path), {f"{ATTENTION}.{end}_scale": ONE / 2 for end in "kv"})
    llm = LLM(tmp_path, kv_cache_dtype="fp8", **HOW)
    found, stored = llm._core.runner.model.kv_scales()
    assert ([float(scale) for scale in found], stored) == ([0.5, 0.5, 1.0, 1.0, 1.0, 1.0], 1)
    said = "KV scales taken from the checkpoint, which has them of 1 of 3 layers; the others' are 1.0"
    assert f"note: {said}" in llm.info.report
    assert any("the checkpoint has KV scales, which" in line for line in LLM(tmp_path, **HOW).info.report)


def test_codes_of_a_tied_head_are_not_read(tmp_path: Path) -> None:
    """The head is the embedding, which is stored in BF16 beside them."""
    expected = logprobs(LLM(write(tmp_path, tie_word_embeddings=True), **HOW))
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    add(tmp_path, {"lm_head.weight": table.to(torch.float8_e4m3fn), "lm_head.weight_scale": ONE, "lm_head.input_scale": ONE})
    assert logprobs(LLM(tmp_path, **HOW)) == expected
    assert refusals(plan_of(str(tmp_path), "--accelerator", "cpu")) == []


def test_scales_of_values_alone_are_half_of_something(tmp_path: Path) -> None:
    add(write(tmp_path), {f"{ATTENTION}.v_scale": ONE})
    with pytest.raises(OctavoError, match=r"no tensor .*self_attn\.k_scale"):
        LLM(tmp_path, kv_cache_dtype="fp8", **HOW)
