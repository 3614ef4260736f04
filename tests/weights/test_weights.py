"""Loading: what it takes in memory, and one clear sentence for every checkpoint that cannot be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import LoadModel, relative_error, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.models import architecture, llama
from octavo.ops.cpu.library import missing
from octavo.platform import Platform
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QuantRules, Scheme, dequantize, qtensor, quantize
from octavo.quant.scheme import BLOCK, WeightDType
from octavo.weights import DummySource, Loader, SafetensorsSource, load
from octavo.weights import loader as loader_module

CONFIG: dict[str, Any] = dict(
    model_type="llama", vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
)  # fmt: skip
CPU = Platform(torch.device("cpu"), "test", widened_dtype=torch.float32)


def tensors_of(c: dict[str, Any]) -> dict[str, Tensor]:
    """A random checkpoint of a Llama's config.json."""
    hidden, inner, kv = (
        c["hidden_size"],
        c["intermediate_size"],
        c["hidden_size"] * c["num_key_value_heads"] // c["num_attention_heads"],
    )
    shapes = dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (hidden, hidden))
    shapes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (kv, hidden))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden)) | {"mlp.down_proj": (hidden, inner)}
    shapes |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    names = {f"model.layers.{i}.{name}": shape for i in range(c["num_hidden_layers"]) for name, shape in shapes.items()}
    names |= dict.fromkeys(("model.embed_tokens", "lm_head"), (c["vocab_size"], hidden)) | {"model.norm": (hidden,)}
    return {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in names.items()}


def write(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A checkpoint directory; a change to None leaves the field out of config.json."""
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(CONFIG) if tensors is None else tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return write(tmp_path)


# --- memory -----------------------------------------------------------------------------


class Accounting(TorchDispatchMode):
    """Bytes of the tensors that are alive after each torch operation, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.opaque = WeakTensorKeyDictionary()  # oneDNN's layouts, which have no storage
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.live)
        return out

    def add(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            self.opaque[tensor] = tensor.numel() * tensor.itemsize
            return
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)
        self.storages[ref.cdata] = (ref, storage.nbytes())

    @property
    def live(self) -> int:
        self.storages = {key: item for key, item in self.storages.items() if not item[0].expired()}
        return sum(size for _, size in self.storages.values()) + sum(self.opaque.values())


