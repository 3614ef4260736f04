"""Quantized checkpoints of models with MLA: stored codes kept bit for bit on every rank, what is decoded decoded exactly, what
is not needed passed over, and what `octavo quantize` makes of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import cases
from conftest import Loaded, LoadModel, relative_error, tokens
from models.test_logits import deepseek_v32, glm_moe_dsa, randomize
from models.test_moe_quantized import STORED, Stacks, in_bytes, powers_of_two
from models.test_quantized import CPU, HF_BLOCK, Watch
from quant.float64 import array
from safetensors.torch import load_file, save_file
from tools.test_quantize import dequantized, tensors_of
from tools.test_quantize import run as quantize_to
from tools.test_quantize_experts import stacked
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from octavo.distributed import TensorParallel
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, QTensor, QuantRules, Scheme, dequantize, quantize

# Tiles of 128 that split over four ranks, and rows of kv_a_proj_with_mqa that no tiles divide, as the published models have it.
WIDE = dict(
    num_hidden_layers=2, hidden_size=256, intermediate_size=512, moe_intermediate_size=512, num_attention_heads=8,
    num_key_value_heads=8, n_routed_experts=4, n_group=2, topk_group=1, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64,
    qk_rope_head_dim=64, v_head_dim=64, index_head_dim=128,
)  # fmt: skip
DENSE = ("embed_tokens", "lm_head", ".gate.", "weights_proj")  # the matrices that no such checkpoint quantizes
STORED_IN_BYTES = STORED | {
    "block, ue8m0 in bytes": (
        HF_BLOCK | dict(scale_fmt="ue8m0"),
        lambda name, w: {
            n: t.view(torch.uint8) if n.endswith("_inv") else t for n, t in powers_of_two(torch.float8_e8m0fnu)(name, w).items()
        },
        FP8_BLOCK,
    )
}


def wide(path: Path, make: Any = deepseek_v32, **changes: Any) -> Any:
    """A model whose weights BF16 holds exactly, written to `path`."""
    torch.manual_seed(3)
    model = randomize(make(attn_implementation="eager", **(WIDE | changes)))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    model.save_pretrained(path)
    return model


def rewrite(path: Path, config: dict[str, Any] | None = None, **tensors: Tensor) -> None:
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | (config or {})))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})


def store(path: Path, stored: str) -> dict[str, Tensor]:
    """Replaces every matrix that DeepSeek's checkpoints have in FP8 by codes and scales; gives all tensors."""
    config, make, _ = STORED_IN_BYTES[stored]
    tensors = load_file(path / "model.safetensors")
    for name in [n for n, t in tensors.items() if t.ndim == 2 and not any(word in n for word in DENSE)]:
        tensors |= make(name, tensors[name])
    rewrite(path, dict(quantization_config=config), **tensors)
    return tensors


def decoded(tensors: dict[str, Tensor], module: str) -> Tensor:
    """float64 of the codes times their scales."""
    codes = tensors[f"{module}.weight"]
    end = "weight_scale_inv" if f"{module}.weight_scale_inv" in tensors else "weight_scale"
    scale = tensors[f"{module}.{end}"]
    wide = array((scale.view(torch.float8_e8m0fnu) if scale.dtype is torch.uint8 else scale).float())
    if end == "weight_scale_inv":
        wide = np.repeat(np.repeat(wide, 128, 0)[: codes.shape[0]], 128, 1)[:, : codes.shape[1]]
    return torch.from_numpy(array(codes) * wide.reshape(-1, wide.shape[-1]))


