"""What the engine refuses `octavo plan` refuses, in the same words; what the engine loads takes the bytes that were planned."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from safetensors.torch import save_file
from tools.planner import TINY_LLAMA, Tensors, checkpoint, llama_tensors, plan_of, write_headers

from octavo.cli import engine_config, make_parser
from octavo.config import EngineConfig
from octavo.engine import loading
from octavo.engine.runner import ModelRunner
from octavo.errors import OctavoError
from octavo.platform import detect
from octavo.quant import SCHEMES, QuantRules
from octavo.tools.plan import plan as tool
from octavo.tools.plan.explain import refusals
from octavo.tools.quantize.quantize import quantize_checkpoint
from octavo.weights import DummySource
from octavo.weights.checkpoint import Checkpoint

INT4 = dict(num_bits=4, type="int", strategy="group", group_size=32)


def ct(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": dict(targets=["Linear"], weights=weights)}
    return dict(quantization_config=dict(quant_method="compressed-tensors", config_groups=groups))


def put(scheme: str, **tensors: tuple[str, tuple[int, ...]] | None) -> Tensors:
    """A checkpoint with some tensors put in, or left out (None). `__` stands for a dot."""
    out = llama_tensors(scheme)
    for name, entry in tensors.items():
        full = name.replace("__", ".")
        out.pop(full, None)
        if entry is not None:
            out[full] = entry
    return out


Q, NORM, L0 = "model__layers__0__self_attn__q_proj", "model__norm", "model__layers__0"
# What is wrong: of config.json, of the tensors, of the options; and what the sentence says.
WRONG: dict[str, tuple[dict[str, Any], Tensors | None, list[str], str]] = {
    "longrope": (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), None, [], "asks for rope_type 'longrope'"),
    "rope without a factor": (dict(rope_scaling=dict(rope_type="linear")), None, [], "needs factor"),
    "gelu": (dict(hidden_act="gelu"), None, [], "asks for hidden_act 'gelu'"),
    "5 of 32 KV heads": (dict(num_attention_heads=32, num_key_value_heads=5), None, [], "a multiple of num_key_value_heads"),
    "odd head_dim": (dict(head_dim=63), None, [], "head_dim must be even"),
    "no hidden_size": (dict(hidden_size=None), None, [], "config.json has no hidden_size"),
    "another architecture": (dict(model_type="t5"), None, [], "does not serve model_type 't5' yet"),
    "tiles of 64": (dict(quantization_config=dict(quant_method="fp8", weight_block_size=[64, 64])), None, [], "of [64, 64]"),
    "AWQ": (dict(quantization_config=dict(quant_method="awq")), None, [], "quantized with 'awq'"),
    "asymmetric INT4": (ct(**INT4, symmetric=False), llama_tensors("int4"), [], "stored with zero points"),
    "zero points of INT4": ({}, put("int4", **{f"{Q}__weight_zero_point": ("I32", (8, 32))}), [], "with zero points"),
    "4-D scales of INT4": ({}, put("int4", **{f"{Q}__weight_scale": ("BF16", (256, 8, 1, 1))}), [], "[256, 8, 1, 1]"),
    "INT4 without scales": ({}, put("int4", **{f"{Q}__weight_scale": None}), [], "without a scale"),
    "NVFP4": (dict(quantization_config=dict(quant_method="modelopt", quant_algo="NVFP4")), None, [], "ModelOpt to 'NVFP4'"),
    "4-D scales": ({}, put("channel", **{f"{Q}__weight_scale": ("F32", (256, 1, 1, 1))}), [], "at most 2 dimensions"),
    "4-D scale for all": ({}, put("fp8", **{f"{Q}__weight_scale": ("F32", (1, 1, 1, 1))}), [], "at most 2 dimensions"),
    "odd scales": ({}, put("channel", **{f"{Q}__weight_scale": ("F32", (7, 1))}), [], "nor one for each of its channels"),
    "stray scale": ({}, put("fp8", **{f"{L0}__mlp__act__weight_scale": ("F32", ())}), [], "0.mlp.act.weight_scale"),
    "scale of a norm": ({}, put("fp8", **{f"{NORM}__weight_scale": ("F32", ())}), [], "model.norm.weight_scale"),
    "two scales": ({}, put("fp8", **{f"{Q}__weight_scale_inv": ("F32", ())}), [], "q_proj.weight_scale;"),
    "scale of a BF16 weight": ({}, put("bf16", **{f"{Q}__weight_scale": ("F32", ())}), [], "with a scale beside it"),
    "FP8 without a scale": ({}, put("fp8", **{f"{Q}__weight_scale": None}), [], "without a scale beside it"),
    "tensor missing": ({}, put("bf16", **{f"{NORM}__weight": None}), [], "has no tensor model.norm.weight"),
    "tensor of another shape": ({}, put("bf16", **{f"{NORM}__weight": ("BF16", (7,))}), [], "config.json makes it [256]"),
    "too long": ({}, None, ["--max-model-len", "4096"], "over the 2048 positions"),
    "no scheme for the head": ({}, llama_tensors(), ["--quantize-lm-head"], "needs a scheme"),
    "a pattern for nothing": ({}, None, ["-q", "fp8", "--quantization-ignore", "nothing"], "'nothing' matches no layer"),
    "no expression": ({}, None, ["-q", "fp8", "--quantization-ignore", "re:("], "is not a regular expression"),
    "no rounding of keys": (
        {}, llama_tensors(), ["--kv-cache-dtype", "fp8", "--kv-cache-rounding", "calibrated"], "needs key_rounding.octavo",
    ),
    "no room": ({}, None, ["--max-model-len", "2048", "--cpu-kv-cache-gib", "0.0001"], "lower --max-model-len"),
}  # fmt: skip


def planned(*words: str) -> list[str]:
    """Why `octavo plan` says that the engine would not start."""
    try:
        return refusals(plan_of(*words))
    except OctavoError as error:
        return [str(error)]


@cases("what", WRONG)
def test_what_the_engine_refuses(what: str, tmp_path: Path) -> None:
    config, tensors, words, part = WRONG[what]
    if tensors is None:
        (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | config))
        words = [*words, "--load-format", "dummy"]
    else:
        checkpoint(tmp_path, tensors, **config)
    line = [str(tmp_path), "--device", "cpu", "--kv-cache-dtype", "auto", *([] if "-q" in words else ["-q", "bf16"]), *words]
    args = make_parser("plan", tool.add_arguments).parse_args(line)
    with pytest.raises(OctavoError) as raised:
        ModelRunner(engine_config(args))
    sentence = str(raised.value)
    assert part in sentence
    assert sentence.endswith((".", "?"))
    assert sentence in planned(*line)


def test_the_cache_that_is_chosen_is_what_counts(tmp_path: Path) -> None:
    """Where none was asked for, the plan's command has one."""
    line = ["Llama-3.1-8B", "--accelerator", "h200", "--kv-cache-rounding", "calibrated"]
    assert plan_of(*line).asked.variant.kv == "fp8_e4m3"
    assert planned(*line) == []
    (sentence,) = planned(*line, "--kv-cache-dtype", "fp8_per_token_head")
    assert "is for an FP8 cache with one scale a layer or head, not for --kv-cache-dtype fp8_per_token_head" in sentence


