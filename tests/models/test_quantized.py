"""Quantized models: logits against a float64-checked fake quantization in transformers and in compressed-tensors; stored
codes kept bit for bit; the same bytes whatever the tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from cases import cases
from conftest import COMMON, Loaded, LoadModel, relative_error, tokens
from quant import float64
from quant.float64 import E4M3FN, E4M3FNUZ, Format, array
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.models import llama
from octavo.platform import Platform
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QTensor, QuantRules, Scheme, WeightDType, quantize
from octavo.weights import Loader, SafetensorsSource, load

# Sums and scales in FP32, so that what is compared is the scheme and not BF16's rounding.
CPU = Platform(torch.device("cpu"), "test", widened_dtype=torch.float32)
FNUZ = dataclasses.replace(CPU, fp8_dtype=torch.float8_e4m3fnuz)
SCHEMES = [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK]
ODD = COMMON | dict(hidden_size=78, intermediate_size=150, num_attention_heads=6, num_key_value_heads=2, head_dim=14)
# Sums in another order differ in FP32's last bits, and now and then a value that lies between two codes goes the other way,
# which later layers amplify. So many short prompts are compared: most meet no such value and agree to FP32.
PROMPTS = [tokens(6, seed) for seed in range(9)]
BOUND = 1e-4


def tiny(path: Path, **changes: object) -> PreTrainedModel:
    """A Llama in FP32 whose weights BF16 holds exactly, in eager attention, written to `path`."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**(ODD | changes), attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 4 if p.ndim == 2 else p + torch.randn(p.shape) * 0.2).bfloat16().float())
    model.save_pretrained(path)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    """[prompts, positions, vocabulary]."""
    with torch.no_grad():
        found: Tensor = model(torch.tensor(PROMPTS)).logits
    return found


def octavo_logits(loaded: Loaded) -> Tensor:
    return torch.stack([loaded.logits(ids) for ids in PROMPTS])


def error(out: Tensor, expected: Tensor) -> float:
    """The median over prompts of ||out - expected|| / ||expected||."""
    return median(relative_error(a, b) for a, b in zip(out, expected, strict=True))


class FakeQuantized(nn.Module):
    """A Linear whose weight and inputs go through FP8 and back, in float64."""

    def __init__(self, linear: nn.Linear, scheme: str, fmt: Format):
        super().__init__()
        w, k = array(linear.weight), linear.in_features
        tile = float64.tile_of(scheme, *w.shape)
        self.weight = torch.from_numpy(float64.dequantize(*float64.quantize(w, tile, fmt), tile, fmt))
        self.group, self.fmt, self.bias = float64.group_of(scheme, k), fmt, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = float64.quantized_activation(array(x.reshape(-1, x.shape[-1])), self.group, self.fmt)
        y = (torch.from_numpy(flat) @ self.weight.mT).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def fake_quantize(model: PreTrainedModel, scheme: str, fmt: Format = E4M3FN, but: tuple[str, ...] = ("lm_head",)) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith(but):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FakeQuantized(module, scheme, fmt))


@cases("scheme", SCHEMES, ids=lambda s: s.name)
@cases(("on", "fmt"), [(CPU, E4M3FN), (FNUZ, E4M3FNUZ)], ids=["e4m3fn", "e4m3fnuz"])
def test_logits_equal_a_fake_quantized_model(
    scheme: Scheme, on: Platform, fmt: Format, tmp_path: Path, load_model: LoadModel
) -> None:
    model = tiny(tmp_path, attention_bias=True)
    dense = logits(model)
    fake_quantize(model, scheme.name, fmt)
    expected = logits(model)
    out = octavo_logits(load_model(tmp_path, scheme, on=on))
    assert error(out, expected) < BOUND
    assert error(out, dense) > 0.01  # the schemes do differ from no scheme


def test_schemes_are_told_apart(tmp_path: Path, load_model: LoadModel) -> None:
    tiny(tmp_path)
    outs = [octavo_logits(load_model(tmp_path, scheme, on=CPU)) for scheme in SCHEMES]
    assert all(error(a, b) > 0.01 for a, b in zip(outs, [*outs[1:], outs[0]], strict=True))


def test_layers_left_out_and_the_head(tmp_path: Path, load_model: LoadModel) -> None:
    model = tiny(tmp_path)
    fake_quantize(model, "ptpc_fp8", but=("down_proj", "layers.1.self_attn.o_proj"))
    rules = QuantRules(FP8_PER_CHANNEL, ["down_proj", "re:.*layers.1.self_attn.o"], quantize_lm_head=True)
    out = load_model(tmp_path, rules=rules, on=CPU)
    assert error(octavo_logits(out), logits(model)) < BOUND


