"""Quantized mixtures of experts: logits against fake quantization in transformers; stored codes kept bit for bit on every
rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import LoadModel
from models.test_logits import glm4_moe, minimax_m2, mixtral, qwen3_moe, randomize
from models.test_quantized import (
    BOUND,
    CPU,
    HF_BLOCK,
    SCHEMES,
    FakeQuantized,
    compressed_tensors,
    error,
    fake_quantize,
    logits,
    octavo_logits,
    scaled,
)
from quant.float64 import E4M3FN
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo import ops
from octavo.platform import Platform
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QTensor, QuantRules, Scheme

FAMILIES = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "glm4_moe": glm4_moe, "minimax_m2": minimax_m2}
NAMES = dict.fromkeys(FAMILIES, ("gate_proj", "up_proj", "down_proj")) | dict.fromkeys(
    ("mixtral", "minimax_m2"), ("w1", "w3", "w2")
)
Store = Callable[[str, Tensor], dict[str, Tensor]]
WIDE = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=64)


def tiny(path: Path, family: str, **changes: object) -> PreTrainedModel:
    """A model in FP32 whose weights BF16 holds exactly, in eager attention, written to `path`."""
    torch.manual_seed(3)
    model = randomize(FAMILIES[family](attn_implementation="eager", **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    model.save_pretrained(path)
    return model


def inner(family: str, size: int) -> dict[str, int]:
    """The intermediate size of an expert, under the family's name for it."""
    return {"intermediate_size" if family in ("mixtral", "minimax_m2") else "moe_intermediate_size": size}


class FakeExperts(nn.Module):
    """transformers' experts as linear layers whose weights and inputs go through FP8 and back, in float64."""

    def __init__(self, experts: Any, scheme: str):
        super().__init__()
        self.act_fn = experts.act_fn
        self.experts = [
            tuple(_fake(w, scheme) for w in (*gate_up.chunk(2), down))
            for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)
        ]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t, (numbers, own) in enumerate(zip(chosen.tolist(), weights, strict=True)):
            for number, weight in zip(numbers, own, strict=True):
                gate, up, down = self.experts[number]
                row = x[None, t : t + 1]
                out[t] += down(self.act_fn(gate(row)) * up(row))[0, 0] * weight
        return out


def _fake(w: Tensor, scheme: str) -> FakeQuantized:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = nn.Parameter(w)
    return FakeQuantized(linear, scheme, E4M3FN)


def fake_quantize_experts(model: PreTrainedModel, scheme: str) -> None:
    fake_quantize(model, scheme)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = FakeExperts(layer.mlp.experts, scheme)


@cases("scheme", SCHEMES, ids=lambda s: s.name)
@cases("family", FAMILIES)
def test_logits_equal_a_fake_quantized_model(family: str, scheme: Scheme, tmp_path: Path, load_model: LoadModel) -> None:
    model = tiny(tmp_path, family)
    dense = logits(model)
    fake_quantize_experts(model, scheme.name)
    out = octavo_logits(loaded := load_model(tmp_path, scheme, on=CPU))
    assert error(out, logits(model)) < BOUND
    assert error(out, dense) > 0.01
    groups = loaded.loader.report.groups
    assert ("experts", scheme.name) in groups
    assert ("experts", "bf16") not in groups
    assert [name for role, name in groups if role == "router"] == ["bf16"]


# --- stored codes ---------------------------------------------------------------------------------------------------------


class Stacks:
    """The stacks that reach `ops.pack_experts`, in the order of loading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.packed: list[QTensor] = []
        pack = ops.pack_experts

        def watched(q: QTensor, platform: Platform, *, owned: bool) -> ops.PackedStack:
            self.packed.append(q)  # and read later, so it is not the loader's to give away
            return pack(q, platform)

        monkeypatch.setattr(ops, "pack_experts", watched)


def of_library(strategy: str) -> Store:
    """What compressed-tensors, in which llm-compressor writes, makes of a weight."""
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy)

    def store(name: str, w: Tensor) -> dict[str, Tensor]:
        dims = (1,) if strategy == "channel" else (0, 1)
        low, high = w.amin(dims, keepdim=True), w.amax(dims, keepdim=True)
        scale, _ = calculate_qparams(low, high, args)
        scale = scale if strategy == "channel" else scale.view(1)
        made = FloatQuantizationCompressor.compress(
            {"weight": w, "weight_scale": scale}, QuantizationScheme(targets=["Linear"], weights=args)
        )
        return {name.removesuffix("weight") + end: t for end, t in made.items() if end in ("weight", "weight_scale")}

    return store


def powers_of_two(dtype: torch.dtype) -> Store:
    """DeepSeek's block scales from V3.1 on: `ue8m0`."""

    def store(name: str, w: Tensor) -> dict[str, Tensor]:
        made = scaled("fp8_block")(name, w)
        exponents = made[f"{name}_scale_inv"].log2().ceil()
        scale = torch.exp2(exponents)
        if dtype is not torch.float32:
            scale = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        return {name: made[name], f"{name}_scale_inv": scale}

    return store


