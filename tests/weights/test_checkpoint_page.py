"""docs/checkpoints.md, row by row: what it says is served, skipped and refused is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from conftest import COMMON, relative_error, tokens
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM, SamplingParams
from octavo.errors import OctavoError
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, dequantize, quantize
from octavo.quant.stored_format import stored_format_of
from octavo.weights.leftovers import NEEDED, NOTHING_IF_ZERO, WHY
from octavo.weights.names import ORIGINAL, PACKED, STACKED, WRAPPERS

PAGE = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
HOW: dict[str, Any] = dict(dtype="float32", threads=1, cpu_kv_cache_gib=0.01)
State = dict[str, Tensor]
Stored = tuple[State, Tensor]  # the tensors of a matrix by the last parts of their names, and what they mean


def section(title: str) -> list[list[str]]:
    """The rows of a section's table."""
    lines = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def fp8(scheme: Any, name: str = "weight_scale", shape: Callable[[Tensor], Tensor] = lambda s: s) -> Callable[[Tensor], Stored]:
    def stored(w: Tensor) -> Stored:
        q = quantize(w, scheme)
        assert q.scale is not None
        return {"weight": q.data, name: shape(q.scale).contiguous()}, dequantize(q)

    return stored


def int4(w: Tensor) -> Stored:
    scale = (w.unflatten(1, (-1, 8)).abs().amax(-1) / 7).bfloat16()
    codes = (w / scale.float().repeat_interleave(8, 1)).round().clamp(-8, 7)
    packed = pack_to_int32(codes.to(torch.int8), 4)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(w.shape)}, (
        codes * scale.float().repeat_interleave(8, 1)
    )


