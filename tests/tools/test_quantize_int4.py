"""`octavo quantize` of checkpoints that have INT4 beside BF16: Kimi-K2.5 and Kimi-K2-Thinking."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LoadModel, tokens
from models.test_kimi import kimi, write
from models.test_moe_quantized import in_bytes
from models.test_quantized import CPU
from safetensors.torch import load_file, save_file
from tools.planner import plan_of
from tools.test_quantize import assert_sentence, dequantized, run, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, DeepseekV3ForCausalLM, Kimi_K25ForConditionalGeneration

from octavo import LLM, SamplingParams
from octavo.cli import main
from octavo.config import EngineConfig
from octavo.engine.runner import ModelRunner
from octavo.errors import OctavoError
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Scheme, dequantize, quantize
from octavo.quant.checks import quantization_configs
from octavo.tools.plan.explain import refusals
from octavo.weights.load_report import role_of

K2, K25 = "kimi_k2", "kimi_k25"
FUSED = re.compile(r"vision_tower.*attn\.[qkv]_proj\.weight")  # transformers' names for parts of the hub's wqkv
both = pytest.mark.parametrize("model_type", [K2, K25])


def checkpoint(path: Path, model_type: str) -> Any:
    """Of K2.5, or of K2-Thinking: the same text, under its own names, config.json flat. transformers' model of its values."""
    model = kimi()
    write(path, model, int4=True)
    tensors = load_file(path / "model.safetensors")
    if model_type == K2:
        config = json.loads((path / "config.json").read_text())["text_config"] | dict(model_type=K2, tie_word_embeddings=False)
        (path / "config.json").write_text(json.dumps(config))
        text = {n.removeprefix("language_model."): t for n, t in tensors.items() if n.startswith("language_model.")}
        save_file(text, path / "model.safetensors", {"format": "pt"})
    return model


def is_linear(name: str) -> bool:
    """Of a weight that becomes FP8."""
    return re.search(r"(_proj|_proj_with_mqa|wqkv|wo|mlp\.fc[01]|mm_projector\.proj\.[02])\.weight$", name) is not None


LINEARS = {K2: 21, K25: 21 + 2 * 4 + 2}  # of which the tower's and its projector's


