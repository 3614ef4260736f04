"""Kimi-K2.5's text as its hub stores it, below `language_model.`, config.json nested, routed experts in INT4."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from conftest import VOCAB, LoadModel, relative_error, tokens
from models.test_logits import MLA, MLA_YARN, randomize
from models.test_moe_quantized import Stacks
from models.test_quantized import BOUND, CPU, error, fake_quantize, logits, octavo_logits
from ranks import run_ranks
from safetensors.torch import save_file
from torch import Tensor
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration, PreTrainedModel

from octavo import LLM
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.models import build_model
from octavo.quant import BF16, FP8_PER_CHANNEL, QuantRules, dequantize
from octavo.quant.qtensor import int4_codes
from octavo.quant.stored_format import stored_format_of
from octavo.weights import DummySource, Loader
from octavo.weights.loader import WHOLE

# As the hub's file has it, within text_config: the list names no part of the tower, which is in BF16 all the same.
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
            },
        }
    },
}  # fmt: skip
TOWER = dict(
    patch_size=14, pos_emb_height=4, pos_emb_width=4, pos_emb_time=4, num_attention_heads=4, num_hidden_layers=2,
    hidden_size=32, intermediate_size=36, merge_kernel_size=[2, 2],
)  # fmt: skip
SIZES = MLA | dict(
    n_group=1, topk_group=1, routed_scaling_factor=2.827, rms_norm_eps=1e-5, moe_intermediate_size=128, hidden_size=64,
    rope_parameters=MLA_YARN | dict(rope_theta=50000.0), model_type="deepseek_v3",
)  # fmt: skip


def kimi(tower: Mapping[str, Any] = TOWER, **changes: Any) -> PreTrainedModel:
    """In FP32, of values that BF16 holds exactly."""
    torch.manual_seed(0)
    config = Kimi_K25Config(
        text_config=SIZES | changes, vision_config=tower, projection_hidden_size=32, image_token_id=250, video_token_id=251,
        vision_start_token_id=252, vision_end_token_id=253, tie_word_embeddings=False,
    )  # fmt: skip
    model = randomize(Kimi_K25ForConditionalGeneration(config))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    return model


def hub_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors under the hub's names: experts one by one, rows of the tower's queries and keys in the order of pairs."""
    found: dict[str, Tensor] = {}
    state = model.state_dict()
    for name, t in state.items():
        if name.startswith("model.vision_tower.") or name.startswith("model.mm_projector."):
            continue
        path = (
            f"language_model.{name}"
            if name.startswith("lm_head")
            else name.replace("model.language_model", "language_model.model")
        )
        for stacked, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            if path.endswith(f"experts.{stacked}"):
                for number, expert in enumerate(t):
                    at = path.removesuffix(stacked) + str(number)
                    found |= {f"{at}.{p}.weight": w for p, w in zip(parts, expert.chunk(len(parts)), strict=True)}
                break
        else:
            found[path] = t
    own, hub, heads = "model.vision_tower", "vision_tower", model.config.vision_config.num_attention_heads
    for end in ("weight", "bias"):
        found[f"{hub}.patch_embed.proj.{end}"] = state[f"{own}.patch_embed.proj.{end}"]
        found[f"{hub}.encoder.final_layernorm.{end}"] = state[f"{own}.final_layernorm.{end}"]
        for theirs, ours in (("pre_norm", "pre_norm"), ("in_proj", "proj.0"), ("out_proj", "proj.2")):
            found[f"mm_projector.{ours}.{end}"] = state[f"model.mm_projector.{theirs}.{end}"]
        for layer in range(TOWER["num_hidden_layers"]):  # type: ignore[call-overload]
            at, to = f"{own}.layers.{layer}", f"{hub}.encoder.blocks.{layer}"
            names = {"norm1": "norm0", "norm2": "norm1", "mlp.fc1": "mlp.fc0", "mlp.fc2": "mlp.fc1", "attn.proj": "wo"}
            found |= {f"{to}.{ours}.{end}": state[f"{at}.{theirs}.{end}"] for theirs, ours in names.items()}
            q, k, v = (state[f"{at}.attn.{one}_proj.{end}"] for one in "qkv")
            found[f"{to}.wqkv.{end}"] = torch.cat([_in_pairs(q, heads), _in_pairs(k, heads), v])
    found[f"{hub}.patch_embed.pos_emb.weight"] = state[f"{own}.patch_embed.pos_emb.position_embeddings"]
    return {name: t.clone().contiguous() for name, t in found.items()}


def _in_pairs(w: Tensor, heads: int) -> Tensor:
    """Rows of heads whose halves are rotated against each other, as rows of which neighbours are."""
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(path: Path, model: PreTrainedModel, *, int4: bool) -> dict[str, Tensor]:
    """The checkpoint as the hub has it. int4: routed experts are stored so, and `model` gets what their codes stand for."""
    if int4:
        with torch.no_grad():
            for layer in model.model.language_model.layers:
                if hasattr(layer.mlp, "experts"):
                    for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                        stack.copy_(_through_int4(stack))
    tensors = hub_tensors(model)
    config = json.loads(model.config.to_json_string(use_diff=False))
    text = config["text_config"] | dict(model_type="kimi_k2")
    if int4:
        for name in [n for n in tensors if ".experts." in n]:
            w, at = tensors.pop(name), name.removesuffix("weight")
            scale = _scales(w)
            codes = (w / scale.repeat_interleave(32, 1)).round().to(torch.int8)
            tensors |= {f"{at}weight_packed": pack_to_int32(codes, 4), f"{at}weight_scale": scale.bfloat16()}
            tensors[f"{at}weight_shape"] = torch.tensor(w.shape, dtype=torch.int32)
        text["quantization_config"] = INT4
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config | dict(text_config=text)))
    save_file({n: t.bfloat16() if t.is_floating_point() and "correction" not in n else t for n, t in tensors.items()},
              path / "model.safetensors", {"format": "pt"})  # fmt: skip
    return tensors