@cases("scheme", [BF16, FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
@cases("hoard", [False, True], ids=["as it is", "dense copies kept"])
def test_loading_takes_the_model_and_one_layer(
    scheme: Scheme, hoard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = CONFIG | dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6)
    write(tmp_path, tensors_of(sizes), **sizes)
    monkeypatch.setattr(qtensor, "CHUNK", 1 << 15)  # the layers are small, so must be what is converted at a time
    kept: list[object] = []
    if hoard:  # what the bound is there to find
        read = loader_module.read_weight
        monkeypatch.setattr(loader_module, "read_weight", lambda *args: kept.append(found := read(*args)) or found)
    ops.bind(CPU)
    model = llama.Model(llama.Config.from_json(sizes), TensorParallel(), 64)
    with Accounting() as accounting:
        loader = Loader(SafetensorsSource(tmp_path), CPU, QuantRules(scheme), torch.bfloat16)
        load(model, loader)
    kept.clear()
    finished = accounting.live
    report = loader.report
    cos_sin = model.model.layers[0].self_attn.rotary_emb.cos_sin
    assert finished == pytest.approx(report.total("held") + cos_sin.nbytes, rel=1e-3)
    one_layer = sum(group.held for (role, _), group in report.groups.items() if role in ("attention", "mlp")) / 6
    converted = 3 * 4 * BLOCK * sizes["intermediate_size"]  # a tile's rows in FP32, their scales and their quotients
    assert (accounting.peak > finished + one_layer + converted) is hoard


@cases("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
@cases("on", [CPU, Platform(torch.device("cpu"), "test")], ids=["widened", "native"])
def test_a_tied_matrix_is_held_once(scheme: Scheme, on: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As codes, which are both looked up and multiplied by where nothing has to be widened; no BF16 copy is left of it."""
    sizes = CONFIG | dict(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=2048, tie_word_embeddings=True
    )
    tensors = tensors_of(sizes)
    del tensors["lm_head.weight"]
    write(tmp_path, tensors, **sizes)
    monkeypatch.setattr(qtensor, "CHUNK", 1 << 15)
    ops.bind(on)
    model = llama.Model(llama.Config.from_json(sizes), TensorParallel(), 64)
    with Accounting() as accounting:
        loader = Loader(SafetensorsSource(tmp_path), on, QuantRules(scheme, quantize_lm_head=True), torch.bfloat16)
        load(model, loader)
    report, finished = loader.report, accounting.live
    cos_sin = model.model.layers[0].self_attn.rotary_emb.cos_sin
    embedding = report.groups["embedding", scheme.name]
    codes = 2048 * 256
    scales = embedding.stored - codes
    assert scales == 4 * (2048 if scheme is not FP8_BLOCK else 16 * 2)
    if on.widened_dtype is None and missing() is None:  # the product's own scales, and the look-up's, unless they are the same
        head = model.lm_head.weight
        assert embedding.held == codes + (2 if head.stored is not None else 1) * scales
        assert head.stored is None or head.data.data_ptr() == head.stored.data.data_ptr()
    assert finished == pytest.approx(report.total("held") + cos_sin.nbytes, rel=1e-3)
    one_layer = sum(group.held for (role, _), group in report.groups.items() if role in ("attention", "mlp")) / 6
    converted = 3 * 4 * BLOCK * sizes["intermediate_size"]
    assert accounting.peak < finished + one_layer + converted


def test_values_are_those_of_the_checkpoint_and_progress_is_told(checkpoint: Path) -> None:
    ops.bind(CPU)
    model = llama.Model(llama.Config.from_json(CONFIG), TensorParallel(), 64)
    told: list[float] = []
    load(model, Loader(SafetensorsSource(checkpoint), CPU, QuantRules(), torch.bfloat16), progress=told.append)
    stored = load_file(checkpoint / "model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    assert torch.equal(model.model.layers[1].input_layernorm.weight, stored["model.layers.1.input_layernorm.weight"])
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) > 10


# --- files ------------------------------------------------------------------------------


def shard(path: Path, pieces: int = 3) -> dict[str, str]:
    """Split model.safetensors over several files with an index; gives its weight_map."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(pieces):
        file = f"model-{i + 1:05}-of-{pieces:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::pieces]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_a_sharded_checkpoint_is_the_same_model(checkpoint: Path, load_model: LoadModel) -> None:
    ids = [3 + i % 29 for i in tokens(12)]
    expected = load_model(checkpoint).logits(ids)
    shard(checkpoint)
    assert torch.equal(load_model(checkpoint).logits(ids), expected)
    save_file({"other": torch.ones(3)}, checkpoint / "consolidated.safetensors")  # not in the index
    assert torch.equal(load_model(checkpoint).logits(ids), expected)


def test_other_safetensors_beside_the_model_are_not_read(checkpoint: Path, load_model: LoadModel) -> None:
    save_file({"tok_embeddings.weight": torch.ones(3)}, checkpoint / "consolidated.safetensors")
    load_model(checkpoint)


def test_tied_embeddings_may_be_repeated(tmp_path: Path, load_model: LoadModel) -> None:
    tensors = tensors_of(CONFIG)
    ids = [3 + i % 29 for i in tokens(9)]
    expected = load_model(write(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})).logits(
        ids
    )
    for case in (tensors, {name: t for name, t in tensors.items() if name != "lm_head.weight"}):
        out = load_model(write(tmp_path, case, tie_word_embeddings=True)).logits(ids)
        assert relative_error(out, expected) < 1e-6


Damage = Callable[[Path], object]


def edit(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return damage


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def garble(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)


def lose_a_shard(path: Path) -> None:
    shard(path)
    (path / "model-00002-of-00003.safetensors").unlink()


def index_of(text: str) -> Damage:
    return lambda path: (path / "model.safetensors.index.json").write_text(text)


def misplace(path: Path) -> None:
    weight_map = shard(path) | {"model.layers.7.mlp.up_proj.weight": "model-00001-of-00003.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


Q = "model.layers.1.self_attn.q_proj.weight"
FILES: dict[str, tuple[Damage, list[str]]] = {
    "a missing matrix": (edit(lambda t: t.pop(Q)), [Q, "no tensor"]),
    "a missing norm": (edit(lambda t: t.pop("model.norm.weight")), ["model.norm.weight"]),
    "a missing head": (edit(lambda t: t.pop("lm_head.weight")), ["lm_head.weight"]),
    "an extra tensor": (edit(lambda t: t.update({"model.extra": torch.ones(2)})), ["1 tensor", "model.extra"]),
    "an extra bias": (edit(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})), ["q_proj.bias"]),
    "another shape": (edit(lambda t: t.update({Q: torch.ones(32, 31)})), [Q, "[32, 31]", "[32, 32]"]),
    "a norm of another shape": (edit(lambda t: t.update({"model.norm.weight": torch.ones(33)})), ["model.norm.weight", "[33]"]),
    "a scale of another shape": (
        edit(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn), f"{Q}_scale": torch.ones(5)})),
        [f"{Q}_scale", "[5]"],
    ),
    "FP8 without a scale": (edit(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), [Q, "without a scale"]),
    "a truncated file": (cut, ["model.safetensors", "truncated or corrupt"]),
    "a corrupt header": (garble, ["model.safetensors", "truncated or corrupt"]),
    "an empty file": (lambda path: (path / "model.safetensors").write_bytes(b""), ["model.safetensors", "corrupt"]),
    "an absent shard": (lose_a_shard, ["model-00002-of-00003.safetensors", "is missing"]),
    "an index with a tensor too many": (misplace, ["model.layers.7.mlp.up_proj.weight", "index.json"]),
    "an index that is not JSON": (index_of("{"), ["index.json", "not valid JSON"]),
    "an index without a map": (index_of("{}"), ["index.json", "not a safetensors index"]),
    "an index of a list": (index_of('{"weight_map": ["a"]}'), ["index.json", "not a safetensors index"]),
    "an index of numbers": (index_of('{"weight_map": {"a": 1}}'), ["index.json", "not a safetensors index"]),
    "an empty index": (index_of('{"weight_map": {}}'), []),
    "no safetensors": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), ["no .safetensors files", ".bin"],
    ),
    "no config.json": (lambda path: (path / "config.json").unlink(), ["no config.json"]),
    "config.json of nonsense": (lambda path: (path / "config.json").write_text("{'a': 1}"), ["config.json", "not valid JSON"]),
    "config.json of a list": (lambda path: (path / "config.json").write_text("[]"), ["config.json"]),
    "config.json of bytes": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json"]),
}  # fmt: skip