def test_a_quantization_config_of_its_own_file(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, llama_tensors())
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(OctavoError, match="ModelOpt to 'NVFP4'") as raised:
        ModelRunner(EngineConfig(model=directory, device="cpu"))
    assert str(raised.value) in planned(directory, "--accelerator", "cpu")


SIZES: dict[str, Any] = dict(vocab_size=520, hidden_size=264, intermediate_size=300, head_dim=72)
MLA: dict[str, Any] = dict(
    num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=40, n_group=4, topk_group=2,
    first_k_dense_replace=1, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(mlp_bias=True, attention_bias=True),
    "mistral": dict(tie_word_embeddings=True),
    "qwen2": {},
    "qwen3": {},
    "deepseek_v3": MLA,
    "deepseek_v32": MLA | dict(index_n_heads=16, index_head_dim=16, index_topk=6),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory with a tiny random BF16 checkpoint of a model type, written by transformers."""
    made: dict[str, Path] = {}

    def write(model_type: str) -> Path:
        if model_type not in made:
            import transformers

            config = TINY_LLAMA | SIZES | MODELS[model_type] | {"model_type": model_type}
            made[model_type] = directory = tmp_path_factory.mktemp(model_type)
            (directory / "config.json").write_text(json.dumps(config))
            loaded = transformers.AutoConfig.from_pretrained(directory)
            model = transformers.AutoModelForCausalLM.from_config(loaded, dtype=torch.bfloat16)
            tied = "lm_head.weight" if config.get("tie_word_embeddings") else ""
            tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name != tied}
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return made[model_type]

    return write


@cases("model_type", MODELS)
@cases("scheme", ["bf16", "fp8", "ptpc_fp8", "fp8_block"])
@cases("how", ["while loading", "stored", "dummy"])
def test_a_rank_holds_the_bytes_that_were_planned(
    how: str, scheme: str, model_type: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    directory, words = written(model_type), ["-q", scheme]
    if how == "stored" and scheme != "bf16":
        quantize_checkpoint(directory, tmp_path / "out", QuantRules(SCHEMES[scheme]), say=lambda _: None)
        directory, words = tmp_path / "out", []
    words += ["--load-format", "dummy"] if how == "dummy" else []
    line = [str(directory), "--device", "cpu", "--kv-cache-dtype", "auto", "--cpu-kv-cache-gib", "0.05", *words]
    plan = plan_of(*line)
    runner = ModelRunner(engine_config(make_parser("plan", tool.add_arguments).parse_args(line)))
    walk = plan.question.subject.walk(plan.asked.variant, 1)
    of_roles: Counter[tuple[str, str]] = Counter()
    roles = {"embeddings": "embedding", "indexer": "attention"}
    for operand in walk.operands:
        of_roles[roles.get(operand.component, operand.component), operand.form.replace("float32", "bf16")] += operand.stored
    assert of_roles == Counter({key: group.stored for key, group in runner.report.groups.items()})
    assert plan.question.subject.base.total("values") == walk.total("values") == runner.report.total("values")
    assert plan.asked.fit is not None
    if runner.platform.widened_dtype is None and scheme != "bf16":  # where codes stay codes; BF16 may be laid out anew
        assert plan.asked.fit.weights == runner.report.total("held")
    assert plan.asked.fit.max_model_len == runner.max_model_len
    assert plan.asked.token_bytes == runner.bytes_per_token
    assert refusals(plan) == []


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32"])
def test_a_token_of_mla_takes_the_bytes_that_were_planned(model_type: str, tmp_path: Path) -> None:
    """And is refused in the same words."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | SIZES | MODELS[model_type] | {"model_type": model_type}))
    found = {}
    for dtype in ("bfloat16", "float32"):
        for kv in ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla", "fp8_e5m2", "fp8_per_token_head"):
            line = [str(tmp_path), "--device", "cpu", "--load-format", "dummy", "--cpu-kv-cache-gib", "0.05"]
            line += ["-q", "bf16", "--dtype", dtype, "--kv-cache-dtype", kv]
            config = engine_config(make_parser("plan", tool.add_arguments).parse_args(line))
            if kv in ("fp8_e5m2", "fp8_per_token_head"):
                with pytest.raises(OctavoError, match=f"{kv} is not for MLA models") as raised:
                    ModelRunner(config)
                assert planned(*line) == [str(raised.value)]
                continue
            with pytest.raises(OctavoError, match="--calculate-kv-scales has nothing to measure") as raised:
                ModelRunner(replace(config, calculate_kv_scales=True))
            assert planned(*line, "--calculate-kv-scales") == [str(raised.value)]
            plan, runner = plan_of(*line), ModelRunner(config)
            assert plan.asked.token_bytes == runner.bytes_per_token == found.setdefault((dtype, kv), runner.bytes_per_token)
            assert plan.asked.fit is not None
            assert plan.asked.fit.weights == runner.report.total("stored" if runner.platform.widened_dtype else "held")
            assert refusals(plan) == []
    is_sparse = model_type == "deepseek_v32"
    codes = 32 + 4 + 2 * 8 + is_sparse * (16 + 4)
    assert {found["bfloat16", kv] for kv in ("fp8", "fp8_e4m3", "fp8_ds_mla")} == {2 * codes}
    assert found["bfloat16", "auto"] == 2 * (codes if is_sparse else 2 * 40)
    assert found["float32", "auto"] == 2 * 4 * (40 + is_sparse * 16)


@pytest.mark.parametrize(("scheme", "fp8"), [("bf16", False), ("channel", True), ("block", True)])
def test_stored_codes_are_weighed_as_codes(scheme: str, fp8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of codes that fits is not refused for what it would take in BF16, before it is read."""
    seen: list[bool] = []
    monkeypatch.setattr(loading, "check_weights", lambda *_, fp8: seen.append(fp8))
    ModelRunner(EngineConfig(model=checkpoint(tmp_path, llama_tensors(scheme)), device="cpu", cpu_kv_cache_gib=0.05))
    assert seen == [fp8]


@pytest.mark.parametrize(("scheme", "described"), [("bf16", {}), ("int4", ct(**INT4))])
def test_dummy_weights_that_cannot_fit(
    scheme: str, described: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are weighed as those of files are, but for the scales, and refused before one is made."""
    write = tmp_path / "files"
    write.mkdir()
    files = Checkpoint(Path(checkpoint(write, llama_tensors(scheme), **described)))
    scales = sum(math.prod(t.shape) for name, t in files.tensors.items() if name.endswith("_scale") and len(t.shape) > 1)
    values, packed = files.matrix_values() - scales, files.packed_bytes()
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | described))
    widened = detect("cpu").widened_dtype
    itemsize = widened.itemsize if widened is not None else 2 if scheme == "bf16" else 1

    def start(free: int) -> str:
        """What the engine says of the directory, and the plan too."""
        monkeypatch.setattr("octavo.platform.host_memory", lambda: (free, free))
        monkeypatch.setattr("octavo.tools.plan.accelerators.memory", lambda: (free, free))
        line = [str(tmp_path), "--load-format", "dummy", "--device", "cpu", "--kv-cache-dtype", "auto", "-q", "bf16"]
        with pytest.raises(OctavoError, match="the weights alone would take") as raised:
            ModelRunner(engine_config(make_parser("plan", tool.add_arguments).parse_args(line)))
        if widened is None:
            assert str(raised.value) in planned(*line)
        return str(raised.value)

    monkeypatch.setattr(DummySource, "read", lambda *_: pytest.fail("a weight was made"))
    start(needed := itemsize * values + packed - 1)
    with pytest.raises(pytest.fail.Exception, match="a weight was made"):
        start(needed + 1)
    whole_groups = MLA | dict(model_type="deepseek_v3", moe_intermediate_size=64, q_lora_rank=64, v_head_dim=16)
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | whole_groups | described))
    start(1000)  # every expert counts, in both


