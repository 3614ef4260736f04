"""Checkpoints whose tensors have other names than transformers gives them: read as they are meant, or said what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import COMMON, LoadModel, relative_error, tokens
from safetensors.torch import load_file, save_file
from tools.planner import plan_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from octavo.cli import main
from octavo.errors import OctavoError
from octavo.models import MODEL_TYPES
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Scheme, quantize
from octavo.tools.plan.explain import refusals
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.names import TEXT_MODELS

State = dict[str, Tensor]
NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "DistributedDataParallel": (lambda name: f"module.{name}", "without 'module.'"),
    "torch.compile within it": (lambda name: f"module._orig_mod.{name}", "without 'module.', without '_orig_mod.'"),
    "peft": (lambda name: f"base_model.model.{name}", "without 'base_model.model.'"),
    "the base model alone": (lambda name: name.removeprefix("model."), "with 'model.' before them"),
    "the text model of a multimodal one": (lambda name: f"language_model.{name}", "with 'model.' for 'language_model.model.'"),
    "the same, of transformers 5": (
        lambda name: name.replace("model.", "model.language_model."), "with 'model.' for 'model.language_model.'",
    ),
}  # fmt: skip


def save(directory: Path, state: State) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors", {"format": "pt"})
    return directory


def saved(directory: Path, model: PreTrainedModel) -> State:
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**COMMON | changes)).eval()


def logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0]
    return found


@cases("kind", NAMES)
def test_names_that_leave_no_doubt(kind: str, tmp_path: Path, load_model: LoadModel) -> None:
    rename, noted = NAMES[kind]
    model, ids = llama(), tokens(20)
    save(tmp_path, {rename(name): tensor for name, tensor in saved(tmp_path, model).items()})
    assert Checkpoint(tmp_path).renamed == noted
    assert relative_error(load_model(tmp_path).logits(ids), logits(model, ids)) < 1e-5
    assert refusals(plan_of(str(tmp_path), "--accelerator", "cpu")) == []
    assert main(["quantize", str(tmp_path), "-o", str(out := tmp_path / "out")]) == 0
    assert "model.layers.0.mlp.down_proj.weight_scale" in load_file(out / "model.safetensors")


def test_models_of_other_architectures_keep_their_names(tmp_path: Path) -> None:
    """Phi-3's matrices are stacked in transformers, too: what is quantized of it must have the names that it is read by."""
    state = saved(tmp_path, llama())
    names = set(stacked(state))
    for model_type in ("phi3", "gemma3"):
        save(tmp_path, stacked(state))
        described = json.loads((tmp_path / "config.json").read_text()) | {"model_type": model_type}
        (tmp_path / "config.json").write_text(json.dumps(described))
        assert Checkpoint(tmp_path).tensors.keys() == names
    save(tmp_path, {name.removeprefix("model."): tensor for name, tensor in state.items()})
    assert Checkpoint(tmp_path).tensors.keys() == {name.removeprefix("model.") for name in state}
    assert set(MODEL_TYPES) - set(TEXT_MODELS) == {"qwen3_vl", "qwen3_vl_moe", "kimi_k25"}


def test_a_tied_matrix_may_be_stored_as_the_head(tmp_path: Path, load_model: LoadModel) -> None:
    model, ids = llama(tie_word_embeddings=True), tokens(20)
    state = saved(tmp_path, model)
    save(tmp_path, {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in state.items()})
    assert relative_error(load_model(tmp_path).logits(ids), logits(model, ids)) < 1e-5


def test_the_same_weights_in_mistrals_own_files(tmp_path: Path, load_model: LoadModel) -> None:
    """Beside transformers' files, in a directory whose index was not downloaded."""
    model, ids = llama(), tokens(20)
    state = saved(tmp_path, model)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(4, 4)}, tmp_path / "consolidated.safetensors")
    assert relative_error(load_model(tmp_path).logits(ids), logits(model, ids)) < 1e-5
    assert len(Checkpoint(tmp_path).tensors) == len(state)