STORED: dict[str, tuple[dict[str, object], Store, Scheme]] = {
    "compressed-tensors, channel": (compressed_tensors("channel"), of_library("channel"), FP8_PER_CHANNEL),
    "compressed-tensors, tensor": (compressed_tensors("tensor"), of_library("tensor"), FP8_PER_TENSOR),
    "block, FP32": (HF_BLOCK, scaled("fp8_block"), FP8_BLOCK),
    "block, ue8m0 in FP32": (HF_BLOCK | dict(scale_fmt="ue8m0"), powers_of_two(torch.float32), FP8_BLOCK),
    "block, ue8m0": (HF_BLOCK | dict(scale_fmt="ue8m0"), powers_of_two(torch.float8_e8m0fnu), FP8_BLOCK),
}


def store_quantized(path: Path, config: dict[str, object], store: Store) -> dict[str, Tensor]:
    """Replaces each linear layer of the checkpoint but routers and head, and says so in config.json. Gives all tensors."""
    tensors = load_file(path / "model.safetensors")
    for name in list(tensors):
        if tensors[name].ndim == 2 and not any(word in name for word in ("embed", "lm_head", ".gate.")):
            made = store(name, tensors[name].bfloat16().float())
            tensors |= {full: t.contiguous() for full, t in made.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | {"quantization_config": config}))
    return tensors


def in_bytes(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


@cases(
    ("stored", "family", "ranks"),
    [(stored, family, 1 + (i + j) % 2) for i, stored in enumerate(STORED) for j, family in enumerate(FAMILIES)],
)
def test_stored_codes_are_kept_on_every_rank(
    stored: str, family: str, ranks: int, tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes and scales, although another scheme is asked for; the router stays as it is."""
    config, store, scheme = STORED[stored]
    tiny(tmp_path, family, **(WIDE | dict(intermediate_size=256) | inner(family, 256)))
    tensors = store_quantized(tmp_path, config, store)
    stacks = Stacks(monkeypatch)
    monkeypatch.setattr("ranks.ThreadPoolExecutor", OneByOne)
    asked = FP8_PER_TENSOR if scheme is FP8_BLOCK else FP8_BLOCK
    run_ranks(ranks, lambda tp: load_model(tmp_path, on=CPU, rules=QuantRules(asked), tp=tp))
    layers = [
        n.removesuffix(".0." + NAMES[family][0] + ".weight") for n in tensors if n.endswith(f".0.{NAMES[family][0]}.weight")
    ]
    assert len(stacks.packed) == 2 * ranks * len(layers)
    found = iter(stacks.packed)
    for rank in range(ranks):
        for layer in sorted(layers):
            gate_up, down = next(found), next(found)
            assert {gate_up.scheme, down.scheme} == {scheme}
            for e in range(len(gate_up.data)):
                ends = ["weight", *_scale(tensors, layer, NAMES[family][0])]
                gate, up, last = ({end: tensors[f"{layer}.{e}.{name}.{end}"] for end in ends} for name in NAMES[family])
                rows = [half["weight"].chunk(ranks)[rank] for half in (gate, up)]
                assert in_bytes(gate_up.data[e, : gate_up.shape[1], : gate_up.shape[2]]) == b"".join(map(in_bytes, rows))
                columns = last["weight"].view(torch.uint8).chunk(ranks, 1)[rank]
                assert in_bytes(down.data[e, : down.shape[1], : down.shape[2]]) == in_bytes(columns)
                scales = [_own_scale(half, 0, rank, ranks, scheme, 256 // ranks) for half in (gate, up)]
                assert torch.equal(gate_up.scale[e], torch.cat(scales))
                assert torch.equal(down.scale[e], _own_scale(last, 1, rank, ranks, scheme, 256))


class OneByOne:
    """Ranks one after another, so that the order of what they pack is known: nothing is exchanged where codes are kept."""

    def __init__(self, size: int): ...

    def __enter__(self) -> OneByOne:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, fn: Callable[[Any], Any], tp: Any) -> Any:
        result = fn(tp)
        return type("Job", (), {"exception": lambda self: None, "result": lambda self: result})()


def _scale(tensors: dict[str, Tensor], layer: str, name: str) -> list[str]:
    return [end for end in ("weight_scale", "weight_scale_inv") if f"{layer}.0.{name}.{end}" in tensors]


def _own_scale(stored: dict[str, Tensor], dim: int, rank: int, ranks: int, scheme: Scheme, rows: int) -> Tensor:
    """This rank's scales in FP32, [rows, 1] or tiles."""
    scale = next(t for end, t in stored.items() if end != "weight").float()
    if scheme is FP8_PER_TENSOR:
        return scale.view(1, 1).expand(rows, 1)
    return scale.chunk(ranks, dim)[rank] if scheme is FP8_BLOCK or dim == 0 else scale