def products(tensors: dict[str, Tensor], ranks: int, rank: int) -> Iterator[tuple[bytes, bytes]]:
    """Of each matrix that a rank multiplies by in FP8 its codes, and in FP32 what they stand for."""
    stacks = [(["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"], None), (["self_attn.q_b_proj"], 0)]
    stacks += [(["self_attn.indexer.wq_b"], None), (["self_attn.indexer.wk"], None), (["self_attn.o_proj"], 1)]
    mlps = {name.partition("gate_proj")[0] for name in tensors if ".mlp." in name and "gate_proj" in name}
    layers = sorted({name.partition(".self_attn")[0] for name in tensors if ".self_attn." in name})
    every = [([f"{layer}.{name}" for name in names], dim) for layer in layers for names, dim in stacks]
    for mlp in mlps:
        every += [([f"{mlp}gate_proj", f"{mlp}up_proj"], 0), ([f"{mlp}down_proj"], 1)]
    for modules, dim in every:
        codes = [tensors[f"{module}.weight"].view(torch.uint8) for module in modules]
        values = [decoded(tensors, module) for module in modules]
        own = [[t if dim is None else t.chunk(ranks, dim)[rank] for t in parts] for parts in (codes, values)]
        yield in_bytes(torch.cat(own[0])), in_bytes(torch.cat(own[1]).float())