# --- stored codes -----------------------------------------------------------------------


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def rewrite(path: Path, config: dict[str, object], store: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    """Replace every projection of the checkpoint by what `store` makes of it, and say so in config.json."""
    tensors = load_file(path / "model.safetensors")
    for name in filter(is_linear, list(tensors)):
        tensors |= {full: t.contiguous() for full, t in store(name, tensors[name].float()).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | {"quantization_config": config}))


def compressed_tensors(weights: str) -> dict[str, object]:
    """compressed-tensors' description of FP8 weights with a scale a "channel" or a "tensor" and dynamic tokens."""
    eight = dict(num_bits=8, type="float", symmetric=True)
    group = dict(
        targets=["Linear"],
        weights=eight | dict(strategy=weights, dynamic=False),
        input_activations=eight | dict(strategy="token", dynamic=True),
        output_activations=None,
    )
    return dict(
        quant_method="compressed-tensors", format="float-quantized", quantization_status="compressed",
        kv_cache_scheme=None, ignore=["lm_head"], config_groups={"group_0": group},
    )  # fmt: skip


HF_BLOCK = dict(
    quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128], modules_to_not_convert=["lm_head"]
)


def scaled(scheme: str) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """Stores codes and scales as other tools choose them: the scale a little larger than need be."""

    def store(name: str, w: Tensor) -> dict[str, Tensor]:
        tile = float64.tile_of(scheme, *w.shape)
        _, scales = float64.quantize(array(w), tile, E4M3FN)
        scales = scales.astype(np.float32) * np.float32(1.07)
        wide = np.repeat(np.repeat(scales, tile[0], 0)[: w.shape[0]], tile[1], 1)[:, : w.shape[1]]
        codes = torch.from_numpy(E4M3FN.nearest((array(w) / wide).astype(np.float32).astype(np.float64)))
        scale = torch.from_numpy(scales)
        return {
            name: codes.view(torch.float8_e4m3fn),
            f"{name}_scale{'_inv' if scheme == 'fp8_block' else ''}": scale.view(1) if scheme == "fp8" else scale,
        }

    return store


class Watch:
    """The stored weights that reach `ops.pack`, by the order of loading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.packed: list[QTensor] = []
        pack = ops.pack

        def watched(q: QTensor, platform: Platform, **options: bool) -> ops.PackedWeight:
            self.packed.append(q)
            return pack(q, platform, **options)

        monkeypatch.setattr(ops, "pack", watched)

    def codes(self) -> list[bytes]:
        """Every quantized matrix, without its padding."""
        quantized = [q for q in self.packed if q.scheme.quantized]
        return [q.data[: q.shape[0], : q.shape[1]].contiguous().view(torch.uint8).numpy().tobytes() for q in quantized]


def stored_codes(path: Path) -> list[bytes]:
    """What the checkpoint holds for each of Octavo's products, in the order of its layers."""
    tensors = load_file(path / "model.safetensors")
    fused = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    fused += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    return [
        torch.cat([tensors[f"model.layers.{i}.{name}.weight"].view(torch.uint8) for name in names]).numpy().tobytes()
        for i in range(COMMON["num_hidden_layers"])
        for names in fused
    ]


CHECKPOINTS = {
    "compressed-tensors, channel": (compressed_tensors("channel"), FP8_PER_CHANNEL),
    "compressed-tensors, tensor": (compressed_tensors("tensor"), FP8_PER_TENSOR),
    "Hugging Face fp8, block": (HF_BLOCK, FP8_BLOCK),
}


