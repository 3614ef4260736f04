"""`octavo quantize` of mixtures of experts: the codes of the online quantizer, whatever the checkpoint's form."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import LoadModel, tokens
from models.test_moe_quantized import FAMILIES, NAMES, STORED, WIDE, Stacks, in_bytes, inner, store_quantized, tiny
from safetensors.torch import load_file, save_file
from tools.test_quantize import assert_sentence, dequantized, run, schemes, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from octavo import LLM, SamplingParams
from octavo.errors import OctavoError
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, QuantRules, Scheme, dequantize, quantize

LEFT = re.compile(r"\.gate\.|e_score_correction_bias|norm|embed|lm_head|\.bias$")
families = cases("family", FAMILIES)


def moe(path: Path, family: str, **changes: Any) -> PreTrainedModel:
    """A BF16 checkpoint."""
    model = tiny(path, family, **changes)
    model.bfloat16().save_pretrained(path)
    return model


def stacked(source: Path, to: Path, family: str, turned: bool) -> Path:
    """The same weights with each layer's experts in two tensors, under transformers' names."""
    to.mkdir()
    (to / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    gate, up, down = NAMES[family]
    for at in sorted({n.partition(".experts.")[0] for n in tensors if f".0.{down}.weight" in n and ".experts." in n}):
        count = sum(f"{at}.experts.{e}.{down}.weight" in tensors for e in range(99))
        found = {
            name: torch.stack([tensors.pop(f"{at}.experts.{e}.{name}.weight") for e in range(count)])
            for name in (gate, up, down)
        }
        made = {"gate_up_proj": torch.cat([found[gate], found[up]], 1), "down_proj": found[down]}
        layer = at.replace("block_sparse_moe", "mlp")
        tensors |= {f"{layer}.experts.{name}": (w.mT if turned else w).contiguous() for name, w in made.items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@families
@schemes
def test_bits_are_those_of_each_matrix(scheme: Scheme, family: str, tmp_path: Path) -> None:
    """Of experts as of every linear layer; routers and their corrections are left alone, and config.json says so."""
    moe(tmp_path / "model", family)
    said = run(tmp_path / "model", tmp_path / "out", scheme)
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    assert sum(".experts." in name for name in before) > 30
    for name, w in before.items():
        if LEFT.search(name):
            assert in_bytes(after.pop(name)) == in_bytes(w), name
            continue
        expected = quantize(w, scheme)
        assert in_bytes(after.pop(name)) == in_bytes(expected.data), name
        assert torch.equal(
            after.pop(f"{name}_scale").flatten(), expected.scale.flatten()[: 1 if scheme.name == "fp8" else None]
        )
    assert not after
    ignore = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignore) == {"lm_head"} | {name.removesuffix(".weight") for name in before if ".gate.weight" in name}
    assert len("\n".join(said)) < 1200
    assert ".experts.*." in said[0]


@dequantized
@families
@schemes
def test_transformers_reads_the_same_weights(scheme: Scheme, family: str, tmp_path: Path) -> None:
    model = moe(tmp_path / "model", family)
    run(tmp_path / "model", tmp_path / "out", scheme)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]

    def through(w: Tensor) -> Tensor:
        return dequantize(quantize(w, scheme))

    seen = 0
    for name, w in model.state_dict().items():
        expected = w
        if w.ndim == 3:
            halves = [list(one.chunk(2)) if "gate_up" in name else [one] for one in w]
            expected = torch.stack([torch.cat(list(map(through, parts))) for parts in halves])
            seen += 1
        elif not LEFT.search(name):
            expected = through(w)
        assert torch.equal(theirs.state_dict()[name], expected.float()), name
    assert seen >= 4


@families
@cases("turned", [False, True], ids=["as transformers", "turned"])
def test_a_stacked_checkpoint_gives_the_same_files(family: str, turned: bool, tmp_path: Path) -> None:
    moe(tmp_path / "model", family)
    both = tmp_path / "model", stacked(tmp_path / "model", tmp_path / "stacked", family, turned)
    for ignore in ((), ("experts.*.down_proj", "experts.*.w2")[NAMES[family][2] == "w2" :][:1]):
        outs = []
        for number, model in enumerate(both):
            run(model, out := tmp_path / f"out{number}{len(ignore)}", FP8_PER_CHANNEL, ignore=ignore)
            outs.append(tensors_of(out))
        assert outs[0].keys() == outs[1].keys()
        assert all(in_bytes(w) == in_bytes(outs[1][name]) for name, w in outs[0].items())
        down = [w for name, w in outs[0].items() if name.endswith(f".0.{NAMES[family][2]}.weight") and ".experts." in name]
        assert {w.dtype for w in down} == {torch.bfloat16 if ignore else torch.float8_e4m3fn}


@families
@schemes
def test_octavo_reads_what_it_would_have_made_online(
    scheme: Scheme, family: str, tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe(tmp_path / "model", family)
    ignore = ("experts.*.gate_proj", "experts.*.w1")[NAMES[family][0] == "w1" :][:1]
    for left_out in ((), ignore):
        run(tmp_path / "model", out := tmp_path / f"out{len(left_out)}", scheme, ignore=left_out)
        stacks = Stacks(monkeypatch)
        online = load_model(tmp_path / "model", rules=QuantRules(scheme, left_out)).logits(tokens(40))
        offline = load_model(out).logits(tokens(40))
        assert torch.equal(online, offline)
        half = len(stacks.packed) // 2
        assert half >= 4
        for one, other in zip(stacks.packed[:half], stacks.packed[half:], strict=True):
            assert one.scheme is other.scheme
            assert in_bytes(one.data) == in_bytes(other.data)
            assert (one.scale is None and other.scale is None) or torch.equal(one.scale, other.scale)
        monkeypatch.undo()


def test_tokens_are_the_same_online_and_offline(tmp_path: Path) -> None:
    moe(tmp_path / "model", "qwen3_moe")
    run(tmp_path / "model", tmp_path / "out")
    how: dict[str, Any] = dict(device="cpu", threads=1, cpu_kv_cache_gib=0.05)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    online = {"quantization": "ptpc_fp8"}
    saved = online | {"save_quantized": str(tmp_path / "saved")}
    made = [
        LLM(path, **how, **more).generate([tokens(30)], params, use_tqdm=False)[0].outputs[0].token_ids
        for path, more in ((tmp_path / "model", online), (tmp_path / "out", {}), (tmp_path / "model", saved))
    ]
    assert made[0] == made[1] == made[2]
    written = [tensors_of(tmp_path / name) for name in ("out", "saved")]
    assert written[0].keys() == written[1].keys()
    assert all(in_bytes(w) == in_bytes(written[1][name]) for name, w in written[0].items())
    assert len(set(made[0])) > 3


@families
@cases("stored", [name for name in STORED if name.startswith("block")])
def test_codes_of_an_official_block_checkpoint_are_kept(stored: str, family: str, tmp_path: Path) -> None:
    tiny(tmp_path / "model", family, **(WIDE | dict(intermediate_size=256) | inner(family, 256)))
    config, store, _ = STORED[stored]
    before = store_quantized(tmp_path / "model", config, store)
    said = run(tmp_path / "model", tmp_path / "out", FP8_BLOCK)
    after = tensors_of(tmp_path / "out")
    codes = [name for name, w in before.items() if w.dtype is torch.float8_e4m3fn]
    assert sum(".experts." in name for name in codes) > 20
    for name in codes:
        assert in_bytes(after[name]) == in_bytes(before[name])
        assert torch.equal(after[f"{name}_scale"], before[f"{name}_scale_inv"].float())
    assert any(f"{len(codes)} matrices are stored in fp8_block already" in line for line in said)


def test_one_expert_left_out_leaves_out_its_layers(tmp_path: Path, load_model: LoadModel) -> None:
    """As online: an operand is of one scheme."""
    moe(tmp_path / "model", "qwen3_moe")
    run(tmp_path / "model", tmp_path / "out", ignore=["model.layers.1.mlp.experts.3.gate_proj"])
    left = {name for name, w in tensors_of(tmp_path / "out").items() if ".experts." in name and w.dtype is torch.bfloat16}
    assert left == {f"model.layers.1.mlp.experts.{e}.{name}_proj.weight" for e in range(7) for name in ("gate", "up")}
    load_model(tmp_path / "out").logits(tokens(8))


def test_an_unused_pattern_of_experts_is_said(tmp_path: Path) -> None:
    moe(tmp_path / "model", "mixtral")
    with pytest.raises(OctavoError) as raised:
        run(tmp_path / "model", tmp_path / "out", ignore=["mlp.experts.*.down_proj"])
    assert_sentence(raised.value, "'mlp.experts.*.down_proj'", "matches no layer")


def test_thousands_of_small_matrices(tmp_path: Path) -> None:
    """128 experts in 48 layers: a few lines are said, patterns are asked once an operand, and it takes seconds."""
    small = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_hidden_layers=48)
    moe(tmp_path / "model", "qwen3_moe", **small, num_experts=128, moe_intermediate_size=24)
    began = time.monotonic()
    said = run(
        tmp_path / "model", tmp_path / "out", ignore=["model.layers.0.mlp.experts.*.down_proj", "re:.*layers.1.self_attn"]
    )
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s")
    assert len(said) <= 4
    assert all(len(line) < 400 for line in said), said
    assert said[0].startswith(f"{48 * 128 * 3 - 128 + 47 * 4} matrices to ptpc_fp8: ")
    assert seconds < 60