@cases("stored", STORED_IN_BYTES)
def test_stored_codes_are_kept_and_kv_b_proj_is_decoded(
    stored: str, tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every FP8 matrix on each of 1, 2 and 4 ranks, whatever scheme is asked for; what makes keys and values in BF16: to the
    bit what its codes stand for where scales are powers of two, and that rounded once where they are not."""
    wide(tmp_path)
    tensors = store(tmp_path, stored)
    scheme = STORED_IN_BYTES[stored][2]
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            watch, stacks = Watch(monkeypatch), Stacks(monkeypatch)
            tp = TensorParallel(rank, ranks)  # which exchanges nothing: codes are kept
            rules = QuantRules(FP8_PER_CHANNEL if scheme is FP8_BLOCK else FP8_BLOCK)
            loaded = load_model(tmp_path, dtype=torch.bfloat16, on=CPU, rules=rules, tp=tp)
            experts: list[QTensor] = [one.expert(e) for one in stacks.packed for e in range(4)]
            found = [q for q in watch.packed + experts if q.scheme.quantized]
            assert {q.scheme for q in found} == {scheme}
            bags = Counter((in_bytes(q.data[: q.shape[0], : q.shape[1]]), in_bytes(dequantize(q))) for q in found)
            assert bags == Counter(products(tensors, ranks, rank))
            for layer in range(2):
                module = f"model.layers.{layer}.self_attn"
                up = loaded.model.get_submodule(f"{module}.attn").up.flatten(0, 1)
                exact = decoded(tensors, f"{module}.kv_b_proj").chunk(ranks)[rank]
                assert up.dtype is torch.bfloat16
                assert in_bytes(up) == in_bytes(exact.float().bfloat16())
                assert torch.equal(up.double(), exact) == ("ue8m0" in stored)
            monkeypatch.undo()


def test_what_a_model_does_not_need_is_passed_over(tmp_path: Path, load_model: LoadModel) -> None:
    """The layer that predicts further tokens, and scales of caches of keys and values. Anything else is not."""
    wide(tmp_path)
    store(tmp_path, "block, ue8m0")
    plain = load_model(tmp_path, on=CPU)
    expected = plain.logits(tokens(20))
    tensors = load_file(tmp_path / "model.safetensors")
    last = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    last |= {f"model.layers.2.{n}": torch.ones(256) for n in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    last |= {
        "model.layers.2.eh_proj.weight": torch.ones(256, 512),
        "model.layers.2.shared_head.head.weight": torch.ones(256, 256),
    }
    at = "model.layers.0.self_attn."
    names = "k_scale", "v_scale", "kv_scale", "q_scale", "attn.k_scale", "kv_b_proj.output_scale", "kv_b_proj.input_scale"
    scales = {at + name: torch.tensor(0.5) for name in names}
    rewrite(tmp_path, None, **(tensors | last | scales))
    assert torch.equal(load_model(tmp_path, on=CPU).logits(tokens(20)), expected)
    rewrite(tmp_path, dict(num_nextn_predict_layers=0), **(tensors | last))
    with pytest.raises(Exception, match=r"does not have, the first is model\.layers\.2\."):
        load_model(tmp_path, on=CPU)


@pytest.mark.parametrize("make", [deepseek_v32, glm_moe_dsa], ids=lambda make: make.__name__)
def test_experts_stacked_or_one_by_one(make: Any, tmp_path: Path, load_model: LoadModel) -> None:
    changes = dict(indexer_types=["full", "shared"]) if make is glm_moe_dsa else {}
    model = wide(tmp_path / "model", make, **changes)
    expected = load_model(tmp_path / "model").logits(tokens(30))
    with torch.no_grad():
        assert relative_error(expected, model(torch.tensor([tokens(30)])).logits[0]) < 1e-4
    for turned in (False, True):
        other = stacked(tmp_path / "model", tmp_path / str(turned), "qwen3_moe", turned)
        assert any(name.endswith("experts.gate_up_proj") for name in load_file(other / "model.safetensors"))
        assert torch.equal(load_model(other).logits(tokens(30)), expected)


# --- octavo quantize ------------------------------------------------------------------------------------------------------


@dequantized
@pytest.mark.parametrize("scheme", [FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
def test_quantized_offline_is_as_quantized_online(scheme: Scheme, tmp_path: Path, load_model: LoadModel) -> None:
    """compressed-tensors that transformers reads; kv_b_proj and the indexer's weights stay, as online, so logits are equal."""
    wide(tmp_path / "model").bfloat16().save_pretrained(tmp_path / "model")
    quantize_to(tmp_path / "model", tmp_path / "out", scheme)
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    for name, w in before.items():
        if w.ndim < 2 or any(word in name for word in (*DENSE, "kv_b_proj")):
            assert in_bytes(after[name]) == in_bytes(w)
        else:
            assert in_bytes(after[name]) == in_bytes(quantize(w, scheme).data)
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert {f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("kv_b_proj", "indexer.weights_proj")} < set(ignored)
    online = load_model(tmp_path / "model", scheme).logits(tokens(40))
    assert torch.equal(load_model(tmp_path / "out").logits(tokens(40)), online)
    assert relative_error(online, load_model(tmp_path / "model").logits(tokens(40))) > 0.01
    if scheme is FP8_BLOCK:
        return  # transformers multiplies experts by scales of tiles as by scales of rows, so it reads none over 128 wide
    reader = CompressedTensorsConfig(dequantize=True)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=reader, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, w in theirs.state_dict().items():
        if name in before and before[name].ndim == 2:
            kept = any(word in name for word in (*DENSE, "kv_b_proj"))
            assert torch.equal(w, before[name].float() if kept else dequantize(quantize(before[name], scheme))), name


def test_stored_codes_of_kv_b_proj_stay_or_are_decoded(tmp_path: Path, load_model: LoadModel) -> None:
    """From DeepSeek's blocks to blocks, or to another scheme: the model has the same keys and values either way."""
    wide(tmp_path / "model")
    before = store(tmp_path / "model", "block, ue8m0 in FP32")
    name, held = "model.layers.1.self_attn.kv_b_proj", []
    for scheme in (FP8_BLOCK, FP8_PER_CHANNEL):
        quantize_to(tmp_path / "model", tmp_path / scheme.name, scheme)
        after = tensors_of(tmp_path / scheme.name)
        if scheme is FP8_BLOCK:
            assert in_bytes(after[f"{name}.weight"]) == in_bytes(before[f"{name}.weight"])
        else:
            assert f"{name}.weight_scale" not in after
            assert torch.equal(after[f"{name}.weight"].double(), decoded(before, name))
        loaded: Loaded = load_model(tmp_path / scheme.name, dtype=torch.bfloat16, on=CPU)
        held.append(loaded.model.get_submodule("model.layers.1.self_attn.attn").up)
    assert torch.equal(held[0], held[1])


def test_a_pattern_may_name_kv_b_proj(tmp_path: Path, load_model: LoadModel) -> None:
    """It is left as it is anyhow, but the pattern is no typing error."""
    wide(tmp_path / "model").bfloat16().save_pretrained(tmp_path / "model")
    patterns = ["kv_b_proj"]
    quantize_to(tmp_path / "model", tmp_path / "out", ignore=patterns)
    load_model(tmp_path / "model", rules=QuantRules(FP8_PER_CHANNEL, patterns))