def stacked(state: State) -> State:
    """As vLLM's layers are called, and Phi-3 stores them: rows of the parts one behind the other."""
    out = {}
    for name, tensor in state.items():
        module, _, end = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        parts = {"q_proj": ("qkv_proj", "qkv"), "gate_proj": ("gate_up_proj", ("gate", "up"))}.get(last)
        if parts:
            rows = [state[f"{parent}.{part}_proj.{end}"] for part in parts[1]]
            out[f"{parent}.{parts[0]}.{end}"] = torch.cat(rows) if tensor.numel() > 1 else tensor
        elif last not in ("k_proj", "v_proj", "up_proj"):
            out[name] = tensor
    return out


@cases("scheme", [None, FP8_PER_CHANNEL, FP8_PER_TENSOR, FP8_BLOCK], ids=str)
def test_stacked_matrices(scheme: Scheme | None, tmp_path: Path, load_model: LoadModel) -> None:
    """The logits are those of the same codes stored apart, and of transformers where there are none. With biases."""
    sizes = dict(hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**COMMON | sizes)).eval()
    ids, state = tokens(20), saved(tmp_path, model)
    for name in [name for name in state if scheme and name.endswith("_proj.weight")]:
        q = quantize(state[name], scheme)
        assert q.scale is not None
        one = scheme is FP8_PER_TENSOR
        state |= {name: q.data, f"{name}_scale": torch.tensor(1e-3) if one else q.scale}
    save(tmp_path, state)
    apart = load_model(tmp_path).logits(ids)
    save(tmp_path, stacked(state))
    assert torch.equal(load_model(tmp_path).logits(ids), apart)
    assert "taken apart" in Checkpoint(tmp_path).renamed
    if scheme is None:
        assert relative_error(apart, logits(model, ids)) < 1e-5


def without_rows(state: State) -> State:
    return {name: tensor[:-1] if "qkv_proj.weight" in name else tensor for name, tensor in stacked(state).items()}


def ends(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def tiles(state: State) -> State:
    out = stacked(state)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    rows, columns = out[name].shape
    return out | {f"{name}_scale_inv": torch.ones(-(-rows // 128), -(-columns // 128))}


OTHERS: dict[str, tuple[Callable[[State], State], str]] = {
    "stacked, of another size": (without_rows, r"stacks queries, keys and values in .*qkv_proj\.weight, in an order or of a"),
    "Baichuan's": (
        lambda state: ends("qkv_proj", "W_pack")(stacked(state)),
        r"W_pack\.weight, .* store q_proj, k_proj and v_pr",
    ),
    "a tile of two parts": (tiles, r"gate_up_proj\.weight_scale_inv has shape \[2, 1\], .*; store gate_proj, up_proj apart"),
    "AWQ, GPTQ": (ends("q_proj.weight", "q_proj.qweight"), r"q_proj is in the packed form of AWQ or GPTQ, .* take one in BF16"),
    "torchao": (ends("q_proj.weight", "q_proj._weight_qdata"), r"q_proj is in torchao's form"),
    "an adapter's base": (ends("q_proj.weight", "q_proj.base_layer.weight"), "is the base of an adapter of peft's, .* merge"),
    "Meta's own": (ends("model.embed_tokens", "tok_embeddings"), "another layout than Hugging Face's .it has tok_embeddings"),
    "a prefix of nobody": (ends("model.", "backbone.model."), r"but has backbone\.model\.embed_tokens\.weight: its names have"),
    "nothing like it": (lambda state: {"a": torch.ones(1)}, r"no tensor model\.embed_tokens\.weight, which .* is it complete"),
}


@cases("kind", OTHERS)
def test_what_has_other_names_is_said(kind: str, tmp_path: Path, load_model: LoadModel) -> None:
    change, told = OTHERS[kind]
    save(tmp_path, change(saved(tmp_path, llama(intermediate_size=72))))
    with pytest.raises(OctavoError, match=told) as raised:
        load_model(tmp_path)
    assert str(raised.value)[-1] in ".?"
