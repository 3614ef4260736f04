"""Checkpoints that hold what is no number: one sentence, whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import cases
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.errors import OctavoError
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QuantRules, Scheme, quantize
from octavo.tools.quantize.quantize import quantize_checkpoint
from octavo.weights import finite
from octavo.weights.finite import FiniteCheck

Tensors = dict[str, Tensor]
FP8 = {"fp8": FP8_PER_TENSOR, "ptpc_fp8": FP8_PER_CHANNEL, "fp8_block": FP8_BLOCK}
NAN, INF = float("nan"), float("inf")
O_PROJ, DOWN = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
K_SCALE = "model.layers.1.self_attn.k_scale"
SIZES = dict(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip
OPTIONS = dict(device="cpu", threads=1, block_size=4, max_model_len=64, cpu_kv_cache_gib=0.01)


def quantized(tensors: Tensors, scheme: Scheme) -> Tensors:
    out = dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        q = quantize(tensors[name], scheme)
        assert q.scale is not None
        out |= {name: q.data, f"{name}_scale": q.scale[:1, 0] if scheme is FP8_PER_TENSOR else q.scale}
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def packed(tensors: Tensors) -> Tensors:
    """INT4 in groups of 32, with scales of both signs as some tools have them."""
    out = dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        n, k = out.pop(name).shape
        module = name.removesuffix(".weight")
        out[f"{module}.weight_packed"] = pack_to_int32(torch.randint(-8, 8, (n, k), dtype=torch.int8), 4)
        out[f"{module}.weight_scale"] = ((torch.rand(n, k // 32) - 0.5) / 50).bfloat16()
        out[f"{module}.weight_shape"] = torch.tensor([n, k])
    return out


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensors]]:
    """A checkpoint's config.json and tensors, which are numbers, stored in one of the formats."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sound")
    LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(path)
    dense = load_file(path / "model.safetensors")
    dense |= {f"model.layers.{i}.self_attn.{x}_scale": torch.tensor(0.02) for i in range(2) for x in "kv"}

    def made(stored: str) -> tuple[Path, Tensors]:
        if stored in FP8:
            return path / "config.json", quantized(dense, FP8[stored])
        if stored == "int4":
            return path / "config.json", packed({n: t.clone() for n, t in dense.items()})
        return path / "config.json", {n: t.to(getattr(torch, stored)).clone() for n, t in dense.items()}

    return made


def write(directory: Path, config: Path, tensors: Tensors, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(json.loads(config.read_text()) | changes))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def serve(model: Path, quantization: str | None) -> None:
    EngineCore(EngineConfig(model=str(model), quantization=quantization, **OPTIONS))  # type: ignore[arg-type]


def offline(model: Path, quantization: str | None) -> None:
    LLM(str(model), quantization=quantization, **OPTIONS)  # type: ignore[arg-type]


def convert(model: Path, quantization: str | None) -> None:
    scheme = FP8[quantization or "ptpc_fp8"]
    quantize_checkpoint(model, model / f"out-{scheme.name}", QuantRules(scheme), say=lambda _: None, requantize_int4=True)


def poke(tensors: Tensors, name: str, value: float) -> None:
    """Puts one value, or the byte of an FP8 code, into the last place of a tensor."""
    flat = tensors[name].view(-1)
    if flat.dtype in finite.FIRST_NON_FINITE:
        flat.view(torch.uint8)[-1] = int(value)
    else:
        flat[-1] = value


DENSE = [f"{O_PROJ}.weight", f"{DOWN}.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
         "model.embed_tokens.weight", "lm_head.weight"]  # fmt: skip
DAMAGES = [
    *((stored, name, value) for stored in ("bfloat16", "float16", "float32") for name in DENSE for value in (NAN, INF, -INF)),
    *(("bfloat16", K_SCALE, value) for value in (NAN, INF, 0.0, -1.0, 1e30, 1e-30)),
    *((stored, f"{DOWN}.weight", code) for stored in FP8 for code in (0x7F, 0xFF)),
    *((stored, f"{DOWN}.weight_scale", value) for stored in FP8 for value in (NAN, INF, -1.0, 1e37)),
    *((stored, name, NAN) for stored in (*FP8, "int4") for name in ("model.embed_tokens.weight", "model.norm.weight", K_SCALE)),
    *(("int4", f"{DOWN}.weight_scale", value) for value in (NAN, INF, -INF, 1e37)),
]


@cases(("stored", "name", "value"), DAMAGES, ids=lambda x: str(x).removeprefix("model."))
def test_what_is_no_number_is_refused_alike(
    stored: str, name: str, value: float, sound: Callable[[str], tuple[Path, Tensors]], tmp_path: Path
) -> None:
    config, tensors = sound(stored)
    poke(tensors, name, value)
    model = write(tmp_path / "model", config, tensors)
    said = set()
    asked = [None, "ptpc_fp8", "fp8", "fp8_block"] if stored == "bfloat16" and name.endswith("proj.weight") else [None]
    for quantization in asked:
        for reader in (serve, offline, convert):
            with pytest.raises(OctavoError) as refusal:
                reader(model, quantization)
            said.add(str(refusal.value))
    assert len(said) == 1
    sentence = said.pop()
    assert sentence.startswith(f"{name} in model.safetensors holds ")
    assert sentence.endswith("; download it again, or convert it anew from the original weights.")
    assert not list(model.glob("out*/*.safetensors"))


