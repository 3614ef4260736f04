"""What loading a mixture of experts takes: the model and one expert, however the checkpoint stores them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from models.test_logits import qwen3_moe
from safetensors.torch import load_file
from weights.test_stacked_experts import rewritten, stack
from weights.test_weights import CPU, Accounting

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.models import qwen3_moe as architecture
from octavo.ops.cpu import library
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QTensor, QuantRules, Scheme, dequantize, qtensor
from octavo.quant.scheme import BLOCK
from octavo.weights import Loader, SafetensorsSource, load
from octavo.weights import loader as loader_module

AS_STORED = replace(CPU, widened_dtype=None)  # a machine that multiplies weights as they are stored
SIZES = dict(hidden_size=256, moe_intermediate_size=192, num_experts=20, num_experts_per_tok=2, num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    qwen3_moe(**SIZES).bfloat16().save_pretrained(path)
    return path


@cases(("stored", "hoard"), [("one by one", False), ("stacked", False), ("turned", False), ("stacked", True)])
@cases("scheme", [BF16, FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
def test_loading_takes_the_model_and_one_expert(
    scheme: Scheme, stored: str, hoard: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint
    if stored != "one by one":
        path = rewritten(checkpoint, tmp_path / "other", lambda found: stack(found, "qwen3_moe", stored == "turned"))
        assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(path / "model.safetensors")
    monkeypatch.setattr(qtensor, "CHUNK", 1 << 15)  # experts are small, so must be what is converted at a time
    kept: list[object] = []
    if hoard:  # what the bound is there to find
        read = loader_module.read_weight
        monkeypatch.setattr(loader_module, "read_weight", lambda *args: kept.append(found := read(*args)) or found)
    ops.bind(AS_STORED)
    model = architecture.Model(
        architecture.Config.from_json(json.loads((path / "config.json").read_text())), TensorParallel(), 64
    )
    with Accounting() as accounting:
        loader = Loader(SafetensorsSource(path), AS_STORED, QuantRules(scheme), torch.bfloat16)
        load(model, loader)
    kept.clear()
    finished, report = accounting.live, loader.report
    hidden, inner = SIZES["hidden_size"], SIZES["moe_intermediate_size"]
    assert ("experts", scheme.name) in report.groups
    one_expert = 2 * 3 * hidden * inner
    read_and_made = one_expert + (one_expert if scheme is BF16 else one_expert // 2)
    converted = 3 * 4 * BLOCK * hidden  # a tile's rows in FP32, their scales and their quotients
    layers = report.groups["experts", scheme.name].held / SIZES["num_hidden_layers"]
    assert layers > 3 * (read_and_made + converted), "a layer of experts is far more than there is room for"
    assert (accounting.peak > finished + read_and_made + converted) is hoard


def packed_int4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts in INT4, groups of 32, as compressed-tensors has them; the rest as it is."""
    found = {}
    for name, w in tensors.items():
        if ".experts." not in name:
            found[name] = w
            continue
        scale = w.float().unflatten(1, (-1, 32)).abs().amax(2) / 7
        codes = (w.float() / scale.repeat_interleave(32, 1)).round().clamp(-8, 7).to(torch.int8)
        found |= {f"{name}_packed": pack_to_int32(codes, 4), f"{name}_scale": scale.bfloat16()}
        found[f"{name}_shape"] = torch.tensor(w.shape)
    return found


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
@pytest.mark.parametrize("hoard", [False, True], ids=["as it is", "a matrix at a time in FP32"])
def test_packed_int4_is_never_inflated(hoard: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4.5 bits a value are held, and an expert's few matrices come and go in as many."""
    path = rewritten(checkpoint, tmp_path / "int4", packed_int4)
    if hoard:  # what the bound is there to find
        read = loader_module.read_weight

        def inflating(*args: Any) -> Any:
            if isinstance(found := read(*args), QTensor):
                dequantize(found)
            return found

        monkeypatch.setattr(loader_module, "read_weight", inflating)
    ops.bind(AS_STORED)
    model = architecture.Model(
        architecture.Config.from_json(json.loads((path / "config.json").read_text())), TensorParallel(), 64
    )
    with Accounting() as accounting:
        loader = Loader(SafetensorsSource(path), AS_STORED, QuantRules(), torch.bfloat16)
        load(model, loader)
    values = 3 * SIZES["hidden_size"] * SIZES["moe_intermediate_size"]
    experts = loader.report.groups["experts", "int4"]
    assert experts.held == values * SIZES["num_experts"] * SIZES["num_hidden_layers"] * 9 // 16
    assert ops.table()["experts[int4]"].startswith("C kernels")
    assert (accounting.peak > accounting.live + 3 * values * 9 // 16) is hoard