@both
@pytest.mark.parametrize("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
def test_int4_stays_and_the_rest_becomes_fp8(scheme: Scheme, model_type: str, tmp_path: Path) -> None:
    """Codes bit for bit, bytes as counted from the shapes; what is said names both."""
    checkpoint(tmp_path / "model", model_type)
    said = "\n".join(run(tmp_path / "model", tmp_path / "out", scheme))
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    packed = 0
    for name, w in before.items():
        if is_linear(name) and "kv_b_proj" not in name:
            expected = quantize(w, scheme)
            assert in_bytes(after.pop(name)) == in_bytes(expected.data), name
            assert expected.scale is not None
            assert torch.equal(
                after.pop(f"{name}_scale").flatten(), expected.scale.flatten()[: 1 if scheme is FP8_PER_TENSOR else None]
            )
            continue
        packed += name.endswith("_packed")
        assert in_bytes(after.pop(name)) == in_bytes(w), name
    assert not after
    assert packed == 48
    assert f"{LINEARS[model_type]} matrices to " in said
    assert "48 matrices are stored in INT4 and stay so, bit for bit: " in said
    assert "rounded a second time" not in said


@dequantized
@both
def test_what_is_written_is_read_by_transformers_and_says_what_it_is(model_type: str, tmp_path: Path) -> None:
    """One description, at the top, of two formats; octavo plan has the same bytes of it by config.json alone."""
    model = checkpoint(tmp_path / "model", model_type)
    run(tmp_path / "model", out := tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (described,) = quantization_configs(config)
    assert config["quantization_config"] == described
    assert described["format"] == "mixed-precision"
    fp8, int4 = described["config_groups"].values()
    assert (fp8["format"], fp8["targets"]) == ("float-quantized", ["Linear"])
    assert (int4["format"], int4["weights"]["group_size"]) == ("pack-quantized", 32)

    words = ("--accelerator", "h200", "--kv-cache-dtype", "auto")
    by_headers, by_config = (plan_of(path, *words) for path in (str(out), str(out / "config.json")))
    assert refusals(by_headers) == refusals(by_config) == []
    assert by_headers.asked.components == by_config.asked.components
    forms = {(o.component, o.form) for o in by_config.question.subject.base.operands if o.quantized}
    parts = ["attention", "mlp", "shared experts", *(["vision"] if model_type == K25 else [])]
    assert forms == {("experts", "int4"), *((part, "ptpc_fp8") for part in parts)}

    if model_type == K2:  # of which transformers has the class under another name
        (out / "config.json").write_text(json.dumps(config | dict(model_type="deepseek_v3")))
    family: Any = DeepseekV3ForCausalLM if model_type == K2 else Kimi_K25ForConditionalGeneration
    theirs, info = family.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert all(map(FUSED.search, info["unexpected_keys"])), "it takes codes of a fused matrix apart, and not its scales"
    assert not info["missing_keys"]
    found = {name.replace("model.language_model.", "model."): w for name, w in theirs.state_dict().items()}
    seen = 0
    for full, w in model.state_dict().items():
        if FUSED.search(full) or (model_type == K2 and role_of(full) == "vision"):
            continue
        name = full.replace("model.language_model.", "model.")
        of_tower = re.search(r"vision_tower\..*(attn\.proj|fc[12])\.weight$|mm_projector\..*_proj\.weight$", full)
        is_fp8 = (is_linear(name) or of_tower is not None) and "kv_b_proj" not in name
        expected = dequantize(quantize(w, FP8_PER_CHANNEL)) if is_fp8 else w
        assert torch.equal(found[name], expected.float()), name
        seen += is_fp8
    assert seen == LINEARS[model_type] - (2 if model_type == K25 else 0)


@both
def test_tokens_are_those_of_the_start_that_quantizes(model_type: str, tmp_path: Path) -> None:
    """Offline, online, and saved by an online start, whose files are the same."""
    checkpoint(tmp_path / "model", model_type)
    run(tmp_path / "model", tmp_path / "out")
    how: dict[str, Any] = dict(device="cpu", threads=1, cpu_kv_cache_gib=0.05)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    online = dict(quantization="ptpc_fp8")
    cases: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path / "model", online),
        (tmp_path / "out", {}),
        (tmp_path / "model", online | {"save_quantized": str(tmp_path / "saved")}),
    ]
    made, told = [], []
    for path, more in cases:
        llm = LLM(path, **how, **more)
        made.append(llm.generate([tokens(30)], params, use_tqdm=False)[0].outputs[0].token_ids)
        told.append([line for line in llm.info.report if line.startswith("  ")])
    assert made[0] == made[1] == made[2]
    assert told[0] == told[1] == told[2]
    assert len(set(made[0])) > 3
    written = [tensors_of(tmp_path / name) for name in ("out", "saved")]
    assert written[0].keys() == written[1].keys()
    assert all(in_bytes(w) == in_bytes(written[1][name]) for name, w in written[0].items())