def ct(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, **weights}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def quark(dtype: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": dtype}}, **more}


def e8m0(scale: Tensor) -> Tensor:
    return scale.log2().ceil().exp2().to(torch.float8_e8m0fnu)


one, channel = fp8(FP8_PER_TENSOR, shape=lambda s: s[:1, 0]), fp8(FP8_PER_CHANNEL)
flat = fp8(FP8_PER_CHANNEL, shape=lambda s: s[:, 0])
scalar, tiles = fp8(FP8_PER_TENSOR, shape=lambda s: s[0, 0]), fp8(FP8_BLOCK)
nested = fp8(FP8_BLOCK, shape=lambda s: s[:, None, :, None])
# By the first words of a row: what quantization_config says, with how matrices are stored or what the sentence says.
Case = tuple[dict[str, Any], Callable[[Tensor], Stored] | str]
FORMATS: dict[str, list[Case]] = {
    "`compressed-tensors`: FP8, a scale a matrix": [
        (ct(strategy="tensor"), one), (ct(strategy="channel"), channel),
        (ct(strategy="block", block_structure=[128, 128]), tiles),
    ],
    "`compressed-tensors`: INT4, symmetric": [(ct(type="int", num_bits=4, group_size=8), int4)],
    "`compressed-tensors`: zero points": [
        (ct(type="int", num_bits=4, symmetric=False), "stored with zero points"),
        (ct(type="int", num_bits=4, actorder="group"), "stored with reordered columns"),
    ],
    "`compressed-tensors`: NVFP4": [
        (ct(num_bits=4), "stored as float of 4 bits"), (ct(type="int"), "stored as int of 8 bits"),
    ],
    "`compressed-tensors`: FP8 with a scale for each group": [
        (ct(strategy="group", group_size=32), "FP8 with a scale for each group of 32 values"),
    ],
    "`compressed-tensors`: sparse": [
        (ct() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed as 'sparse-24-bitmask'"),
    ],
    "`compressed-tensors`: rotated": [
        (ct() | {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}, "rotated at run time"),
    ],
    "`modelopt`: FP8": [
        (dict(quant_method="modelopt", quant_algo="FP8"), scalar),
        (dict(quant_method="modelopt", quant_algo="FP8_PC_PT"), flat),
        (dict(quant_method="modelopt", quant_algo="FP8_PB_WO"), nested),
    ],
    "`modelopt`: no `quant_algo`": [(dict(quant_method="modelopt", kv_cache_quant_algo="FP8"), lambda w: ({"weight": w}, w))],
    "`modelopt`: NVFP4": [
        (dict(quant_method="modelopt", quant_algo=name), f"quantized by ModelOpt to '{name}'")
        for name in ("NVFP4", "W4A8_AWQ", "MIXED_PRECISION")
    ],
    "`quark`: FP8": [(quark("fp8_e4m3"), scalar), (quark("fp8_e4m3"), flat)],
    "`quark`: MXFP4": [(quark(name), f"quantized by Quark to '{name}'") for name in ("fp4", "int8")],
    "`quark`: rotated": [(quark("fp8_e4m3", algo_config=[{"name": "rotation", "r3": True}]), "rotated at run time")],
    "`fbgemm_fp8`": [(dict(quant_method="fbgemm_fp8"), channel)],
    "`fp8`: 128×128 tiles": [
        (dict(quant_method="fp8", weight_block_size=[128, 128]), fp8(FP8_BLOCK, "weight_scale_inv")),
        (dict(quant_method="fp8", weight_block_size=[128, 128]), lambda w: powers_of_two(w)),
    ],
    "`fp8`: a scale a matrix": [
        (dict(quant_method="fp8", activation_scheme="static"), scalar),
        (dict(quant_method="fp8"), fp8(FP8_PER_TENSOR, "weight_scale_inv", lambda s: s[0, 0])),
    ],
    "`fp8`: tiles of another size": [(dict(quant_method="fp8", weight_block_size=[64, 64]), r"FP8 in blocks of \[64, 64\]")],
    "`torchao`, `awq`": [
        (dict(quant_method=name), f"quantized with '{name}'")
        for name in ("torchao", "awq", "gptq", "bitsandbytes", "mxfp4", "inc")
    ],
    "float16 values": [({}, lambda w: ({"weight": w.half()}, w.half().float()))],
}  # fmt: skip


def powers_of_two(w: Tensor) -> Stored:
    q = quantize(w, FP8_BLOCK)
    assert q.scale is not None
    scale = e8m0(q.scale)
    means = scale.float().repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
    codes = (w / means).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * means


def llama(directory: Path, described: dict[str, Any]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**COMMON)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(6.0 if p.dim() > 1 else 1.0)  # so that a wrong scale is seen in the logits
    said = json.loads(config.to_json_string(use_diff=False)) | {"model_type": "llama"}
    if described:
        said["quantization_config"] = described
    (directory / "config.json").write_text(json.dumps(said))
    return model


def save(directory: Path, state: State) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors", {"format": "pt"})


def logprobs(llm: LLM, ids: list[int]) -> Tensor:
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    entries = llm.generate([ids], params, use_tqdm=False)[0].prompt_logprobs
    assert entries is not None
    return torch.tensor([entry[token].logprob for entry, token in zip(entries[1:], ids[1:], strict=True) if entry])


@cases("row", FORMATS)
def test_formats(row: str, tmp_path: Path) -> None:
    (fate,) = [cells[2] for cells in section("Formats") if cells[0].startswith(row)]
    for described, how in FORMATS[row]:
        model, state = llama(tmp_path, described), {}
        for name, tensor in model.state_dict().items():
            state[name] = tensor.clone()
            if callable(how) and name.endswith("_proj.weight"):
                parts, means = how(tensor)
                del state[name]
                state |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
                tensor.copy_(means)
        save(tmp_path, state)
        assert fate.startswith("refused" if isinstance(how, str) else "served")
        if isinstance(how, str):
            with pytest.raises(OctavoError, match=how) as raised:
                LLM(tmp_path, **HOW)
            assert str(raised.value).endswith(".")
            continue
        ids = tokens(40)
        llm = LLM(tmp_path, **HOW)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        coded = any(tensor.dtype.itemsize == 1 for tensor in state.values())
        # the inputs of FP8 layers are rounded to codes, too
        assert relative_error(logprobs(llm, ids), expected) < (0.025 if coded else 1e-4), (
            described
        )  # a scale wrong by a tenth: 0.04
        if coded and (found := stored_format_of(json.loads((tmp_path / "config.json").read_text()))) and "quark" not in row:
            ends = {end: list(shape) for end, _, shape in found.tensors(64, 64)}
            scale = state[next(name for name in state if "q_proj.weight_scale" in name)]
            assert torch.Size(ends["weight_scale"]).numel() == scale.numel(), described  # what a plan without weights takes
    assert len(section("Formats")) == len(FORMATS)


def test_float16_is_said(tmp_path: Path) -> None:
    """Also by config.json alone; values beyond float16's range are none of its own."""
    state = {name: tensor.half() for name, tensor in llama(tmp_path, {}).state_dict().items()}
    save(tmp_path, state)

    def noted(**how: Any) -> bool:
        return any("float16 values are rounded to bfloat16" in line for line in LLM(tmp_path, **HOW | how).info.report)

    assert [noted(dtype=kind) for kind in ("auto", "bfloat16", "float32")] == [True, True, False]
    save(tmp_path, {name: tensor.bfloat16() * 1e5 for name, tensor in state.items()})
    assert not noted(dtype="auto")
    file = tmp_path / "config.json"
    for key in ("torch_dtype", "dtype"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": None, "torch_dtype": None, key: "float16"}))
        assert noted(dtype="auto")


def listed(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_tensors_beside_a_models_own(tmp_path: Path) -> None:
    """Each is tried, and the code knows no other."""
    rows = section("Tensors beside a model's own")
    fates = ("skipped", "refused")
    names = {fate: [name for cells in rows if cells[2].startswith(fate) for name in listed(cells[0])] for fate in fates}
    assert sorted([*names["skipped"], *names["refused"]]) == sorted(
        [*WHY, *NOTHING_IF_ZERO, *NEEDED, "inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "cos_sin_cache"]
    )
    state = llama(tmp_path, {}).state_dict()
    at, table = "model.layers.1.self_attn.q_proj.", "model.layers.1.self_attn.rotary_emb."
    tables = {name for cells in rows if "rotary_emb" in cells[1] for name in listed(cells[0])}
    skipped = {(table if name in tables else at) + name: torch.zeros(3) for name in names["skipped"]}
    save(tmp_path, state | skipped)
    report = " ".join(LLM(tmp_path, **HOW).info.report)
    assert [name for name in names["skipped"] if name not in tables and f"1 {name}" not in report] == []
    assert not any(name in report for name in tables)
    for name in [*names["refused"], *NOTHING_IF_ZERO]:
        save(tmp_path, state | {at + name: torch.ones(3)})
        with pytest.raises(OctavoError, match=rf"the checkpoint holds {at}{name}: .*without it the model would be another"):
            LLM(tmp_path, **HOW)


def test_names() -> None:
    """Each is known to the code, which knows no other; tests/weights/test_names.py tries the kinds."""
    found = {name for cells in section("Names") for name in listed(cells[0])}
    stacked = {other for others, *_ in STACKED.values() for other in others}
    prefixes = {"model.", "language_model.model.", "model.language_model.", "lm_head.weight"}
    packed = {name.removeprefix("_") for name in PACKED}
    assert found == prefixes | {*WRAPPERS, *stacked} | packed | {name.removeprefix("model.") for name in ORIGINAL}
