"""Weights of the same shapes written where the old ones are, and an engine that gives its memory up for a while."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import cases
from conftest import COMMON, tokens
from models.test_logits import deepseek_v32, randomize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from octavo import LLM, SamplingParams, ops
from octavo.errors import OctavoError
from octavo.messages import EngineRequest
from octavo.ops import PackedStack, PackedWeight
from octavo.platform import Platform
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_W8A16, QTensor, quantize
from octavo.quant.qtensor import Stacker
from octavo.weights.in_place import held, overwrite

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = [tokens(20, 1), tokens(20, 1)[:12] + tokens(9, 2), tokens(3, 3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of the same shapes, and one of another."""
    paths = []
    for seed, changes in ((0, {}), (1, {}), (0, {"intermediate_size": 128})):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(COMMON | changes)))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.ndim == 2 else 1)
        paths.append(tmp_path_factory.mktemp("model"))
        model.save_pretrained(paths[-1])
    return paths


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two with experts, whose other weights are the same."""
    config = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=16)
    torch.manual_seed(0)
    model, paths = Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON | config)), []
    for _ in range(2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.randn(p.shape) / 8 if "experts" in name else p)
        paths.append(tmp_path_factory.mktemp("mixture"))
        model.save_pretrained(paths[-1])
    return paths


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two with latent attention, an indexer in each layer, and experts."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        paths.append(tmp_path_factory.mktemp("latents"))
        randomize(deepseek_v32()).save_pretrained(paths[-1])
    return paths


def load(model: Path, **options: Any) -> LLM:
    sizes = dict(threads=1, block_size=4, max_model_len=100, cpu_kv_cache_gib=0.01)
    return LLM(str(model), **({"device": "cpu"} | sizes | options))


def generate(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def addresses(llm: LLM) -> list[int]:
    """Of every strided tensor of the model's weights."""
    found = []
    for module in llm._core.runner.model.modules():  # type: ignore[attr-defined]
        for value in held(module).values():
            inside = vars(value).values() if isinstance(value, (PackedStack, PackedWeight)) else [value]
            found += [t.data_ptr() for t in inside if isinstance(t, torch.Tensor) and t.layout is torch.strided]
    return found