FORMATS = sorted(path.parent for path in (Path(__file__).parents[1] / "data/formats").glob("*/config.json"))


@cases("directory", FORMATS, ids=lambda path: path.name)
def test_what_other_tools_wrote(directory: Path) -> None:
    line = [str(directory), "--device", "cpu", "--kv-cache-dtype", "auto", "--cpu-kv-cache-gib", "0.01", "-q", "bf16"]
    plan = plan_of(*line)
    runner = ModelRunner(engine_config(make_parser("plan", tool.add_arguments).parse_args(line)))
    assert refusals(plan) == []
    assert plan.question.subject.base.total("values") == runner.report.total("values")
    assert plan.asked.weights == runner.report.total("stored")


def test_int4_beside_bf16_in_one_stack(tmp_path: Path) -> None:
    """The engine decodes what it cannot stack; so does the plan."""
    tensors = put("int4", **{f"{Q}__{end}": None for end in ("weight_packed", "weight_scale", "weight_shape")})
    line = [checkpoint(tmp_path, tensors | {f"{Q.replace('__', '.')}.weight": ("BF16", (256, 256))}), "--device", "cpu"]
    operands = plan_of(*line).question.subject.base.operands
    assert [o.form for o in operands if o.component == "attention"][:3] == [
        "bf16",
        "int4",
        "int4",
    ]


