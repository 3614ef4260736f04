"""Checkpoints that stack experts in one tensor, either way round: the same weights, bit for bit, as those with one each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import LoadModel, tokens
from models.test_moe_quantized import FAMILIES, NAMES, STORED, WIDE, Stacks, inner, store_quantized, tiny
from models.test_quantized import CPU
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tools.planner import plan_of
from torch import Tensor
from transformers import PreTrainedModel

from octavo.errors import OctavoError
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, QuantRules
from octavo.tools.quantize.quantize import quantize_checkpoint
from octavo.weights.checkpoint import Checkpoint, RowReader, Rows, Scratch
from octavo.weights.transfer import Transfer

ways = cases("turned", [False, True], ids=["as products read it", "turned"])


def stack(tensors: dict[str, Tensor], family: str, turned: bool, *, spelled: str = "{part}{end}") -> dict[str, Tensor]:
    """The checkpoint's tensors with a layer's experts in tensors of three dimensions, as tools that stack them name these."""
    gate, up, down = NAMES[family]
    out = {name: t for name, t in tensors.items() if ".experts." not in name}
    ends = {"weight": "", "weight_scale": "_scale", "weight_scale_inv": "_scale_inv"}
    for at in sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name}):
        count = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in tensors if name.startswith(f"{at}.experts."))
        for end, suffix in ends.items():
            if f"{at}.experts.0.{gate}.{end}" not in tensors:
                continue

            def of_all(name: str, at: str = at, end: str = end, count: int = count) -> Tensor:
                return torch.stack([tensors[f"{at}.experts.{e}.{name}.{end}"].view(torch.uint8) for e in range(count)])

            kind = tensors[f"{at}.experts.0.{gate}.{end}"]
            size = kind.itemsize
            both = torch.cat([of_all(gate), of_all(up)], 1) if kind.ndim == 2 else of_all(gate)
            for part, stacked in (("gate_up_proj", both), ("down_proj", of_all(down))):
                whole = stacked.unflatten(-1, (-1, size)) if kind.ndim == 2 else stacked
                if turned and kind.ndim == 2:
                    whole = whole.transpose(1, 2)
                whole = whole.contiguous().view(kind.dtype)
                out[f"{at}.experts." + spelled.format(part=part, end=suffix)] = whole.squeeze(-1) if kind.ndim == 2 else whole
    return out


def rewritten(path: Path, other: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of the checkpoint with other tensors."""
    other.mkdir()
    (other / "config.json").write_text((path / "config.json").read_text())
    save_file(change(load_file(path / "model.safetensors")), other / "model.safetensors", metadata={"format": "pt"})
    return other


