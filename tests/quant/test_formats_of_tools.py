"""Checkpoints that each format's own tool wrote (tests/data/formats), read as that tool means them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from conftest import LoadModel, relative_error
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from octavo import batch as batches
from octavo import ops
from octavo.errors import OctavoError
from octavo.ops.cpu import library
from octavo.platform import Platform
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QTensor, QuantRules, Scheme, dequantize
from octavo.quant.checks import check_format
from octavo.quant.formats import read_weight, stored_shape
from octavo.tools.quantize.quantize import quantize_checkpoint
from octavo.weights.checkpoint import Checkpoint, RowReader, Rows, Scratch

DATA = Path(__file__).parents[1] / "data/formats"
CPU = Platform(torch.device("cpu"), "test", widened_dtype=torch.float32)
SCHEMES: dict[str, Scheme | None] = {
    "llm_compressor_fp8_dynamic": FP8_PER_CHANNEL,
    "llm_compressor_fp8": FP8_PER_TENSOR,
    "llm_compressor_fp8_block": FP8_BLOCK,
    "llm_compressor_w4a16": None,
    "modelopt_fp8": FP8_PER_TENSOR,
    "quark_fp8_tensor": FP8_PER_TENSOR,
    "quark_fp8_channel": FP8_PER_CHANNEL,
}
every = cases("name", SCHEMES)


def weights(directory: Path) -> dict[str, Tensor]:
    """FP32 of each linear layer, as octavo.quant.formats reads it."""
    checkpoint = Checkpoint(directory)
    reader = RowReader(checkpoint, CPU, Scratch())
    found = {}
    for module in sorted({name.rpartition(".")[0] for name in checkpoint.tensors if "_proj.weight" in name}):
        n, k = stored_shape(reader, module)
        read = read_weight(reader, module, (n, k), Rows(start=0, stop=n))
        found[module] = dequantize(read) if isinstance(read, QTensor) else read.clone()  # of a buffer used again
    checkpoint.close()
    return found


def multiplied(directory: Path) -> dict[str, Tensor]:
    """Code times scale in float64: what every FP8 format means."""
    tensors = load_file(directory / "model.safetensors")
    found = {}
    for name, codes in tensors.items():
        if name.endswith("_proj.weight"):
            scale = tensors[f"{name}_scale"].double()
            if scale.ndim == 2 and scale.shape[0] != codes.shape[0]:  # tiles
                scale = scale.repeat_interleave(128, 0)[: codes.shape[0]].repeat_interleave(128, 1)[:, : codes.shape[1]]
            found[name.removesuffix(".weight")] = codes.double() * (
                scale[:, None] if scale.ndim == 1 and len(scale) > 1 else scale
            )
    return found


@every
def test_weights_are_code_times_scale(name: str) -> None:
    found, expected = weights(DATA / name), multiplied(DATA / name)
    assert len(found) == 7
    for module, w in expected.items():
        assert torch.equal(found[module], w.float()), module
    assert bool(expected) == (SCHEMES[name] is not None)


# llm_compressor_fp8_block is of another original; transformers reads it below.
@cases("name", [name for name in SCHEMES if name != "llm_compressor_fp8_block"])
def test_weights_are_those_of_the_original(name: str) -> None:
    """The tools' scales multiply: dividing, or another order of INT4's elements, would be far off."""
    found, original = weights(DATA / name), weights(DATA / "original")
    bound = 0.04 if SCHEMES[name] else 0.12
    for module, w in original.items():
        assert relative_error(found[module], w.float()) < bound


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("llm_compressor")])
def test_transformers_reads_the_same_bits(name: str, tmp_path: Path) -> None:
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.bfloat16, quantization_config=config)
    for module, w in weights(DATA / name).items():
        assert torch.equal(w.bfloat16(), theirs.get_parameter(f"{module}.weight")), module


@every
def test_octavo_runs_it(name: str, load_model: LoadModel) -> None:
    check_format(json.loads((DATA / name / "config.json").read_text()), DATA / name)
    loaded = load_model(DATA / name, on=CPU)
    expected = load_model(DATA / "original", on=CPU).logits([3, 4, 5, 6])
    out = loaded.logits([3, 4, 5, 6])
    if name != "llm_compressor_fp8_block":
        assert 0 < relative_error(out, expected) < 0.3
    kinds = {scheme for _, scheme in loaded.loader.report.groups}
    assert kinds == {"bf16", *({scheme.name} if (scheme := SCHEMES[name]) else {"int4_g128", "int4"} & kinds)}
    assert ("int4" in str(kinds)) == (name == "llm_compressor_w4a16")
    attention = loaded.model.attention_layers()[0]
    assert attention.scales_from_checkpoint == (name in ("llm_compressor_fp8", "modelopt_fp8"))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
def test_packed_int4_has_the_logits_that_transformers_has(load_model: LoadModel) -> None:
    """Multiplied as it is stored, of few tokens and of many, and in a recorded step; in FP32, so that nothing hides behind
    rounding: transformers' own decoding, which rounds weights to BF16, and the same model of products of codes and scales."""
    name = DATA / "llm_compressor_w4a16"
    loaded = load_model(name, on=replace(CPU, widened_dtype=None))
    assert "int4" in {scheme for _, scheme in loaded.loader.report.groups}
    assert ops.table()["linear[int4]"].startswith("C kernels")
    ids = [(5 * i + i // 8) % 8 for i in range(21)]
    found = loaded.logits(ids), loaded.logits(ids, (16, 4, 1))
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, quantization_config=config)
    tensors = load_file(name / "model.safetensors")
    with torch.inference_mode():
        rounded = theirs(torch.tensor([ids])).logits[0]
        for module in (key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")):
            weight, scale = theirs.get_parameter(f"{module}.weight"), tensors[f"{module}.weight_scale"].float()
            codes = unpack_from_int32(tensors[f"{module}.weight_packed"], 4, weight.shape).float()
            weight.copy_(codes * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1))
        exact = theirs(torch.tensor([ids])).logits[0]
    for logits in found:
        assert relative_error(logits, rounded) < 1e-2
        assert relative_error(logits, exact) < 1e-5

    batch = batches.build([batches.Span(ids[-1:], len(ids) - 1, list(range(1, 8)))], loaded.block_size, CPU.device)
    with torch.inference_mode():
        hidden = loaded.model.embed(batch.input_ids, None)
        replay, out, _ = ops.capture(lambda: loaded.model.logits(loaded.model(batch, hidden)))
        out.zero_()
        replay()
    assert relative_error(out[0], exact[-1]) < 1e-5


@every
@cases("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
def test_quantize_reads_it(name: str, scheme: Scheme, tmp_path: Path, load_model: LoadModel) -> None:
    quantize_checkpoint(DATA / name, tmp_path / "out", QuantRules(scheme), say=lambda line: None, requantize_int4=True)
    old, new = weights(DATA / name), weights(tmp_path / "out")
    kept = SCHEMES[name] is scheme
    for module, w in old.items():
        assert torch.equal(new[module], w) if kept else relative_error(new[module], w) < 0.05
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} <= {"weight", "weight_scale", "k_scale", "v_scale"}
    if kept:
        stored = load_file(DATA / name / "model.safetensors")
        for key in (key for key in stored if key.endswith("_proj.weight")):
            assert torch.equal(tensors[key].view(torch.uint8), stored[key].view(torch.uint8))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert bool(config["quantization_config"]["kv_cache_scheme"]) == (name == "llm_compressor_fp8")
    before, after = (load_model(path, on=CPU).model.attention_layers()[0].k_scale for path in (DATA / name, tmp_path / "out"))
    assert before == after
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# --- what is refused before loading -----------------------------------------------------

CT = dict(quant_method="compressed-tensors", format="pack-quantized")


def group(**args: Any) -> dict[str, Any]:
    return CT | dict(config_groups={"group_0": dict(targets=["Linear"], weights=args)})


@cases(
    ("quantization", "part"),
    [
        (dict(quant_method="awq", bits=4), "'awq'"),
        (dict(quant_method="gptq"), "'gptq'"),
        (dict(quant_method="bitsandbytes"), "'bitsandbytes'"),
        (dict(quant_method="mxfp4"), "'mxfp4'"),
        (dict(bits=4), "'None'"),
        (dict(quant_method="fp8", weight_block_size=[64, 128]), "[64, 128]"),
        (dict(quant_method="fp8", fmt="e5m2"), "'e5m2'"),
        (group(type="int", num_bits=8), "int of 8 bits"),
        (group(type="float", num_bits=4), "float of 4 bits"),
        (group(type="int", num_bits=4, symmetric=False), "zero points"),
        (group(type="float", num_bits=8, strategy="block", block_structure=[64, 64]), "[64, 64]"),
        (group(type="float", num_bits=8, strategy="block", block_structure="64x64"), "64x64"),
        (CT | dict(sparsity_config=dict(format="sparse-24-bitmask")), "sparse-24-bitmask"),
        (dict(quant_method="modelopt", quant_algo="NVFP4"), "'NVFP4'"),
        (dict(quant_method="modelopt", quantization=dict(quant_algo="nvfp4")), "'nvfp4'"),
        (dict(quant_method="modelopt", quantization=dict(quant_algo="MIXED_PRECISION")), "'MIXED_PRECISION'"),
        (dict(producer=dict(name="modelopt"), quantization=dict(quant_algo="W4A16_AWQ")), "'W4A16_AWQ'"),
        (dict(quant_method="quark", global_quant_config=dict(weight=dict(dtype="fp4"))), "'fp4'"),
        (dict(quant_method="quark", layer_quant_config={"a": dict(weight=[dict(dtype="int4")])}), "'int4'"),
    ],
    ids=str,
)
@cases("place", ["quantization_config", "compression_config", "text_config"])
def test_other_formats_are_refused(quantization: dict[str, Any], part: str, place: str) -> None:
    config = {place: {"quantization_config": quantization} if place == "text_config" else quantization}
    with pytest.raises(OctavoError) as raised:
        check_format(config)
    assert part in str(raised.value)
    assert "which Octavo does not read" in str(raised.value)
    assert str(raised.value).endswith(".")


@cases(
    "wrong",
    [
        [dict(quant_method="awq")], "fp8", 8, True, [], "", 0, dict(quant_method="quark", layer_quant_config=["a"]),
        dict(quant_method="compressed-tensors", sparsity_config=[1]), CT | dict(config_groups={"group_0": dict(weights=[8])}),
    ],
    ids=str,
)  # fmt: skip
@cases("place", ["quantization_config", "compression_config", "text_config"])
def test_what_is_no_object_is_refused(wrong: Any, place: str) -> None:
    """It would be taken for no quantization at all."""
    config = {place: {"quantization_config": wrong} if place == "text_config" else wrong}
    key = "quantization_config" if place == "text_config" else place
    told = "a field of the wrong type" if isinstance(wrong, dict) else f"{key} must be an object, not {json.dumps(wrong)};"
    with pytest.raises(OctavoError, match=re.escape(told)):
        check_format(config)
    check_format({place: {} if place == "text_config" else None})


def test_a_config_file_of_modelopts_own(tmp_path: Path) -> None:
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}))
    check_format({}, tmp_path)
    path.write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(OctavoError, match="'W4A8_AWQ'"):
        check_format({}, tmp_path)
    path.write_text("[]")
    with pytest.raises(OctavoError, match=r"hf_quant_config\.json is not"):
        check_format({}, tmp_path)


@cases(
    "quantization",
    [
        None,
        dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128]),
        dict(quant_method="fp8", activation_scheme="static"),
        dict(quant_method="fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=["lm_head"]),
        group(type="int", num_bits=4, symmetric=True, strategy="group", group_size=32),
        group(type="float", num_bits=8, strategy="block", block_structure=[128, 128]),
        group(type="float", num_bits=8, strategy="block", block_structure="128x128"),
    ],
    ids=str,
)
def test_known_formats_are_not_refused(quantization: dict[str, Any] | None) -> None:
    check_format({"model_type": "llama", "quantization_config": quantization})
    check_format({"text_config": {"quantization_config": quantization}, "vision_config": {}})
