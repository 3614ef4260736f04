"""The whole engine on tiny MLA models: what is said of their caches, and a request's tokens whatever company it is in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import relative_error, tokens
from engine.test_core import LENGTH, TWELVE, request, run, token_ids
from models.test_logits import deepseek_v3, deepseek_v32, randomize
from safetensors.torch import load_file, save_file
from tools.planner import plan_of
from transformers import PreTrainedModel

from octavo import LLM, SamplingParams, batch
from octavo.config import EngineConfig
from octavo.engine.block_pool import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import Scheduler
from octavo.errors import OctavoError
from octavo.frontend.keywords import in_keywords
from octavo.ops import LATENT_SCRATCH

MAKE: dict[str, Callable[..., PreTrainedModel]] = {"deepseek_v3": deepseek_v3, "deepseek_v32": deepseek_v32}
ENGINE: dict[str, Any] = dict(device="cpu", threads=1, block_size=4, max_model_len=LENGTH, cpu_kv_cache_gib=0.05)
Saved = Callable[..., tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """saved(model_type, seed=0) -> transformers' model and its checkpoint, made once."""
    made: dict[tuple[str, int], tuple[PreTrainedModel, Path]] = {}

    def make(model_type: str, seed: int = 0) -> tuple[PreTrainedModel, Path]:
        if (model_type, seed) not in made:
            torch.manual_seed(seed)
            model, path = randomize(MAKE[model_type]()), tmp_path_factory.mktemp(model_type)
            model.save_pretrained(path)
            made[model_type, seed] = model, path
        return made[model_type, seed]

    return make


def core(path: Path, blocks: int | None = None, **options: Any) -> EngineCore:
    made = EngineCore(EngineConfig(**(dict(model=str(path)) | ENGINE | options)))
    if blocks is not None:
        pool = BlockPool(blocks, 4, made.scheduler.pool.prefix_caching)
        made.scheduler = Scheduler(pool, 256, made.runner.max_num_batched_tokens, LENGTH)
    return made


# --- what is said -------------------------------------------------------------------------------------------------------

MEANT = "fp8_ds_mla (what --kv-cache-dtype {} means here)"
# The tiny models' latent: 32 codes, a scale, 8 BF16 of rope; or all 40 in BF16 or FP32. An index key: 16 codes and a scale.
SAID = [
    ("deepseek_v3", "bfloat16", "auto", "bfloat16, 80 bytes a token a layer, 240 bytes a token (100.0% of BF16's)"),
    ("deepseek_v3", "bfloat16", "fp8", MEANT.format("fp8") + ", 52 bytes a token a layer, 156 bytes a token (65.0% of"),
    ("deepseek_v3", "float32", "fp8_e4m3", MEANT.format("fp8") + ", 52 bytes a token a layer, 156 bytes a token"),
    ("deepseek_v3", "bfloat16", "fp8_ds_mla", "fp8_ds_mla, 52 bytes a token a layer, 156 bytes a token"),
    ("deepseek_v32", "bfloat16", "auto", MEANT.format("auto") + " and FP8 index keys, 52 + 20 bytes a token a layer, 216 b"),
    ("deepseek_v32", "bfloat16", "fp8", MEANT.format("fp8") + " and FP8 index keys, 52 + 20 bytes a token a layer, 216 b"),
    ("deepseek_v32", "bfloat16", "bfloat16", "bfloat16 and FP8 index keys, 80 + 20 bytes a token a layer, 300 bytes a token"),
    ("deepseek_v32", "float32", "auto", "float32 and float32 index keys, 160 + 64 bytes a token a layer, 672 bytes a token"),
]  # fmt: skip


@cases(("model_type", "dtype", "kv", "expected"), SAID)
def test_what_a_start_says_of_the_cache(model_type: str, dtype: str, kv: str, expected: str, saved: Saved) -> None:
    """And it is what the cache holds; nothing is said of scales that it has not."""
    llm = LLM(saved(model_type)[1], dtype=dtype, kv_cache_dtype=kv, **ENGINE)
    report = "\n".join(llm.info.report)
    assert f"KV cache: {expected}" in report
    assert "KV scales" not in report
    runner = llm._core.runner
    assert runner.cache.nbytes == llm.info.num_blocks * llm.info.block_size * runner.bytes_per_token


