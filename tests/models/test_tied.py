"""Tied embeddings with --quantize-lm-head: one matrix of codes, looked up and multiplied by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import cases
from conftest import COMMON, Loaded, LoadModel, relative_error, tokens
from models.test_quantized import BOUND, CPU, FNUZ, SCHEMES, error, fake_quantize, logits, octavo_logits, tiny
from quant import float64
from quant.float64 import E4M3FN, E4M3FNUZ, Format, array
from safetensors.torch import load_file
from torch import Tensor

from octavo.errors import OctavoError
from octavo.ops import cpu
from octavo.platform import Platform
from octavo.quant import FP8_PER_CHANNEL, QuantRules, Scheme, dequantize, quantize

EMBEDDING = "model.embed_tokens.weight"
schemes = cases("scheme", SCHEMES, ids=lambda s: s.name)
NATIVE = Platform(torch.device("cpu"), "test")  # the C kernels, where they were built


def asked(scheme: Scheme, ignore: tuple[str, ...] = ()) -> QuantRules:
    return QuantRules(scheme, ignore, quantize_lm_head=True)


def embed(loaded: Loaded, ids: Tensor) -> Tensor:
    found: Tensor = loaded.model.model.embed_tokens(ids)
    return found


@schemes
@cases(("on", "fmt"), [(CPU, E4M3FN), (FNUZ, E4M3FNUZ), (NATIVE, E4M3FN)], ids=["fn", "fnuz", "native"])
def test_logits_equal_a_fake_quantized_model(
    scheme: Scheme, on: Platform, fmt: Format, tmp_path: Path, load_model: LoadModel
) -> None:
    """transformers' model, its head a fake quantized product, its embeddings the values that the head's codes stand for."""
    model = tiny(tmp_path, tie_word_embeddings=True)
    table = array(model.model.embed_tokens.weight)
    tile = float64.tile_of(scheme.name, *table.shape)
    fake_quantize(model, scheme.name, fmt, but=("no module",))
    values = torch.from_numpy(float64.dequantize(*float64.quantize(table, tile, fmt), tile, fmt))
    assert torch.equal(model.lm_head.weight, values)
    head_alone = logits(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(values)
    out = octavo_logits(load_model(tmp_path, rules=asked(scheme), on=on))
    assert error(out, logits(model)) < BOUND
    assert error(out, head_alone) > 0.01  # the look-up reads the codes, too


@schemes
@cases("dtype", [torch.bfloat16, torch.float32], ids=str)
@cases("by", ["widened", "native", "reference"])
def test_a_look_up_is_the_dequantized_row(
    scheme: Scheme, dtype: torch.dtype, by: str, tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path, tie_word_embeddings=True)
    if by == "reference":
        monkeypatch.setattr(cpu, "LINEAR", [])
    on = CPU if by == "widened" else NATIVE
    loaded = load_model(tmp_path, rules=asked(scheme), dtype=dtype, on=on)
    w = load_file(tmp_path / "model.safetensors")[EMBEDDING]
    ids = torch.tensor(tokens(50))
    out = embed(loaded, ids)
    assert torch.equal(out, dequantize(quantize(w, scheme))[ids].to(dtype))
    # A code is within a sixteenth of its value; one below the smallest normal, 2^-6 of the scale, within 2^-10 of the scale.
    assert 0 < relative_error(out, w[ids]) < 1 / 16


@schemes
def test_one_matrix_is_held(scheme: Scheme, tmp_path: Path, load_model: LoadModel) -> None:
    tiny(tmp_path, tie_word_embeddings=True, vocab_size=250)
    model, loader = (loaded := load_model(tmp_path, rules=asked(scheme), on=NATIVE)).model, loaded.loader
    assert model.lm_head.weight is model.model.embed_tokens.weight
    groups = loader.report.groups
    assert not {("embedding", "bf16"), ("lm_head", "bf16"), ("lm_head", scheme.name)} & set(groups)
    group = groups["embedding", scheme.name]
    stored = quantize(load_file(tmp_path / "model.safetensors")[EMBEDDING], scheme)
    assert (group.tensors, group.values, group.stored) == (1, 250 * 78, stored.nbytes)
    assert loader.report.total("values") == sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())


def test_without_the_flag_it_stays_bf16(tmp_path: Path, load_model: LoadModel) -> None:
    tiny(tmp_path, tie_word_embeddings=True)
    w = load_file(tmp_path / "model.safetensors")[EMBEDDING].bfloat16()
    for rules in (QuantRules(FP8_PER_CHANNEL), asked(FP8_PER_CHANNEL, ("embed_tokens",))):
        loaded = load_model(tmp_path, rules=rules, dtype=torch.bfloat16, on=NATIVE)
        head, groups = loaded.model.lm_head.weight, loaded.loader.report.groups
        assert torch.equal(embed(loaded, torch.arange(len(w))), w)
        assert groups["embedding", "bf16"].stored == groups["embedding", "bf16"].held == w.nbytes
        # It multiplies by the same values: those of the embedding, or, where it has an order of its own, the look-up by its.
        assert (groups["lm_head", "bf16"].tensors, groups["lm_head", "bf16"].stored) == (1, 0)
        assert groups["lm_head", "bf16"].held == head.data.nbytes - w.nbytes
        assert head.data.data_ptr() == loaded.model.model.embed_tokens.weight.data.data_ptr()


def test_embeddings_that_no_head_is_tied_to_stay_bf16(tmp_path: Path, load_model: LoadModel) -> None:
    tiny(tmp_path)
    groups = load_model(tmp_path, rules=asked(FP8_PER_CHANNEL), on=NATIVE).loader.report.groups
    assert {("embedding", "bf16"), ("lm_head", "ptpc_fp8")} <= set(groups)


def test_a_pattern_that_names_nothing_is_still_said(tmp_path: Path, load_model: LoadModel) -> None:
    tiny(tmp_path, **COMMON, tie_word_embeddings=True)
    with pytest.raises(OctavoError, match="'no_such_proj' matches no layer"):
        load_model(tmp_path, rules=asked(FP8_PER_CHANNEL, ("no_such_proj",)))