def assert_one_sentence(text: str, parts: list[str]) -> None:
    assert "\n" not in text
    assert text.endswith((".", "?")), text
    for part in parts:
        assert part in text


@cases("name", FILES)
def test_damaged_files_are_named(name: str, checkpoint: Path, load_model: LoadModel) -> None:
    damage, parts = FILES[name]
    load_model(checkpoint)
    damage(checkpoint)
    with pytest.raises(OctavoError) as raised:
        load_model(checkpoint)
    assert_one_sentence(str(raised.value), parts)


def test_paths_that_are_no_checkpoint(checkpoint: Path, load_model: LoadModel) -> None:
    for path, part in ((checkpoint / "nowhere", "no model at"), (checkpoint / "config.json", "is a file")):
        with pytest.raises(OctavoError) as raised:
            load_model(path)
        assert_one_sentence(str(raised.value), [part, str(path)])


# A change of config.json, and what the sentence must name.
CONFIGS: list[tuple[dict[str, Any], list[str]]] = [
    (dict(model_type="lama"), ["'lama'", "did you mean 'llama'"]),
    (dict(model_type="t5"), ["'t5'", "llama, mistral"]),
    (dict(model_type=None), ["no model_type"]),
    (dict(model_type=7), ["model_type"]),
    (dict(hidden_size=None), ["no hidden_size"]),
    (dict(num_attention_heads=None), ["num_attention_heads"]),
    (dict(num_attention_heads=0), ["num_attention_heads"]),
    (dict(hidden_size="32"), ["hidden_size", "'32'"]),
    (dict(hidden_size=32.5), ["hidden_size", "32.5"]),
    (dict(hidden_size=True), ["hidden_size"]),
    (dict(hidden_size=-32), ["hidden_size"]),
    (dict(hidden_size=64), ["model.embed_tokens.weight", "[32, 32]", "[32, 64]"]),
    (dict(hidden_size=[32]), ["hidden_size"]),
    (dict(vocab_size=33), ["model.embed_tokens.weight", "[33, 32]"]),
    (dict(num_hidden_layers=3), ["model.layers.2."]),
    (dict(num_hidden_layers=1), ["model.layers.1."]),
    (dict(num_key_value_heads=3), ["num_key_value_heads"]),
    (dict(rms_norm_eps="small"), ["rms_norm_eps"]),
    (dict(tie_word_embeddings="yes"), ["tie_word_embeddings"]),
    (dict(attention_bias=True), ["q_proj.bias"]),
    (dict(hidden_act="gelu"), ["'gelu'"]),
    (dict(rope_scaling="linear"), ["rope"]),
    (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), ["'longrope'"]),
    (dict(rope_scaling=dict(rope_type="linear")), ["factor"]),
    (dict(rope_scaling=dict(rope_type="linear", factor="2")), ["factor"]),
    (dict(rope_scaling=dict(rope_type=["linear"], factor=2.0)), ["rope_type"]),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), ["low_freq_factor"]),
    (
        dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)),
        ["original_max_position_embeddings"],
    ),
    (dict(rope_scaling=dict(rope_type="yarn", factor=2.0, beta_fast="32")), ["beta_fast"]),
    (dict(rope_scaling=dict(rope_type="linear", factor=0)), ["factor"]),
    (dict(rope_theta="10000"), ["rope_theta"]),
    (dict(head_dim=7), ["head_dim"]),
]