OPTIONS = [
    {"dtype": "float32"},
    {"quantization": "ptpc_fp8", "kv_cache_dtype": "fp8"},
    {"quantization": "fp8_block", "quantize_lm_head": True},
    {"quantization": "fp8", "kv_cache_dtype": "fp8", "calculate_kv_scales": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_reloaded_weights_give_the_other_models_tokens(models: list[Path], options: dict[str, Any]) -> None:
    check_reload(models, options)


@pytest.mark.parametrize("options", OPTIONS)
def test_reloaded_experts_give_the_other_models_tokens(mixtures: list[Path], options: dict[str, Any]) -> None:
    check_reload(mixtures, options)


@pytest.mark.parametrize("options", [*OPTIONS[:1], {"quantization": "fp8_block", "kv_cache_dtype": "fp8"}])
def test_reloaded_latent_attention_gives_the_other_models_tokens(latents: list[Path], options: dict[str, Any]) -> None:
    """What makes keys and values of latents is held in parts of one tensor, which stays where it is."""
    check_reload(latents, options | {"enforce_eager": True}, recorded=False)


def check_reload(models: list[Path], options: dict[str, Any], *, recorded: bool = True) -> None:
    first, second = generate(load(models[0], **options)), generate(load(models[1], **options))
    assert first != second
    llm = load(models[0], **options)
    assert generate(llm) == first
    core, before = llm._core, addresses(llm)
    graphs, replays = core.runner.graphs, len(core.runner.graphs or ())
    core.reload(str(models[1]))
    assert generate(llm) == second, "prefixes that are cached are of the old weights"
    assert addresses(llm) == before
    if recorded and core.runner.platform.widened_dtype is None:  # else weights in oneDNN's own layout are replaced, and their
        assert core.runner.graphs is graphs  # steps recorded anew
        assert len(graphs) == replays > 0
    core.reload(str(models[0]))
    assert generate(llm) == first


def test_stored_kv_scales_are_reloaded_too(models: list[Path], tmp_path: Path) -> None:
    """Each checkpoint's own, in the memory that recorded steps read."""
    with_scales = []
    for number, path in enumerate(models[:2]):
        with_scales.append(shutil.copytree(path, tmp_path / str(number)))
        weights = load_file(path / "model.safetensors")
        for i in range(COMMON["num_hidden_layers"]):
            for name in ("k_scale", "v_scale"):
                weights[f"model.layers.{i}.self_attn.{name}"] = torch.tensor(0.01 + 0.02 * number)
        save_file(weights, with_scales[-1] / "model.safetensors")
    first, second = (generate(load(path, kv_cache_dtype="fp8")) for path in with_scales)
    llm = load(with_scales[0], kv_cache_dtype="fp8")
    assert generate(llm) == first != second
    llm._core.reload(str(with_scales[1]))
    assert generate(llm) == second
    scales, stored = llm._core.runner.model.kv_scales()  # type: ignore[attr-defined]
    assert stored
    assert [float(scale) for scale in scales] == pytest.approx([0.03] * len(scales))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("scheme", ["bf16", "ptpc_fp8", "fp8_block"])
def test_on_an_accelerator_graphs_and_addresses_stay(models: list[Path], scheme: str) -> None:
    options = dict(device="cuda", quantization=scheme, kv_cache_dtype="fp8", block_size=None, kv_cache_memory_bytes=200_000_000)
    first, second = generate(load(models[0], **options)), generate(load(models[1], **options))
    llm = load(models[0], **options)
    core, before = llm._core, addresses(llm)
    graphs, prompts = core.runner.graphs, core.runner.prompts
    assert generate(llm) == first != second
    core.reload(str(models[1]))
    assert generate(llm) == second
    assert (core.runner.graphs, core.runner.prompts, addresses(llm)) == (graphs, prompts, before)
    least = core.runner.cache.nbytes + core.runner.report.total("held")
    del graphs, prompts
    allocated = torch.cuda.memory_allocated()
    core.sleep()
    assert allocated - torch.cuda.memory_allocated() >= least
    core.wake()
    assert generate(llm) == second


@pytest.mark.parametrize("asleep", [False, True])
def test_the_report_of_a_reload_says_what_the_start_said(models: list[Path], tmp_path: Path, asleep: bool) -> None:
    """Of memory, and of what is without effect; those of the load, such as its seconds, are the reload's own."""
    first, second = (Path(shutil.copytree(model, tmp_path / model.name)) for model in models[:2])
    for model in (first, second):
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(config.replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096'))
    flags: dict[str, Any] = dict(enable_expert_parallel=True, quantization_ignore=["lm_head"], max_model_len=None)
    llm = load(first, cpu_kv_cache_gib=0.001, kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=["0", "1", "2"], **flags)

    def notes() -> list[str]:
        return [line for line in llm.info.report if line.startswith("note: ") and "loaded in" not in line]

    before = notes()
    for what in ("--enable-expert-parallel is", "--quantization-ignore is", "skip-layers leaves", "max_model_len lowered"):
        assert sum(what in note for note in before) == 1, what
    if asleep:
        llm.sleep()
        llm.wake_up(["weights"])
    llm.reload_weights(str(second))
    if asleep:
        llm.wake_up()
    assert notes() == before


def test_what_an_llm_offers_of_it(models: list[Path]) -> None:
    """As vLLM's, and in the words of a program."""
    first, second = (generate(load(path)) for path in models[:2])
    llm = load(models[0])
    for level in (1, 2):
        llm.sleep(level)
        llm.sleep()
        with pytest.raises(OctavoError, match="The engine sleeps; wake it first"):
            generate(llm)
        with pytest.raises(OctavoError, match="the engine sleeps and has no weights"):
            llm.reload_weights(models[1])
        with pytest.raises(OctavoError, match="no weights; wake the engine first"):
            llm.wake_up(["kv_cache"])
        llm.wake_up(["weights"])
        llm.reload_weights(models[1])
        llm.wake_up()
        assert generate(llm) == second, "wakes with what was loaded last"
        llm.reload_weights(str(models[0]))
        llm.reload_weights()
        assert generate(llm) == first
    llm.reset_prefix_cache()
    assert llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
    for wrong, sentence in (
        (lambda: llm.sleep(3), "level must be 1 or 2, not 3"),
        (lambda: llm.wake_up(["all"]), "tags must be weights or kv_cache, not 'all'"),
        (lambda: llm.reload_weights("/nowhere"), "there is no model at '/nowhere'"),
        (lambda: llm.reload_weights("owner/name"), "owner/name is a name of the hub"),
        (lambda: llm.reload_weights(models[2]), "another config"),
    ):
        with pytest.raises(OctavoError, match=sentence):
            wrong()
    assert generate(llm) == first


def test_another_config_is_refused_in_a_sentence(models: list[Path]) -> None:
    llm = load(models[0])
    with pytest.raises(OctavoError, match=r"another config\.json"):
        llm._core.reload(str(models[2]))
    with pytest.raises(OctavoError, match="there is no model at"):
        llm._core.reload("/nowhere")


LAST = f"model.layers.{COMMON['num_hidden_layers'] - 1}.mlp.down_proj.weight"
FAULTS = {
    "shape": "different models",
    "scheme": "same shapes and schemes",
    "missing": "has no tensor",
    "too many": "does not have",
    "infinite": "NaN or infinity",
    "cut off": r"\.safetensors",
    "dtype": "is stored as torch.int32",
}


def test_after_a_reload_that_failed_the_old_weights_are_there(models: list[Path], tmp_path: Path) -> None:
    """The fault is in the last layer, and the files of the old weights are gone: nothing was written over."""
    llm = load(Path(shutil.copytree(models[0], tmp_path / "first")), quantization="ptpc_fp8")
    want = generate(llm)
    shutil.rmtree(tmp_path / "first")
    before = bits(llm)
    for fault, sentence in FAULTS.items():
        path = damaged(models[1], tmp_path / fault, fault)
        with pytest.raises(OctavoError, match=sentence):
            llm._core.reload(str(path))
        assert bits(llm) == before, fault
    assert generate(llm) == want
    llm._core.reload(str(models[1]))
    assert generate(llm) == generate(load(models[1], quantization="ptpc_fp8")) != want


def damaged(model: Path, path: Path, fault: str) -> Path:
    if fault == "scheme":
        load(model, quantization="fp8_block", save_quantized=str(path))
        return path
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    if fault == "missing":
        del weights[LAST]
    else:
        found = weights[LAST]
        weights[LAST] = {"shape": found[:, :-8].contiguous(), "dtype": found.int()}.get(fault, found)
        weights |= {"model.layers.9.mlp.up_proj.weight": found.clone()} if fault == "too many" else {}
        found[-1, -1] = torch.inf if fault == "infinite" else 0
    save_file(weights, path / "model.safetensors")
    if fault == "cut off":
        os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 9)
    return path


def bits(llm: LLM) -> list[bytes]:
    """Of all weights that can be read as bytes."""
    found = []
    for module in llm._core.runner.model.modules():  # type: ignore[attr-defined]
        for value in held(module).values():
            inside = vars(value).values() if isinstance(value, (PackedStack, PackedWeight)) else [value]
            strided = [t for t in inside if isinstance(t, torch.Tensor) and t.layout is torch.strided]
            found += [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in strided]
    return found


OTHERS = {
    "dtype": quantize(torch.ones(64, 128), FP8_PER_CHANNEL, torch.float8_e5m2),
    "activations": quantize(torch.ones(64, 128), FP8_W8A16),
    "tiles": quantize(torch.ones(64, 128), FP8_BLOCK),
}


@cases("what", OTHERS)
@cases("stacked", [False, True])
def test_codes_of_another_meaning_are_refused(what: str, stacked: bool) -> None:
    """Though they take as many bytes, and where there are matrix tiles are held as bytes."""
    by_kernels = Platform(torch.device("cpu"), "test")
    ops.bind(by_kernels)

    class Layer(nn.Module):
        def load(self, q: QTensor) -> None:
            one = Stacker(1)
            one.put(0, q)
            self.weight = ops.pack_experts(one.finished(), by_kernels) if stacked else ops.pack(q, by_kernels)

    layer, first = Layer(), quantize(torch.ones(64, 128), FP8_PER_CHANNEL)
    layer.load(first)
    assert overwrite(layer, first)
    with pytest.raises(OctavoError, match="same shapes and schemes"):
        overwrite(layer, OTHERS[what])


def test_weights_that_compute_no_numbers_are_given_back(models: list[Path], tmp_path: Path) -> None:
    """They are finite themselves, so that only their first logits tell."""
    path = shutil.copytree(models[1], tmp_path / "huge")
    weights = load_file(path / "model.safetensors")
    weights = {name: value * (1e30 if value.ndim == 1 else 1) for name, value in weights.items()}
    save_file(weights, path / "model.safetensors")
    llm = load(models[0])
    want = generate(llm)
    with pytest.raises(OctavoError, match="first logits are NaN"):
        llm._core.reload(str(path))
    assert generate(llm) == want
    # Where it was the directory of the weights before, there are none to go back to.
    own = shutil.copytree(models[0], tmp_path / "own")
    llm = load(own)
    (path / "model.safetensors").replace(own / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"first logits are NaN.* are no longer in"):
        llm._core.reload(str(own))


def test_weights_wake_before_the_cache(models: list[Path]) -> None:
    """And may be reloaded between: the order in which those who train wake an engine."""
    options: dict[str, Any] = {"quantization": "fp8", "kv_cache_dtype": "fp8", "calculate_kv_scales": True}
    want, llm = generate(load(models[1], **options)), load(models[0], **options)
    assert generate(llm) != want
    core = llm._core
    core.sleep()
    with pytest.raises(OctavoError, match="no weights"):
        core.wake(["kv_cache"])
    core.wake(["weights"])
    assert addresses(llm)
    assert not hasattr(core.runner, "cache")
    with pytest.raises(OctavoError, match="sleeps"):
        generate(llm)
    core.reload(str(models[1]))
    core.wake(["kv_cache"])
    assert generate(llm) == want
    core.sleep()
    core.wake(["weights"])
    core.sleep()
    core.wake()
    assert generate(llm) == want


def test_a_prefix_cache_is_emptied_while_requests_run(models: list[Path]) -> None:
    llm = load(models[0], block_size=4)
    want, core = generate(llm), llm._core
    for emptied in (False, True):
        core.add(EngineRequest("x", PROMPTS[0], GREEDY))
        hits, made = 0, []
        while core.has_work():
            outputs, stats = core.step()
            hits += stats.prefix_cache_hits
            made += [token for output in outputs for token in output.token_ids]
            if not emptied:
                core.reset_prefix_cache()
        assert made == want[0]
        assert bool(hits) != emptied
        core.reset_prefix_cache()


@pytest.mark.parametrize("what", ["reload", "sleep"])
def test_not_while_a_request_runs(models: list[Path], what: str) -> None:
    core = load(models[0])._core
    core.add(EngineRequest("x", tokens(5), GREEDY))
    core.step()
    with pytest.raises(OctavoError, match="while no request runs"):
        core.reload(str(models[1])) if what == "reload" else core.sleep()
    core.abort("x")
    assert not core.has_work()


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_sleep_gives_up_weights_cache_and_graphs_and_wake_brings_them_back(models: list[Path], options: dict[str, Any]) -> None:
    # Prompts whose prefix is cached are multiplied otherwise, by matrix tiles or not, and so rounded otherwise.
    llm = load(models[0], enable_prefix_caching=False, **options)
    want, core = generate(llm), llm._core
    core.sleep()
    assert not addresses(llm)
    assert core.runner.graphs is None
    assert not hasattr(core.runner, "cache")
    with pytest.raises(OctavoError, match="wake"):
        generate(llm)
    for again in (core.sleep, lambda: core.reload(str(models[1]))):
        with pytest.raises(OctavoError, match="wake the engine first"):
            again()
    core.wake()
    assert generate(llm) == want
    if core.runner.platform.widened_dtype is None:  # without the C kernels nothing is recorded
        assert len(core.runner.graphs or ()) > 0
    core.wake()
    assert generate(llm) == want


def test_a_woken_engine_has_the_blocks_that_fit_then(models: list[Path]) -> None:
    llm = load(models[0])
    want, core = generate(llm), llm._core
    core.sleep()
    core.runner.config = replace(core.runner.config, cpu_kv_cache_gib=0.002)
    before = core.info.num_blocks
    core.wake()
    assert core.info.num_blocks == core.runner.num_blocks == core.scheduler.pool.num_blocks < before
    assert generate(llm) == want


def test_sleep_forgets_what_fused_decoding_holds(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(takes=lambda requests, longest: False)
    monkeypatch.setattr(ops, "fuse", lambda parts, platform: made)
    core = load(models[0])._core
    assert core.runner.model.model.fused is made  # type: ignore[attr-defined]
    core.sleep()
    assert core.runner.model.model.fused is None  # type: ignore[attr-defined]