@both
def test_int4_is_requantized_where_that_is_asked_for(
    model_type: str, tmp_path: Path, load_model: LoadModel, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "model", model_type)
    words = [str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--scheme", "ptpc_fp8", "--requantize-int4"]
    assert main(["quantize", *words]) == 0
    assert "48 matrices are stored in INT4 and are rounded a second time" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [entry["format"] for entry in quantization_configs(config)] == ["float-quantized"]
    groups = load_model(tmp_path / "out", on=CPU).loader.report.groups
    assert ("experts", "ptpc_fp8") in groups
    assert not [scheme for _, scheme in groups if "int4" in scheme]
    assert main(["quantize", *words[:-1]]) == 1  # another job than the one that the directory holds
    assert "another directory" in capsys.readouterr().err


W4A16 = Path(__file__).parents[1] / "data/formats/llm_compressor_w4a16"


def test_a_checkpoint_of_int4_alone_has_nothing_to_quantize(tmp_path: Path) -> None:
    with pytest.raises(OctavoError) as raised:
        run(W4A16, tmp_path / "out")
    assert_sentence(raised.value, "is stored in INT4, which stays as it is", "--requantize-int4")
    assert not (tmp_path / "out").exists()


def test_modules_of_a_kind_of_which_one_is_bf16_are_named_one_by_one(tmp_path: Path) -> None:
    """A pattern would be of all of them."""
    made = shutil.copytree(W4A16, tmp_path / "model")
    tensors = load_file(made / "model.safetensors")
    kinds = {name.removesuffix(".weight_packed") for name in tensors if name.endswith("_packed")}
    first, *_ = sorted(name for name in kinds if name.endswith(".down_proj"))
    shape = tensors.pop(f"{first}.weight_shape").tolist()
    for end in ("weight_packed", "weight_scale"):
        del tensors[f"{first}.{end}"]
    tensors[f"{first}.weight"] = torch.randn(shape).bfloat16()
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    run(made, tmp_path / "out")
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    targets = [name for group in list(groups.values())[1:] for name in group["targets"]]
    assert not [name for name in targets if name.startswith("re:") and "down_proj" in name]
    assert {name for name in targets if "down_proj" in name} == {n for n in kinds if n.endswith(".down_proj")} - {first}
    assert any(name.startswith("re:") for name in targets)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


Change = Callable[[dict[str, Any], dict[str, Tensor], str], object]


def weights(**changes: Any) -> Change:
    """Another description of the weights in config.json."""
    return lambda described, tensors, at: described["config_groups"]["group_0"]["weights"].update(changes)


def with_tensor(end: str, tensor: Tensor) -> Change:
    return lambda described, tensors, at: tensors.update({f"{at}.{end}": tensor})


FAULTS: dict[str, Change] = {
    "is stored as int of 2 bits, which Octavo does not read": weights(num_bits=2),
    "is stored as int of 3 bits, which Octavo does not read": weights(num_bits=3),
    "is stored as int of 8 bits, which Octavo does not read": weights(num_bits=8),
    "is stored as float of 4 bits, which Octavo does not read": weights(type="float"),
    "is stored with zero points, which Octavo does not read": weights(symmetric=False),
    "is stored with reordered columns (actorder 'group'), which": weights(actorder="group"),
    "is stored as packed INT4 with zero points or reordered": with_tensor("weight_zero_point", torch.zeros(16, 2).int()),
    "INT4 with zero points or reordered columns": with_tensor("weight_g_idx", torch.zeros(64).int()),
    "8 packed words and 3 scales a row do not make INT4 rows of 64": with_tensor("weight_scale", torch.ones(128, 3).bfloat16()),
    "8 packed words and 0 scales a row do not make": with_tensor("weight_scale", torch.ones(128, 0).bfloat16()),
    "with scales of shape [128]; Octavo reads rows": with_tensor("weight_scale", torch.ones(128).bfloat16()),
}


@pytest.mark.parametrize("said", FAULTS)
@both
def test_other_int4_is_refused_in_one_sentence_by_everyone(model_type: str, said: str, tmp_path: Path) -> None:
    """The engine, octavo plan and octavo quantize have the same words, whether or not the description is nested."""
    checkpoint(tmp_path / "model", model_type)
    config, tensors = json.loads((tmp_path / "model/config.json").read_text()), load_file(tmp_path / "model/model.safetensors")
    described = config.get("text_config", config)["quantization_config"]
    at = next(name.removesuffix(".weight_packed") for name in sorted(tensors) if name.endswith("0.gate_proj.weight_packed"))
    FAULTS[said](described, tensors, at)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    told = []
    for start in (
        lambda: ModelRunner(EngineConfig(model=str(tmp_path / "model"), device="cpu", cpu_kv_cache_gib=0.02)),
        lambda: run(tmp_path / "model", tmp_path / "out"),
    ):
        with pytest.raises(OctavoError) as raised:
            start()
        assert_sentence(raised.value, said)
        told.append(str(raised.value))
    assert told[0] == told[1]
    assert told[0] in refusals(plan_of(str(tmp_path / "model"), "--accelerator", "cpu"))
    assert not (tmp_path / "out").exists()