REFUSED = {
    "deepseek_v32": [
        (dict(kv_cache_dtype="fp8_e5m2"), 'kv_cache_dtype="fp8_e5m2" is not for MLA models, .* use fp8'),
        (dict(kv_cache_dtype="fp8_per_token_head"), 'kv_cache_dtype="fp8_per_token_head" is not for MLA models, .* use fp8'),
        (dict(calculate_kv_scales=True), "calculate_kv_scales=True has nothing to measure .* leave the flag out"),
        (
            dict(kv_cache_rounding="calibrated", kv_cache_dtype="fp8"),
            "is for keys, and MLA's cache holds latents; leave it out",
        ),
        (dict(calculate_kv_scales=True, kv_cache_dtype="fp8"), "calculate_kv_scales=True has nothing to measure"),
    ],
    "llama": [(dict(kv_cache_dtype="fp8_ds_mla"), 'fp8_ds_mla" is for MLA models, .* use fp8 or auto')],
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_refused_is_so_before_a_weight_is_read(model_type: str, tmp_path: Path) -> None:
    config = MAKE.get(model_type, deepseek_v32)().config.to_dict() | dict(model_type=model_type)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    for options, sentence in REFUSED[model_type]:
        with pytest.raises(OctavoError, match=sentence) as caught:
            LLM(tmp_path, **ENGINE, **options)
        assert "\n" not in str(caught.value)
        assert str(caught.value).count(". ") == 0, "one sentence"


def test_scales_of_a_cache_beside_mla_are_not_used(saved: Saved, tmp_path: Path) -> None:
    path = shutil.copytree(saved("deepseek_v3")[1], tmp_path / "scaled")
    names = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ("k_scale", "v_scale", "kv_b_proj.k_scale")]
    scales = {name: torch.tensor(0.02) for name in names}
    save_file(load_file(path / "model.safetensors") | scales, path / "model.safetensors", metadata={"format": "pt"})
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    plain, scaled = (LLM(one, kv_cache_dtype="fp8", **ENGINE) for one in (saved("deepseek_v3")[1], path))
    found, expected = (llm.generate([tokens(30)], params, use_tqdm=False)[0].outputs[0].token_ids for llm in (scaled, plain))
    assert found == expected
    notes = [line for line in scaled.info.report if "KV scales" in line]
    assert notes == ["note: the checkpoint's KV scales are not used: MLA's FP8 cache takes the scales of each token"]


def test_fp8_is_advised_where_it_makes_the_cache_smaller(saved: Saved) -> None:
    def told(model_type: str, **options: Any) -> str:
        with pytest.raises(OctavoError, match=r"needs .* of KV cache") as caught:
            LLM(saved(model_type)[1], **ENGINE | options | dict(max_model_len=500, cpu_kv_cache_gib=1e-5))
        return str(caught.value)

    said = told("deepseek_v3", dtype="bfloat16")
    assert 'use kv_cache_dtype="fp8" (65% of it)' in said
    sizes = (
        "--max-model-len",
        "500",
        "--cpu-kv-cache-gib",
        "1e-5",
        "--block-size",
        "4",
        "--device",
        "cpu",
        "--kv-cache-dtype",
        "auto",
    )
    fit = plan_of(str(saved("deepseek_v3")[1]), *sizes).asked.fit
    assert fit is not None
    assert said in map(in_keywords, fit.said), "octavo plan says the same"
    assert 'use kv_cache_dtype="fp8" (32% of it)' in told("deepseek_v32", dtype="float32")
    for already in (told("deepseek_v32"), told("deepseek_v3", kv_cache_dtype="fp8")):
        assert "free some memory" in already
        assert "kv_cache_dtype" not in already


# --- what is computed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("deepseek_v3", dict(dtype="float32")),
        ("deepseek_v32", dict(dtype="float32")),
        ("deepseek_v32", dict(dtype="float32", kv_cache_dtype="fp8")),
        ("deepseek_v3", dict(dtype="float32", quantization="fp8", kv_cache_dtype="fp8")),
    ],
)
def test_company_changes_nothing(model_type: str, options: dict[str, Any], saved: Saved) -> None:
    """Alone or together, in parts, preempted, from cached prefixes, in blocks of one token. Contexts are far longer than the 6
    tokens that V3.2 attends to, and prompts are on both sides of the 25 from which keys are expanded. FP8 lets one request in
    twelve differ, as in test_core."""
    path = saved(model_type)[1]
    allowed = 1 if "kv_cache_dtype" in options else 0

    def assert_same(outputs: Any) -> None:
        got = token_ids(outputs)
        assert got.keys() == alone.keys()
        assert sum(got[name] != alone[name] for name in alone) <= allowed, (got, alone)

    single = core(path, enable_prefix_caching=False, **options)
    alone = {name: ids for one in TWELVE for name, ids in token_ids(run(single, [one])[0]).items()}
    assert all(len(ids) == 20 for ids in alone.values())
    assert len({token for ids in alone.values() for token in ids}) > 50, "outputs too dull to tell a mistake by"

    assert_same(run(single, TWELVE)[0])
    assert_same(run(core(path, max_num_batched_tokens=11, **options), TWELVE, apart=2)[0])  # in parts
    assert_same(run(core(path, block_size=1, max_num_batched_tokens=65536, max_num_seqs=4096, **options), TWELVE)[0])
    preempted, sums = run(core(path, blocks=26, max_num_batched_tokens=30, **options), TWELVE)
    assert_same(preempted)
    assert sums.num_preemptions > 3

    cached = core(path, **options)
    assert_same(run(cached, TWELVE)[0])
    again, sums = run(cached, TWELVE)
    assert_same(again)
    assert sums.prefix_cache_hits > 150