@cases("name", CHECKPOINTS)
@cases("asked", [None, FP8_PER_TENSOR, FP8_BLOCK], ids=str)
def test_stored_codes_are_kept(
    name: str, asked: Scheme | None, tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, scheme = CHECKPOINTS[name]
    tiny(tmp_path)
    rewrite(tmp_path, config, scaled(scheme.name))
    watch = Watch(monkeypatch)
    loaded = load_model(tmp_path, on=CPU, rules=QuantRules(asked) if asked else None)
    assert watch.codes() == stored_codes(tmp_path)
    assert {s for (_, s) in loaded.loader.report.groups} == {"bf16", scheme.name}


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_logits_equal_compressed_tensors_own(
    strategy: str, tmp_path: Path, load_model: LoadModel, capfd: pytest.CaptureFixture[str]
) -> None:
    config, scheme = CHECKPOINTS[f"compressed-tensors, {strategy}"]
    tiny(tmp_path)
    rewrite(tmp_path, config, scaled(scheme.name))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    assert theirs.model.layers[0].mlp.down_proj.quantization_scheme.input_activations.dynamic  # it does quantize activations
    expected = logits(theirs)
    out = octavo_logits(load_model(tmp_path, on=CPU))
    assert error(out, expected) < BOUND


def test_logits_equal_hugging_face_fp8(tmp_path: Path, load_model: LoadModel) -> None:
    """The dense model of the stored values, with activations quantized in groups of 128."""
    reference = tiny(tmp_path, hidden_size=256, head_dim=128, num_attention_heads=2, num_key_value_heads=1)
    rewrite(tmp_path, HF_BLOCK, scaled("fp8_block"))
    tensors = load_file(tmp_path / "model.safetensors")
    fake_quantize(reference, "fp8_block")
    for name, module in reference.named_modules():
        if isinstance(module, FakeQuantized):
            codes, scales = (array(tensors[f"{name}.weight{end}"]) for end in ("", "_scale_inv"))
            wide = np.repeat(np.repeat(scales, 128, 0)[: codes.shape[0]], 128, 1)[:, : codes.shape[1]]
            module.weight = torch.from_numpy(codes * wide)
    assert error(octavo_logits(load_model(tmp_path, on=CPU)), logits(reference)) < BOUND


# --- tensor parallelism -----------------------------------------------------------------


class Rank(TensorParallel):
    """One of two ranks; what they agree on is the maximum over both, collected in a first round of loading."""

    def __init__(self, rank: int, seen: list[list[Tensor]], agreed: list[Tensor] | None):
        super().__init__(rank, 2)
        object.__setattr__(self, "seen", seen[rank])
        object.__setattr__(self, "agreed", agreed and list(agreed))

    def max_reduce(self, x: Tensor) -> Tensor:
        if self.agreed is None:
            self.seen.append(x)
            return x
        return self.agreed.pop(0)


def load_rank(path: Path, scheme: Scheme, tp: TensorParallel) -> None:
    ops.bind(CPU)
    c = llama.Config.from_json(json.loads((path / "config.json").read_text()))
    model = llama.Model(c, tp, 64)
    load(model, Loader(SafetensorsSource(path), CPU, QuantRules(scheme), torch.float32, tp), model.ignored)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_weight_bytes_do_not_depend_on_the_number_of_ranks(
    scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=64)
    tiny(tmp_path, **sizes, num_hidden_layers=1)
    watch = Watch(monkeypatch)
    load_rank(tmp_path, scheme, TensorParallel())
    whole, watch.packed = watch.packed, []
    seen: list[list[Tensor]] = [[], []]
    for rank in range(2):
        load_rank(tmp_path, scheme, Rank(rank, seen, None))
    agreed = [torch.maximum(a, b) for a, b in zip(*seen, strict=True)]
    watch.packed = []
    for rank in range(2):
        load_rank(tmp_path, scheme, Rank(rank, seen, agreed))
    halves = list(zip(watch.packed[: len(whole)], watch.packed[len(whole) :], strict=True))
    for one, parts, matrices in zip(whole, halves, (3, 0, 2, 0, 1), strict=True):  # qkv, o, gate-up, down, head
        data = [part.data.view(torch.uint8) for part in parts]
        if matrices == 0:
            joined = torch.cat(data, 1)
        else:
            joined = torch.cat([half.chunk(matrices)[i] for i in range(matrices) for half in data])
        assert torch.equal(joined, one.data.view(torch.uint8))


def test_quantized_weights_take_half_of_bf16(tmp_path: Path, load_model: LoadModel) -> None:
    """As stored, scales included; what a CPU holds is said beside it."""
    tiny(tmp_path, hidden_size=512, intermediate_size=1024, head_dim=64, num_attention_heads=8, num_key_value_heads=4)
    report = load_model(tmp_path, FP8_PER_CHANNEL, dtype=torch.bfloat16, on=CPU).loader.report
    values, stored = (report.total(what, WeightDType.FP8) for what in ("values", "stored"))
    assert values == 3 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 1024)
    assert 0.5 < stored / (2 * values) < 0.51
    assert report.total("held", WeightDType.FP8) >= 4 * values  # FP32 here


def test_quantize_is_what_the_loader_stores(tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path)
    watch = Watch(monkeypatch)
    load_model(tmp_path, FP8_PER_CHANNEL, on=CPU)
    w = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert watch.codes()[1] == quantize(w, FP8_PER_CHANNEL).data.view(torch.uint8).numpy().tobytes()