@cases(("changes", "parts"), CONFIGS, ids=lambda x: str(x)[:60])
def test_wrong_configs_are_named(changes: dict[str, Any], parts: list[str], tmp_path: Path, load_model: LoadModel) -> None:
    write(tmp_path, **changes)
    with pytest.raises(OctavoError) as raised:
        load_model(tmp_path)
    assert_one_sentence(str(raised.value), parts)


@cases("changes", [dict(layer_types=5), dict(layer_types=["full_attention"]), dict(sliding_window="7")], ids=str)
@cases("model_type", ["qwen2", "qwen3"])
def test_wrong_windows_are_named(model_type: str, changes: dict[str, Any], tmp_path: Path, load_model: LoadModel) -> None:
    write(tmp_path, model_type=model_type, **changes)
    with pytest.raises(OctavoError) as raised:
        load_model(tmp_path)
    assert_one_sentence(str(raised.value), list(changes))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_every_layer_may_slide(model_type: str) -> None:
    changes = dict(model_type=model_type, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    config = architecture(CONFIG | changes).Config.from_json(CONFIG | changes)
    assert [config.window(i) for i in range(2)] == [8, 8]


# --- random weights ---------------------------------------------------------------------


def dummy(scheme: Scheme = BF16, head: bool = False, **changes: Any) -> tuple[Any, Loader]:
    ops.bind(CPU)
    model = llama.Model(llama.Config.from_json(CONFIG | changes), TensorParallel(), 64)
    loader = Loader(DummySource(), CPU, QuantRules(scheme, quantize_lm_head=head), torch.bfloat16)
    load(model, loader, model.ignored)
    return model, loader


def test_dummy_weights_are_random_and_repeatable() -> None:
    (model, loader), (again, _) = dummy(FP8_PER_CHANNEL, attention_bias=True), dummy(FP8_PER_CHANNEL, attention_bias=True)
    embedding = model.model.embed_tokens.weight
    assert torch.equal(embedding, again.model.embed_tokens.weight)
    assert embedding.float().std() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model.model.norm.weight, torch.ones(32, dtype=torch.bfloat16))
    assert not model.model.layers[0].self_attn.qkv_proj.bias.any()
    assert loader.report.total("values", WeightDType.FP8) == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)


def test_dummy_weights_of_a_tied_head() -> None:
    ids = torch.tensor([3, 30, 3])
    (dense, _), (model, loader) = dummy(tie_word_embeddings=True), dummy(FP8_PER_CHANNEL, True, tie_word_embeddings=True)
    q = quantize(dense.model.embed_tokens(torch.arange(32)), FP8_PER_CHANNEL)
    assert torch.equal(model.model.embed_tokens(ids), dequantize(q)[ids].bfloat16())
    assert loader.report.groups["embedding", "ptpc_fp8"].stored == q.nbytes


def test_dummy_matrices_differ() -> None:
    source = DummySource()
    names = [f"model.layers.{i}.{name}" for i in range(4) for name in ("q_proj.weight", "up_proj.weight")]
    matrices = [source.read(name, (40, 50), 0, slice(0, 40), CPU.device) for name in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])
    large = source.read("large", (1200, 1000), 0, slice(0, 1200), CPU.device)  # more values than the pool
    assert len({row[:8].float().numpy().tobytes() for row in large}) == 1200


def test_dummy_norms_keep_what_they_are_given() -> None:
    """Of zeros all that follows would be zeros, and run faster than values do."""
    for name in ("input_layernorm.weight", "model.norm.weight", "blocks.0.norm1.weight", "norm0.weight"):
        assert torch.equal(DummySource().read(name, (8,), 0, slice(0, 8), CPU.device), torch.ones(8).bfloat16()), name
    assert not DummySource().read("blocks.0.norm1.bias", (8,), 0, slice(0, 8), CPU.device).any()
