"""`octavo compare` of a model whose cache holds latents: the caches that it has, its matrices and experts, the search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.test_kimi import kimi, write
from models.test_logits import deepseek_v3, deepseek_v32, randomize
from tools.test_compare import IDS, WINDOW, _fp32_sums, config  # noqa: F401
from tools.test_compare_experts import by_path
from tools.test_quantize_int4 import W4A16
from transformers import AutoModelForCausalLM, PreTrainedModel

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.quantization_file import read_quantization_config
from octavo.tools.compare import loss_table
from octavo.tools.compare.caches import kv_names
from octavo.tools.compare.compare import compare, write_config
from octavo.tools.compare.search import Budget

# Layer 0 is dense, the others are mixtures with a shared expert; kv_b_proj and the weights of index heads are never quantized.
ATTENTION = ("a_proj", "q_proj", "o_proj")
DENSE, MIXTURE = ("gate_up_proj", "down_proj"), ("experts.*.gate_up_proj", "experts.*.down_proj")


def written(path: Path, model: PreTrainedModel) -> Path:
    torch.manual_seed(3)
    randomize(model).bfloat16().save_pretrained(path)
    return path


def options(path: Path, **more: object) -> EngineConfig:
    return config(path, enforce_eager=True, **more)


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("v3"), deepseek_v3())


@pytest.fixture(scope="module")
def v32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("v32"), deepseek_v32())


def test_caches_are_those_of_the_model(v3: Path, v32: Path) -> None:
    for path in (v3, v32):
        assert kv_names(options(path), []) == ["fp8_e4m3", "auto"]
        assert kv_names(options(path), ["bfloat16", "fp8_ds_mla", "fp8_e4m3"]) == ["fp8_e4m3", "auto"]
        for name in ("fp8_e5m2", "fp8_per_token_head"):
            with pytest.raises(OctavoError, match=f"--kv-cache-dtype {name} is not for MLA models"):
                kv_names(options(path), [name])
    assert kv_names(options(v3), ["auto"]) == ["auto"]
    assert kv_names(options(v32), ["auto"]) == ["fp8_e4m3"]  # which is what it means there
    assert kv_names(options(v32, dtype="float32"), ["auto"]) == ["auto"]
    with pytest.raises(OctavoError, match="--kv-cache-dtype fp8_ds_mla is for MLA models"):
        kv_names(EngineConfig(), ["fp8_ds_mla"])
    assert kv_names(EngineConfig(), []) == ["fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "auto"]


def test_the_reference_of_sparse_attention_keeps_its_latents_in_bf16(v32: Path) -> None:
    """Where --kv-cache-dtype auto would put them in FP8. Weights are in BF16 throughout: what is lost is the cache's."""
    found = compare(options(v32), IDS, ["bf16"], ["fp8_e4m3", "auto"], window=WINDOW)
    (m,) = found.measured
    assert (found.reference.kv_bytes_per_token, m.kv_bytes_per_token) == (3 * (2 * 40 + 20), 3 * (32 + 4 + 16 + 20))
    assert m.kl > 1e-7
    assert any("fp8_e4m3 is fp8_ds_mla" in note for note in found.notes)


@pytest.mark.parametrize("top_k", [0, 6, 512])
def test_layers_are_measured(top_k: int, v3: Path, v32: Path, tmp_path: Path) -> None:
    """Each matrix and stack that a scheme quantizes; where all of a window is attended to, nothing asks for index queries."""
    path = written(tmp_path, deepseek_v32(index_topk=top_k)) if top_k > WINDOW else v32 if top_k else v3
    found = compare(options(path, dtype="float32"), IDS, ["ptpc_fp8"], ["auto"], window=WINDOW)
    indexer = ("indexer.wq_b", "indexer.wk") if top_k else ()
    expected = {f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in (*ATTENTION, *indexer)}
    expected |= {f"model.layers.0.mlp.{name}" for name in DENSE}
    expected |= {f"model.layers.{i}.mlp.{name}" for i in (1, 2) for name in (*MIXTURE, *(f"shared_experts.{n}" for n in DENSE))}
    errors, ranked = by_path(found.layers), by_path(found.ranked)
    assert set(ranked) == expected
    assert set(errors) == {path for path in expected if top_k < WINDOW or not path.endswith("wq_b")}
    assert all(0.005 < layer.weight["ptpc_fp8"] < 0.05 for layer in found.layers)
    assert all(0.005 < layer.output["ptpc_fp8"] < 0.1 for layer in found.layers)
    assert sum(one.extra_bytes for one in found.ranked) == found.reference.weight_bytes - found.row_of("ptpc_fp8").weight_bytes
    assert ranked["model.layers.1.self_attn.o_proj"].kl > 1e-7
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").requires_grad_(False)
    ids = torch.tensor(IDS).view(-1, WINDOW)
    losses = -model(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert found.reference.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-4)