@pytest.mark.parametrize("model_type", MAKE)
def test_tokens_and_their_probabilities_are_transformers(model_type: str, saved: Saved) -> None:
    """Of prompts, which are computed in parts, and of the tokens that are decoded after them; in several sequences, too."""
    model, path = saved(model_type)
    llm = LLM(path, dtype="float32", max_num_batched_tokens=17, **ENGINE)
    prompts = [tokens(n, seed=n) for n in (1, 30, 64)]
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        ids = [*prompt, *output.outputs[0].token_ids]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        assert ids[len(prompt) :] == expected[len(prompt) - 1 :].argmax(-1).tolist()
        entries = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        found = torch.tensor([entry[token].logprob for entry, token in zip(entries, ids[1:], strict=True)])
        assert relative_error(found, expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]) < 1e-4
    (three,) = llm.generate([prompts[1]], SamplingParams(n=3, seed=5, max_tokens=12), use_tqdm=False)
    ones = [llm.generate([prompts[1]], SamplingParams(seed=5 + i, max_tokens=12), use_tqdm=False)[0] for i in range(3)]
    assert [one.token_ids for one in three.outputs] == [one.outputs[0].token_ids for one in ones]
    assert len({tuple(one.token_ids) for one in three.outputs}) == 3


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_a_request_without_numbers_harms_no_other(kv: str, saved: Saved) -> None:
    """Neither those beside it nor those that get its blocks after it."""
    made = core(saved("deepseek_v32")[1], dtype="float32", kv_cache_dtype=kv, enable_prefix_caching=False, blocks=110)
    ones = [one for one in TWELVE if 7 not in one.prompt_token_ids][:5]
    alone = token_ids(run(made, ones)[0])
    assert not any(7 in ids for ids in alone.values())
    made.runner.model.model.embed_tokens.weight[7] = torch.nan  # type: ignore[attr-defined]
    wrong = [request(f"wrong {i}", [5, *[7] * n, 9], temperature=0, max_tokens=30) for i, n in enumerate((1, 40, 70))]
    found = token_ids(run(made, [wrong[0], *ones, *wrong[1:]], apart=1)[0])
    assert {name: found[name] for name in alone} == alone
    assert token_ids(run(made, ones)[0]) == alone


@pytest.mark.parametrize("options", [dict(dtype="float32"), dict(quantization="fp8", kv_cache_dtype="fp8")])
def test_weights_are_reloaded_and_an_engine_sleeps(options: dict[str, Any], saved: Saved) -> None:
    first, second = (saved("deepseek_v32", seed)[1] for seed in (0, 1))
    ones = [request(str(i), tokens(n, seed=i), temperature=0) for i, n in enumerate((3, 20, 60))]
    want, other = (token_ids(run(core(path, **options), ones)[0]) for path in (first, second))
    assert want != other
    made = core(first, **options)
    assert token_ids(run(made, ones)[0]) == want
    made.reload(str(second))
    assert token_ids(run(made, ones)[0]) == other, "cached prefixes are of the old weights"
    made.sleep()
    made.wake()
    assert token_ids(run(made, ones)[0]) == other


# --- what it takes ------------------------------------------------------------------------------------------------------

# DeepSeek's own attention in front of a small MLP
SIZES = dict(
    model_type="deepseek_v32", hidden_size=512, intermediate_size=64, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=32, q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=64, first_k_dense_replace=2, vocab_size=64,
    max_position_embeddings=2048, index_n_heads=64, index_head_dim=128, index_topk=32,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "lengths"), [("deepseek_v32", [45] * 4), ("deepseek_v3", [45] * 4), ("deepseek_v3", [180])]
)
def test_the_bound_on_a_steps_activations(model_type: str, lengths: list[int], tmp_path: Path) -> None:
    """Sparse, absorbed and expanded attention: a step takes no more, in FP32, than the bound, and more than half of it. Ops
    take little for themselves here, so the bound holds without what it has for that."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES | dict(model_type=model_type)))
    options = ENGINE | dict(dtype="float32", load_format="dummy", max_model_len=512, block_size=64)
    runner = core(tmp_path, **options).runner
    blocks = [range(8 * i, 8 * i + 8) for i in range(len(lengths))]
    spans = [batch.Span([5] * n, 0, own) for n, own in zip(lengths, blocks, strict=True)]
    built = batch.build(spans, runner.block_size, runner.platform.device)
    runner.forward(built)
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiled:
        runner.forward(built)
    taken = most = 0
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    bound = runner.model.workspace_bytes(sum(lengths)) - LATENT_SCRATCH
    assert bound / 2 < most < bound, (most, bound)