def _scales(w: Tensor) -> Tensor:
    """Powers of two: values that went through codes once go through them again unchanged."""
    return 2 ** (w.unflatten(-1, (-1, 32)).abs().amax(-1).clamp(min=1e-6) / 7).log2().ceil()


def _through_int4(w: Tensor) -> Tensor:
    scale = _scales(w).repeat_interleave(32, -1)
    return (w / scale).round().clamp(-7, 7) * scale


def check_ranks(path: Path, model: PreTrainedModel, load_model: LoadModel) -> None:
    """The logits of text are the model's on 1, 2 and 4 ranks, in uneven parts, of the checkpoint at `path`."""
    ids = tokens(40)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]

    def run(tp: TensorParallel) -> Tensor:
        return Vocabulary(VOCAB, tp).whole(load_model(path, tp=tp).logits(ids, (30, 1, 9)))

    for ranks in (1, 2, 4):
        for out in run_ranks(ranks, run):
            assert relative_error(out, expected) < 1e-4, ranks


@pytest.mark.parametrize("int4", [False, True], ids=["bf16", "int4 experts"])
def test_logits_equal_transformers_on_any_number_of_ranks(int4: bool, tmp_path: Path, load_model: LoadModel) -> None:
    model = kimi()
    write(tmp_path, model, int4=int4)
    check_ranks(tmp_path, model, load_model)


def test_codes_are_kept_bit_for_bit_and_the_tower_is_left_out(
    tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a scheme for the rest: 4.5 bits a value, as compressed-tensors' own unpacking has them."""
    tensors = write(tmp_path, kimi(), int4=True)
    values = 3 * 64 * 128 * 8 * 2
    for scheme, rest in ((QuantRules(), "bf16"), (QuantRules(FP8_PER_CHANNEL), "ptpc_fp8")):
        stacks = Stacks(monkeypatch)
        report = load_model(tmp_path, dtype=torch.bfloat16, on=CPU, rules=scheme).loader.report
        monkeypatch.undo()
        assert report.groups["experts", "int4"].stored == values * 9 // 16
        assert {(role, name) for role, name in report.groups if role in ("attention", "shared experts", "mlp")} >= {
            ("attention", rest), ("shared experts", rest), ("mlp", rest)
        }  # fmt: skip
        assert "29 tensor(s) vision_tower.* not loaded: what is served does not compute with them" in report.notes
        for layer, (gate_up, down) in zip((1, 2), zip(stacks.packed[::2], stacks.packed[1::2], strict=True), strict=True):
            for e in range(8):
                at = f"language_model.model.layers.{layer}.mlp.experts.{e}"
                for stack, names in ((gate_up, ("gate_proj", "up_proj")), (down, ("down_proj",))):
                    one = stack.expert(e)
                    packed = [(tensors[f"{at}.{n}.weight_packed"], tensors[f"{at}.{n}.weight_shape"]) for n in names]
                    theirs = torch.cat([unpack_from_int32(p, 4, torch.Size(shape.tolist())) for p, shape in packed])
                    n, k = theirs.shape
                    assert torch.equal(int4_codes(one.data)[:n, :k], theirs)
                    scales = torch.cat([tensors[f"{at}.{name}.weight_scale"] for name in names])
                    assert torch.equal(one.scale[:n, : k // 32].float(), scales.float())


def test_fp8_of_the_rest_is_what_float64_makes_of_it(tmp_path: Path, load_model: LoadModel) -> None:
    """With --quantization ptpc_fp8: linear layers but experts in FP8, experts as they are stored."""
    model = kimi()
    write(tmp_path, model, int4=True)
    dense = logits(model)
    fake_quantize(model, "ptpc_fp8", but=("lm_head", "kv_b_proj"))
    expected = logits(model)
    assert error(octavo_logits(load_model(tmp_path, FP8_PER_CHANNEL, on=CPU)), expected) < BOUND
    assert error(expected, dense) > 0.01


def test_random_weights_are_stored_as_config_json_says(tmp_path: Path) -> None:
    """`--load-format dummy` is the checkpoint in sizes and formats; its INT4 and FP8 values are as large as BF16 ones."""
    write(tmp_path, kimi(hidden_size=256, moe_intermediate_size=256), int4=True)
    reports = []
    for load_format in ("auto", "dummy"):
        llm = LLM(str(tmp_path), load_format=load_format, quantization="ptpc_fp8", device="cpu", cpu_kv_cache_gib=0.05)
        reports.append(llm._core.runner.report.groups)
    assert {key: (g.values, g.stored) for key, g in reports[0].items()} == {
        key: (g.values, g.stored) for key, g in reports[1].items()
    }
    config = json.loads((tmp_path / "config.json").read_text())
    for quantization in (
        config["text_config"]["quantization_config"],
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ):
        source = DummySource(stored_format_of({"quantization_config": quantization}))
        loader = Loader(source, CPU, QuantRules(), torch.bfloat16)
        loader.declare(["x"], [(256, 512)])
        found = loader.stacked(["x"], [(256, 512)], [WHOLE], BF16)
        assert found.scheme.quantized
        assert dequantize(found).std().item() == pytest.approx(source.std, rel=0.02)


def test_config_json_without_its_text_is_refused() -> None:
    with pytest.raises(OctavoError, match=r"config\.json has no text_config, which this architecture needs"):
        build_model({"model_type": "kimi_k25", "vision_config": TOWER, "hidden_size": 64}, TensorParallel(), None)