@cases("name", [f"{DOWN}.weight_scale", K_SCALE])
@cases("stored", ["int4", *FP8])
def test_scales_whose_header_calls_them_integers_are_refused_alike(
    stored: str, name: str, sound: Callable[[str], tuple[Path, Tensors]], tmp_path: Path
) -> None:
    """Whatever they are: NaN, or what they were."""
    config, tensors = sound(stored)
    kind = {2: torch.int16, 4: torch.int32}[tensors[name].dtype.itemsize]
    for value in (None, NAN):
        if value is not None:
            poke(tensors, name, value)
        model = write(tmp_path / str(value), config, tensors | {name: tensors[name].view(kind)})
        for reader in (serve, offline, convert):
            with pytest.raises(OctavoError) as refusal:
                reader(model, None)
            assert str(refusal.value).startswith(
                f"{name} in model.safetensors is stored as {str(kind).removeprefix('torch.')}, and scales are floating-point; "
            )


@cases("stored", ["bfloat16", "float16", "float32", "int4", *FP8])
def test_numbers_are_served(stored: str, sound: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    """Also the largest code, a matrix of zeros with scales of 0, as some tools write them, and codes that are -0."""
    config, tensors = sound(stored)
    if stored in FP8:
        poke(tensors, f"{DOWN}.weight", 0x7E)
        tensors[f"{O_PROJ}.weight"].view(torch.uint8).fill_(0x80)
        tensors[f"{O_PROJ}.weight_scale"].zero_()
    elif stored == "bfloat16":
        poke(tensors, f"{O_PROJ}.weight", 1e4)
    model = write(tmp_path / "model", config, tensors)
    for reader in (serve, offline, convert):
        reader(model, None)


CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_code(dtype: torch.dtype) -> None:
    for code, value in zip(CODES.view(-1, 1), CODES.view(dtype).float(), strict=True):
        stored = torch.cat([torch.tensor([0, 0x80, 0x3C, 0xBC], dtype=torch.uint8), code]).view(dtype)
        if value.isfinite():
            FiniteCheck().look("a.weight", "file", stored)
        else:
            with pytest.raises(OctavoError, match=r"a\.weight in file holds FP8 codes"):
                FiniteCheck().look("a.weight", "file", stored)


def test_scales_in_bytes_are_powers_of_two() -> None:
    check = FiniteCheck()
    check.look("a.weight_scale_inv", "file", torch.tensor([0, 127, 150], dtype=torch.uint8))
    check.look("a.ids", "file", torch.tensor([255], dtype=torch.uint8))
    for dtype in (torch.uint8, torch.float8_e8m0fnu):
        for byte in (255, 254):  # NaN, and 2 ** 127
            with pytest.raises(OctavoError, match=r"a\.weight_scale_inv in file holds"):
                check.look("a.weight_scale_inv", "file", torch.tensor([120, byte], dtype=torch.uint8).view(dtype))


def test_a_device_is_asked_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "AT_ONCE", frozenset())
    check = FiniteCheck()
    check.look("a", "file", torch.ones(3))
    check.finish()
    for name, value in (("a", 1.0), ("b", NAN), ("c", INF)):
        check.look(name, "file", torch.tensor([0.0, value]))
    with pytest.raises(OctavoError, match="b in file holds NaN or infinity"):
        check.finish()
    check.finish()  # what was said is forgotten


@pytest.mark.parametrize("damaged", ["rope_theta", "lm_head"])
def test_first_logits_that_are_no_numbers(damaged: str, sound: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    config, tensors = sound("bfloat16")
    changes = {}
    if damaged == "rope_theta":
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e-300}
    else:
        tensors["lm_head.weight"].fill_(3e38)
    model = write(tmp_path / "model", config, tensors, **changes)
    for reader in (serve, offline):
        with pytest.raises(OctavoError, match="the model's first logits are NaN or infinite"):
            reader(model, None)


def test_reloaded_weights_are_looked_at(sound: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    config, tensors = sound("bfloat16")
    core = EngineCore(EngineConfig(model=str(write(tmp_path / "a", config, tensors)), **OPTIONS))  # type: ignore[arg-type]
    tensors["lm_head.weight"].fill_(3e38)
    with pytest.raises(OctavoError, match="first logits"):
        core.reload(str(write(tmp_path / "b", config, tensors)))
    poke(tensors, "lm_head.weight", NAN)
    with pytest.raises(OctavoError, match=r"lm_head\.weight in model\.safetensors holds NaN"):
        core.reload(str(write(tmp_path / "c", config, tensors)))