@ways
@cases("family", FAMILIES)
def test_they_load_as_those_with_one_each(family: str, turned: bool, tmp_path: Path, load_model: LoadModel) -> None:
    """Whole and over ranks, as they are and quantized. Equal codes give equal logits, to the bit."""
    tiny(tmp_path, family)
    other = rewritten(tmp_path, tmp_path / "stacked", lambda tensors: stack(tensors, family, turned))
    ids = tokens(9)
    for rules in (QuantRules(), QuantRules(FP8_PER_CHANNEL)):
        one, stacked = (load_model(path, rules=rules, on=CPU) for path in (tmp_path, other))
        assert torch.equal(one.logits(ids), stacked.logits(ids))
        assert one.loader.report.groups == stacked.loader.report.groups
    for part, whole in zip(
        *(run_ranks(2, lambda tp, p=p: load_model(p, tp=tp).logits(ids)) for p in (tmp_path, other)), strict=True
    ):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_in_its_own_names(family: str, tmp_path: Path, load_model: LoadModel) -> None:
    model: PreTrainedModel = tiny(tmp_path, family)
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    names = set(load_file(tmp_path / "own/model.safetensors"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    ids = tokens(9)
    assert torch.equal(load_model(tmp_path).logits(ids), load_model(tmp_path / "own").logits(ids))


@cases(("spelled", "turned"), [("{part}{end}", False), ("{part}.weight{end}", True)])
@cases("stored", STORED)
def test_codes_are_kept_bit_for_bit(
    stored: str, spelled: str, turned: bool, tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store, scheme = STORED[stored]
    tiny(tmp_path, "qwen3_moe", **(WIDE | inner("qwen3_moe", 128)))
    tensors = store_quantized(tmp_path, config, store)
    if stored == "compressed-tensors, tensor":  # one scale for gate and up, where they are one tensor
        for name in [n for n in tensors if n.endswith("gate_proj.weight_scale")]:
            tensors[name.replace("gate", "up")] = tensors[name].clone()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = rewritten(tmp_path, tmp_path / "stacked", lambda found: stack(found, "qwen3_moe", turned, spelled=spelled))
    stacks = Stacks(monkeypatch)
    load_model(tmp_path, on=CPU)
    single, stacks.packed = stacks.packed, []
    load_model(other, on=CPU)
    assert len(single) == len(stacks.packed) == 4
    for one, q in zip(single, stacks.packed, strict=True):
        assert q.scheme is one.scheme is scheme
        assert torch.equal(q.data.view(torch.uint8), one.data.view(torch.uint8))
        assert torch.equal(q.scale, one.scale)


@ways
def test_every_way_of_reading_gives_the_same_bytes(turned: bool, tmp_path: Path) -> None:
    """Mapped, through the buffers that go to a device, and in rows, each with a rank's part of either dimension."""
    tiny(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    other = rewritten(tmp_path, tmp_path / "stacked", lambda found: stack(found, "qwen3_moe", turned))
    checkpoint = Checkpoint(other)
    assert set(checkpoint.tensors) == set(tensors)
    transfer, rows = Transfer(checkpoint, torch.device("cpu")), RowReader(checkpoint, CPU, Scratch())
    for name in [n for n in tensors if ".experts." in n and ".layers.1." in n]:
        stored, expected = checkpoint.tensors[name], tensors[name]
        assert stored.shape == expected.shape
        assert stored.nbytes == expected.nbytes
        for dim in (0, 1):
            half = expected.shape[dim] // 2
            part = slice(half, 2 * half)
            own = expected[(slice(None),) * dim + (part,)]
            assert torch.equal(checkpoint.mapped(stored, dim, part), own)
            assert torch.equal(transfer.read(stored, dim, part), own)
        assert torch.equal(rows.read(name, expected.shape, Rows(start=3, stop=17)), expected[3:17])
    transfer.close()
    checkpoint.close()


SQUARE = {"H is 2I": dict(moe_intermediate_size=32), "H is I": dict(moe_intermediate_size=64)}  # hidden size 64


@ways
@pytest.mark.parametrize("sizes", SQUARE)
def test_where_one_is_square_the_other_tells(sizes: str, turned: bool, tmp_path: Path, load_model: LoadModel) -> None:
    tiny(tmp_path, "qwen3_moe", **SQUARE[sizes])
    other = rewritten(tmp_path, tmp_path / "stacked", lambda found: stack(found, "qwen3_moe", turned))
    ids = tokens(9)
    assert torch.equal(load_model(tmp_path).logits(ids), load_model(other).logits(ids))


def one_turned(tensors: dict[str, Tensor], at: str) -> None:
    tensors[f"{at}.down_proj"] = tensors[f"{at}.down_proj"].transpose(1, 2).contiguous()


def of_other_sizes(tensors: dict[str, Tensor], at: str) -> None:
    tensors[f"{at}.gate_up_proj"] = torch.zeros(7, 82, 64)


def one_expert_less(tensors: dict[str, Tensor], at: str) -> None:
    for part in ("gate_up_proj", "down_proj"):
        tensors[f"{at}.{part}"] = tensors[f"{at}.{part}"][:6].contiguous()


def without_down(tensors: dict[str, Tensor], at: str) -> None:
    del tensors[f"{at}.down_proj"]


def with_odd_scales(tensors: dict[str, Tensor], at: str) -> None:
    tensors[f"{at}.down_proj_scale_inv"] = torch.ones(7, 3, 2)


def with_tiles_of_both(tensors: dict[str, Tensor], at: str) -> None:
    tensors[f"{at}.gate_up_proj_scale_inv"] = torch.ones(7, 2, 1)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor], str], None], int]] = {
    "stack their experts in different orders of dimensions": (one_turned, 40),
    "gate_up_proj has shape [7, 82, 64], but config.json makes it [7, 80, 64] or, turned, [7, 64, 80]": (of_other_sizes, 40),
    "down_proj has shape [6, 64, 40], but config.json makes it [7, 64, 40]": (one_expert_less, 40),
    "no tensor model.layers.1.mlp.experts.0.down_proj.weight": (without_down, 40),
    "down_proj_scale_inv has shape [7, 3, 2], which is neither one scale for each of 7": (with_odd_scales, 40),
    "a 128x128 tile holds rows of both gate and up, of 96 rows each": (with_tiles_of_both, 96),
}


@cases("said", FAULTS)
def test_stacks_that_contradict_config_are_refused(said: str, tmp_path: Path, load_model: LoadModel) -> None:
    change, size = FAULTS[said]
    tiny(tmp_path, "qwen3_moe", moe_intermediate_size=size)

    def wrong(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = stack(tensors, "qwen3_moe", False)
        change(made, "model.layers.1.mlp.experts")
        return made

    other = rewritten(tmp_path, tmp_path / "stacked", wrong)
    with pytest.raises(OctavoError) as raised:
        load_model(other)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@ways
def test_quantize_and_plan_see_one_form(turned: bool, tmp_path: Path) -> None:
    tiny(tmp_path, "qwen3_moe")
    other = rewritten(tmp_path, tmp_path / "stacked", lambda found: stack(found, "qwen3_moe", turned))
    written = []
    for path in (tmp_path, other):
        out = path.with_name(f"{path.name}-fp8")
        quantize_checkpoint(path, out, QuantRules(FP8_BLOCK), say=lambda line: None)
        written.append(load_file(out / "model.safetensors"))
    assert set(written[0]) == set(written[1])
    assert "model.layers.0.mlp.experts.6.up_proj.weight_scale" in written[0]
    assert all(torch.equal(t.view(torch.uint8), written[1][name].view(torch.uint8)) for name, t in written[0].items())
    one, stacked = (plan_of(str(path), "--accelerator", "h200").question.subject.base for path in (tmp_path, other))
    assert one.operands == stacked.operands
    assert one.problems == stacked.problems == []


def test_what_is_left_out_is_copied_unstacked(tmp_path: Path) -> None:
    tiny(tmp_path, "qwen3_moe")
    expected = load_file(tmp_path / "model.safetensors")
    other = rewritten(tmp_path, tmp_path / "stacked", lambda found: stack(found, "qwen3_moe", True))
    quantize_checkpoint(other, tmp_path / "out", QuantRules(FP8_BLOCK, ["*.experts.*"]), say=lambda line: None)
    found = load_file(tmp_path / "out/model.safetensors")
    for name in (n for n in expected if ".experts." in n):
        assert torch.equal(found[name], expected[name])


def test_stacks_of_types_that_are_not_known_are_left_as_they_are(tmp_path: Path) -> None:
    """Another type may put gate and up in another order."""
    tiny(tmp_path, "qwen3_moe")
    other = rewritten(tmp_path, tmp_path / "stacked", lambda found: stack(found, "qwen3_moe", True))
    config: dict[str, Any] = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt_oss"}))
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint(other).tensors