def test_auto_finds_what_serves(v3: Path, tmp_path: Path) -> None:
    found = compare(options(v3), IDS, ["fp8", "ptpc_fp8"], ["fp8_e4m3", "auto"], Budget.parse("50 nats"), window=WINDOW)
    assert found.chosen is not None
    assert (found.chosen.variant.scheme, found.chosen.variant.kv) == ("fp8", "fp8_e4m3")
    write_config(tmp_path / "chosen.json", found, options(v3))
    assert read_quantization_config(str(tmp_path / "chosen.json"))["kv_cache_dtype"] == "fp8_e4m3"
    assert json.loads((tmp_path / "chosen.json").read_text())["measured"]["kl"] == found.chosen.kl


def test_what_is_stored_in_int4_is_no_layer_that_becomes_fp8(tmp_path: Path) -> None:
    """Kimi-K2.5: its experts are said once, and neither measured nor ranked; the others have the checkpoint's names."""
    model = kimi()
    write(tmp_path, model, int4=True)
    ignore = ["vision_tower.*"]  # of a start that reads images; none of it is loaded here
    asked = options(tmp_path, dtype="float32", quantization_ignore=ignore)
    found = compare(asked, IDS, ["ptpc_fp8"], ["auto"], window=WINDOW)
    at = "language_model.model.layers"
    expected = {f"{at}.{i}.self_attn.{name}" for i in range(3) for name in ATTENTION}
    expected |= {f"{at}.0.mlp.{name}" for name in DENSE}
    expected |= {f"{at}.{i}.mlp.shared_experts.{name}" for i in (1, 2) for name in DENSE}
    assert set(by_path(found.layers)) == set(by_path(found.ranked)) == expected
    assert all(name.startswith(at) for one in found.ranked for name in one.names)
    assert all(0.005 < layer.weight["ptpc_fp8"] < 0.05 for layer in found.layers)
    assert sum(one.extra_bytes for one in found.ranked) == found.reference.weight_bytes - found.row_of("ptpc_fp8").weight_bytes
    assert [note for note in found.notes if "codes" in note] == [
        "4 layers are stored in codes already (experts in int4) and keep them whatever the scheme: "
        "BF16 here means the checkpoint as stored"
    ]
    assert any(note.startswith("the vision tower is not loaded: a text is measured") for note in found.notes)
    kept = found.measured[-1]
    assert kept.variant.ignore == tuple(found.ignore)
    assert 0 < kept.kl < found.row_of("ptpc_fp8").kl
    ids = torch.tensor(IDS).view(-1, WINDOW)
    with torch.no_grad():
        losses = -model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert found.reference.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-4)


def test_a_checkpoint_of_codes_alone_has_no_layer_to_rank(capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = json.loads((W4A16 / "config.json").read_text())["vocab_size"]
    ids = [token % vocabulary for token in IDS]
    found = compare(options(W4A16), ids, ["ptpc_fp8"], ["fp8_e4m3", "auto"], window=WINDOW)
    assert (found.layers, found.ranked, found.ignore) == ([], [], [])
    assert found.row_of("ptpc_fp8").kl == 0
    loss_table.show(found, None)
    assert "layers are stored in codes already" in capsys.readouterr().out