def test_headers_of_experts_that_are_stacked(tmp_path: Path) -> None:
    """Either way round, as one tensor of three dimensions for all experts, they are the experts' parameters."""
    text = dict(TINY_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, model_type="qwen3_moe")
    single = plan_of(_moe(tmp_path / "one", text, None), "--accelerator", "h200").question.subject.base
    for name, turned in (("stacked", False), ("turned", True)):
        found = plan_of(_moe(tmp_path / name, text, turned), "--accelerator", "h200").question.subject.base
        assert found.problems == single.problems == []
        assert found.operands == single.operands


def _moe(directory: Path, config: dict[str, Any], turned: bool | None) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: t for name, t in llama_tensors().items() if ".mlp." not in name}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        tensors |= {f"{at}.self_attn.{n}_norm.weight": ("BF16", (64,)) for n in "qk"}
        tensors[f"{at}.mlp.gate.weight"] = ("BF16", (4, 256))
        if turned is None:
            shapes = {"gate_proj": (48, 256), "up_proj": (48, 256), "down_proj": (256, 48)}
            tensors |= {f"{at}.mlp.experts.{e}.{n}.weight": ("BF16", s) for e in range(4) for n, s in shapes.items()}
        else:
            up, down = ((4, 256, 96), (4, 48, 256)) if turned else ((4, 96, 256), (4, 256, 48))
            tensors |= {f"{at}.mlp.experts.gate_up_proj": ("BF16", up), f"{at}.mlp.experts.down_proj": ("BF16", down)}
    write_headers(directory / "model.safetensors", tensors)
    return str(directory)
