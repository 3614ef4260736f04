"""`octavo bench`: the limit by hand and by known anchors, every mode on the demo model, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from cases import cases
from server.processes import Server

from bench import large_models
from bench.ops.__main__ import main as bench_ops
from octavo.cli import main
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.runner import ModelRunner
from octavo.messages import SamplingParams
from octavo.models import MODEL_TYPES, architecture
from octavo.models.interface import VisionModel
from octavo.models.published import KNOWN
from octavo.platform import Platform, detect
from octavo.tools.bench import ceilings, offline, online, workloads
from octavo.tools.bench.limit import Ceilings, costs_of, limit, step_seconds
from octavo.tools.bench.profiling import GAPS, _kernels, role_of
from octavo.tools.bench.workloads import WORKLOADS, Workload, prompts, shape_config, spread
from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.model_source import source_of_config
from octavo.tools.plan.roofline import Attention, Costs
from octavo.tools.plan.subject import Subject

BY_HAND = Costs(
    Attention(layers=1, heads=1, kv_heads=1, qk_dim=1, v_dim=1), weight_bytes=100, head_bytes=10, kv_bytes=2,
    fp8_operations=1000, plain_operations=0, head_operations=50, kv_fp8=True,
)  # fmt: skip
ON = Ceilings(bandwidth=10, fp8=1000, plain=100)


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy and a product that take no time: no test asks how fast this machine is."""
    monkeypatch.setattr(ceilings, "COPY_BYTES", (1 << 30, 1 << 22))
    monkeypatch.setattr(ceilings, "SIDE", (8192, 128))


@pytest.mark.parametrize(
    ("workload", "most", "prefill", "decode"),
    [
        # Prefill: 100 + 10 + 6 tokens x 2 = 122 bytes. Decode: 110 + (2 written + 6 read) x 2 = 126, then 130.
        (Workload("", 2, 3, 3), None, 12.2, 12.6 + 13.0),
        # One at a time: 110 + (1 + 3) x 2 = 118, then 120, twice.
        (Workload("", 2, 3, 3), 1, 12.2, 2 * (11.8 + 12.0)),
        # From the cache the first token is one of those timed before: three steps.
        (Workload("", 2, 3, 3, part="decode"), None, 12.2, 12.6 + 13.0 + 13.4),
        # 20,000 tokens in three steps, by arithmetic: 20 M + 20,000 x 20,001 / 2 pairs x 4 in FP8, the head's 50 in BF16.
        (Workload("", 1, 20000, 1), None, (20e6 + 4 * 20000 * 20001 / 2) / 1000 + 0.5, 0.0),
    ],
)  # fmt: skip
def test_the_limit_by_hand(workload: Workload, most: int | None, prefill: float, decode: float) -> None:
    found = limit(BY_HAND, ON, workload, most)
    assert (found.prefill, found.decode) == (pytest.approx(prefill, rel=1e-12), pytest.approx(decode, rel=1e-12))
    assert found.of(workload) == pytest.approx(decode if workload.part == "decode" else prefill + decode)


def test_without_fp8_units_fp8_is_computed_in_the_other_dtype() -> None:
    one = Workload("", 1, 20000, 1)
    slow = limit(BY_HAND, Ceilings(10, 0, 100), one).prefill
    assert slow == pytest.approx((20e6 + 4 * 20000 * 20001 / 2) / 100 + 0.5)


@cases(
    ("name", "output_rate", "within"),
    # Worked out by others for one H200. D's, 92,000, leaves attention's operations out: 7 of 100.
    [("A", 62_000 / 3, 0.03), ("B", 8_200, 0.03), ("C", 527, 0.01), ("F", 1_600, 0.01), ("D", 92_000 / 4096, 0.07)],
)
def test_the_limit_of_llama_8b_on_an_h200(name: str, output_rate: float, within: float) -> None:
    config, shape = EngineConfig(quantization="fp8", kv_cache_dtype="fp8"), shape_config("llama-3.1-8b")
    costs = costs_of(config, source_of_config("shape", "its config.json", shape))
    w = WORKLOADS[name]
    seconds = limit(costs, Ceilings(4.24e12, 1.3e15, 0.65e15), w).of(w)
    assert w.num_requests * w.output_len / seconds == pytest.approx(output_rate, rel=within)


def test_costs_are_those_of_the_matrices() -> None:
    """The demo model: 6 layers, hidden 256, inner 768, 4 + 2 + 2 heads of 64, a tied vocabulary of 4096."""
    layer = 512 * 256 + 256 * 256 + 3 * 768 * 256
    dense = costs_of(EngineConfig())
    assert (dense.weight_bytes, dense.head_bytes, dense.kv_bytes) == (2 * 6 * layer, 2 * 4096 * 256, 6 * 2 * 2 * 64 * 2)
    assert (dense.plain_operations, dense.fp8_operations, dense.head_operations) == (2 * 6 * layer, 0, 2 * 4096 * 256)
    assert dense.decoded(1) == (0, 6 * 4 * 4 * 64)  # a multiplication and an addition, for scores and for sums
    fp8 = costs_of(EngineConfig(quantization="ptpc_fp8", kv_cache_dtype="fp8"))
    scales = 4 * 6 * (512 + 256 + 2 * 768 + 256)
    assert (fp8.weight_bytes, fp8.kv_bytes) == (6 * layer + scales, dense.kv_bytes / 2)
    assert (fp8.plain_operations, fp8.fp8_operations, fp8.head_fp8, fp8.kv_fp8) == (0, 2 * 6 * layer, False, True)
    head = costs_of(EngineConfig(quantization="ptpc_fp8", kv_cache_dtype="fp8", quantize_lm_head=True))
    assert (head.weight_bytes, head.head_bytes, head.head_fp8) == (fp8.weight_bytes, 4096 * 256 + 4 * 4096, True)


def test_the_limit_of_ranks_and_stages() -> None:
    """Each has its part of the weights and of attention; a token goes through all stages, which have requests of their own."""
    one, two = (costs_of(EngineConfig(tensor_parallel_size=tp, pipeline_parallel_size=2)) for tp in (1, 2))
    assert two.decoded(100) == tuple(operations / 2 for operations in one.decoded(100))
    assert two.plain_operations == one.plain_operations / 2
    slow = Ceilings(1e30, 1.0, 1.0)  # arithmetic alone counts
    w = Workload("custom", 4, 64, 8)
    whole, staged = limit(one, slow, w), limit(one, slow, w, stages=2)
    assert (2 * staged.prefill, 2 * staged.decode) == (pytest.approx(whole.prefill), pytest.approx(whole.decode))
    alone = Workload("custom", 1, 64, 8)
    assert limit(one, slow, alone, stages=2).decode == limit(one, slow, alone).decode


def test_stages_without_ranks_are_measured(tmp_path: Path) -> None:
    words = "--device", "cpu", "-pp", "2", "--num-requests", "4", "--json", str(tmp_path / "found.json")
    line = [sys.executable, "-m", "octavo", "bench", "throughput", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert json.loads((tmp_path / "found.json").read_text())["workloads"]["custom"]["out_tok_s"] > 0


def test_a_mixture_reads_the_experts_that_it_reaches() -> None:
    source = source_of_config("shape", "its config.json", shape_config("qwen3-30b-a3b"))
    costs = costs_of(EngineConfig(quantization="ptpc_fp8"), source)
    assert costs.expert_share == 8 / 128
    assert costs.expert_bytes == pytest.approx(48 * 128 * 3 * 2048 * 768, rel=0.01)
    quick = Ceilings(1, 1e30, 1e30)
    one, all_of_them = (step_seconds(costs, quick, n, 0, (0, 0)) - n * costs.kv_bytes - costs.weight_bytes for n in (1, 10_000))
    assert (one, all_of_them) == (pytest.approx(costs.expert_bytes / 16), pytest.approx(costs.expert_bytes))


def v32_costs(layers: int, **options: Any) -> Costs:
    """Of DeepSeek-V3.2, of which the first three layers are dense, as `octavo bench --shape` makes it."""
    shape = shape_config("deepseek-v3.2") | {"num_hidden_layers": layers}
    return costs_of(EngineConfig(**options), source_of_config("shape", "its config.json", shape))


def test_costs_of_latents_and_sparse_attention() -> None:
    """Six layers of DeepSeek-V3.2, by the numbers of its config.json; blocks of 128 x 128 share 4 bytes."""
    costs = v32_costs(6, quantization="fp8_block")
    attention = 7168 * (1536 + 512 + 64) + 1536 * 128 * 192 + 128 * 128 * 7168
    indexer, kept = 1536 * 64 * 128 + 7168 * 128, 7168 * 64 + 512 * 128 * 256  # weights of index heads; of keys and values
    dense, expert = 3 * 7168 * 18432, 3 * 7168 * 2048
    fp8 = 6 * (attention + indexer) + 3 * (dense + expert)  # with a shared expert
    plain = 6 * kept + 3 * 7168 * 256
    assert costs.weight_bytes == pytest.approx(fp8 * (1 + 4 / 128**2) + 2 * plain, rel=1e-4)
    assert costs.expert_bytes == pytest.approx(3 * 256 * expert * (1 + 4 / 128**2))
    assert (costs.expert_share, costs.head_bytes) == (8 / 256, 2 * 129280 * 7168)
    assert (costs.fp8_operations, costs.plain_operations) == (2 * (fp8 + 3 * 8 * expert), 2 * plain)
    assert (costs.kv_bytes, costs.index_bytes, costs.kv_fp8, costs.index_fp8) == (6 * 656, 6 * 132, False, True)
    # Latents that are attended to, and all index keys where not everything is.
    assert (costs.read(1000), costs.read(2048)) == (6 * 656 * 1000, 6 * 656 * 2048)
    assert costs.read(65_536) == 6 * (656 * 2048 + 132 * 65_536)
    assert costs.decoded(1000) == (0, 2 * 6 * 128 * (512 + 64 + 512) * 1000)
    assert costs.decoded(65_536) == (2 * 6 * 64 * 128 * 65_536, 2 * 6 * 128 * 1088 * 2048)
    for prompt in (1000, 2048, 4096, 65_536):
        seen = torch.arange(1, prompt + 1, dtype=torch.float64)
        ways = torch.minimum((128 + 64 + 128) * seen, 1088 * seen.clamp(max=2048))
        indexed = seen[2048:].sum()
        expected = 2 * 6 * 64 * 128 * indexed / prompt, 2 * 6 * 128 * ways.mean()
        assert costs.prefilled(prompt) == pytest.approx([float(x) for x in expected], rel=1e-3), prompt
    wide = v32_costs(6, dtype="float32")
    assert (wide.kv_bytes, wide.index_bytes, wide.index_fp8) == (6 * 4 * 576, 6 * 4 * 128, False)
    # 16 x 65,536: a decode step's bytes are its weights, the experts that 16 tokens reach, and what they read of the cache.
    step = costs.weight_bytes + costs.head_bytes + costs.expert_bytes * (1 - (1 - 8 / 256) ** 16)
    step += 16 * (6 * (656 + 132) + costs.read(65_537))
    one = limit(costs, Ceilings(1e12, 1e30, 1e30), Workload("", 16, 65_536, 3))
    assert one.decode == pytest.approx(2 * step / 1e12, rel=1e-3)


@cases(
    ("shape", "parameters"),  # as the models' cards count them
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("QWEN2.5-7B", 7_615_616_512),
        ("deepseek-v3", 671_026_404_352 + 58 * 256),  # with the routers' corrections
    ],
)
def test_shapes(shape: str, parameters: int) -> None:
    config = shape_config(shape)
    subject = Subject(source_of_config(shape, "", config), EngineConfig(), Accelerator("any", "any", 0))
    assert subject.base.total("values") == parameters
    if config["model_type"] in MODEL_TYPES:
        architecture(config).Config.from_json(config)


def test_prompts_are_a_seed_s() -> None:
    w = Workload("", 3, 50, 1)
    assert prompts(w, 100, 1) == prompts(w, 100, 1) != prompts(w, 100, 2)
    assert {len(p) for p in prompts(w, 100, 1)} == {50}
    assert {t for p in prompts(w, 8, 1) for t in p} == set(range(3, 8))


def test_spread() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 100.0]) == {"mean": 22.0, "p50": 3.0, "p99": 100.0}
    assert spread([]) is None


@pytest.fixture
def core() -> EngineCore:
    return EngineCore(EngineConfig(max_num_batched_tokens=96, max_model_len=256, enable_prefix_caching=False, max_num_seqs=8))


def test_decode_goes_on_from_the_prefill_s_cache(core: EngineCore) -> None:
    e, f, other = Workload("E", 4, 64, 1), Workload("F", 4, 64, 8, part="decode"), Workload("G", 3, 10, 5)
    added = []
    add, core.add = core.add, lambda request: (added.append(request.request_id), add(request))[1]  # type: ignore[method-assign]
    offline.warm_up(core, f, 0)
    added.clear()
    start = time.perf_counter()
    found = offline.measure(core, [other, e, f], seed=1)
    elapsed = time.perf_counter() - start
    assert 0 < sum(m.wall for m in found) < elapsed  # the rest is making requests
    assert all(m.wall > 0 for m in found)
    assert [m.workload.name for m in found] == ["G", "E", "F"]
    assert len(added) == 4 + 3  # E's requests are F's
    assert [(m.input_tokens, m.output_tokens) for m in found] == [(30, 15), (256, 4), (0, 32)]
    assert not core.has_work()
    assert len(found[1].ttft) == 4
    assert max(found[1].ttft) <= found[1].wall
    assert not found[2].ttft
    assert max(found[2].tpot) * 8 <= found[2].wall * 1.001
    alone = offline.measure(core, [f], seed=1, repeats=2)[0]
    assert (alone.output_tokens, len(alone.walls), alone.wall) == (32, 2, min(alone.walls))


def test_a_cache_too_small_to_decode_from_is_said(core: EngineCore) -> None:
    from octavo.errors import OctavoError

    with pytest.raises(OctavoError, match=r"^workload F keeps [\d,]+ tokens in the KV cache, which holds 2,048;"):
        offline.measure(core, [Workload("F", 40, 64, 8, part="decode")], seed=1)


def test_room_for_all_workloads() -> None:
    named = [WORKLOADS["A"], WORKLOADS["C"]]
    chosen = offline.engine_options(EngineConfig(), named, {})
    assert (chosen.max_model_len, chosen.max_num_seqs, chosen.enable_prefix_caching) == (1024 + 512 + 1, 256, False)
    chosen = offline.engine_options(EngineConfig(max_num_seqs=7), named, {"max_num_seqs": 7})
    assert (chosen.max_model_len, chosen.max_num_seqs) == (1537, 7)


@pytest.mark.parametrize(
    ("bf16", "timed"), [(30.0, {"float32"}), (3.0, {"float32", "bfloat16"}), (0.5, {"float32", "bfloat16"})]
)
def test_a_cpu_without_bf16_instructions_is_not_asked_for_a_large_product(
    bf16: float, timed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []

    def best(platform: Platform, call: Callable[[], torch.Tensor]) -> float:
        made.append(call())
        return bf16 if made[-1].dtype is torch.bfloat16 else 1.0

    monkeypatch.setattr(ceilings, "_best", best)
    monkeypatch.setattr(ceilings, "SIDE", (0, 96))
    monkeypatch.setattr(ceilings, "TRIAL", 32)
    found = ceilings.measure_ceilings(detect("cpu"))
    large = {str(x.dtype).removeprefix("torch.") for x in made if x.shape == (96, 96)}
    assert large == timed
    assert (found.plain, found.plain_dtype) == (2 * 96**3 / min(bf16, 1.0), "bfloat16" if bf16 < 1 else "float32")


def bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["bench", *words, "--json", str(out)]) == 0
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".partial"] == []
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def check_figures(name: str, w: dict[str, Any]) -> None:
    assert w["wall_s"] > 0
    assert w["out_tok_s"] * w["wall_s"] == pytest.approx(w["output_tokens"])
    assert w["total_tok_s"] * w["wall_s"] == pytest.approx(w["input_tokens"] + w["output_tokens"])
    assert w["input_tokens"] == w["num_requests"] * w["input_len"]
    assert w["output_tokens"] == w["num_requests"] * w["output_len"]
    assert w["wall_s"] == min(w["walls_s"])
    assert 0 < w["ttft_s"]["mean"] <= w["ttft_s"]["p99"] <= w["wall_s"], name


def test_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"A": Workload("A", 6, 40, 9), "D": Workload("D", 3, 100, 1)}
    monkeypatch.setattr(workloads, "WORKLOADS", small)
    found = bench(tmp_path, "throughput", "--workload", "a,D", "-q", "ptpc_fp8", "--kv-cache-dtype", "fp8", "--repeats", "2")
    assert found["mode"] == "throughput"
    assert list(found["workloads"]) == ["A", "D"]
    for name, w in found["workloads"].items():
        check_figures(name, w)
        assert len(w["walls_s"]) == 2
        assert w["percent_of_limit"] == pytest.approx(100 * w["limit_s"] / w["wall_s"])
        assert w["percent_of_limit"] > 0  # over 100 where a CPU's cache holds this small model: the limit is of its memory
    assert found["workloads"]["A"]["prefill_tok_s"] is None
    assert found["workloads"]["D"]["prefill_tok_s"] == pytest.approx(300 / found["workloads"]["D"]["wall_s"])
    assert 0 < found["start_s"] < found["first_token_s"]
    assert found["peak_memory_bytes"] > 1 << 20
    assert found["ceilings"]["bandwidth_bytes_s"] > 1e8
    assert (found["quantization"], found["kv_cache_dtype"]) == ("ptpc_fp8", "fp8_e4m3")
    told = capsys.readouterr().out
    assert "A: 6 x 40/9" in told
    assert f"{found['workloads']['A']['wall_s']:.3f}" in told
    assert "\x1b" not in told


def test_tokens_are_chosen_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[SamplingParams] = []

    def keep(**given: Any) -> SamplingParams:
        made.append(SamplingParams(**given))
        return made[-1]

    monkeypatch.setattr(offline, "SamplingParams", keep)
    found = bench(tmp_path, "throughput", "--num-requests", "2", "--output-len", "4", "--sampling", "temperature=0.7, top_k=40")
    assert found["sampling"] == "temperature=0.7, top_k=40"
    assert {(p.temperature, p.top_k, p.top_p, p.repetition_penalty, p.ignore_eos) for p in made} == {(0.7, 40, 1.0, 1.0, True)}
    assert "(temperature=0.7, top_k=40)" in capsys.readouterr().out
    found = bench(
        tmp_path, "profile", "--num-requests", "2", "--output-len", "12", "--steps", "2", "--sampling", "temperature=1"
    )
    assert "(temperature=1)" in capsys.readouterr().out
    sampling = [kernel["name"] for kernel in found["steps"][-1]["kernels"] if kernel["role"] == "sampling"]
    assert any("sample" in name or "searchsorted" in name for name in sampling), sampling  # our kernels, or torch without them


def test_latency_of_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = shape_config("llama-3.1-8b") | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "head_dim": 8,
                                     "vocab_size": 300}  # fmt: skip
    monkeypatch.setitem(KNOWN, "tiny", tiny)
    words = "latency --shape tiny --num-layers 2 --num-requests 1 --input-len 12 --output-len 6 --max-model-len 64"
    found = bench(tmp_path, *words.split())
    w = found["workloads"]["custom"]
    check_figures("custom", w)
    assert w["ttft_s"]["mean"] + 5 * w["tpot_s"]["mean"] == pytest.approx(w["wall_s"])
    assert "tiny, 2 layers" in found["model"]
    assert found["engine"][0].startswith("model: llama, 0.1 M")  # two layers of the tiny one
    assert "TPOT" in capsys.readouterr().out


def test_a_shape_of_mla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As published: FP8 in blocks, the first three layers dense; contexts over what is attended to, and under it."""
    small = dict(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_attention_heads=4, num_key_value_heads=4,
        n_routed_experts=16, num_experts_per_tok=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, vocab_size=300, index_n_heads=16, index_head_dim=16, index_topk=24,
    )  # fmt: skip
    monkeypatch.setitem(KNOWN, "tiny", shape_config("deepseek-v3.2") | small)
    sizes = "--num-layers 5 --num-requests 4 --input-len 48 --output-len 14 --cpu-kv-cache-gib 0.05 --enforce-eager"
    words = ["--shape", "tiny", *sizes.split()]
    found = bench(tmp_path, "throughput", *words)
    w = found["workloads"]["custom"]
    check_figures("custom", w)
    assert w["percent_of_limit"] > 0
    assert found["quantization"] == "as stored"
    experts = [line for line in found["engine"] if line.split()[:2] == ["experts", "fp8_block"]]
    assert len(experts) == 1
    assert f"{2 * 16 * 3 * 128 * 128 / 1e6:.2f} M" in experts[0]  # of two layers
    assert bench(tmp_path, "latency", *words, "-q", "ptpc_fp8", "--num-requests", "1")["quantization"] == "ptpc_fp8"
    prefill, decode = bench(tmp_path, "profile", *words, "--steps", "3")["steps"]
    assert prefill["roles_us"]["linear"] > 0
    assert decode["roles_us"]["linear"] > 0


def test_a_shape_with_a_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tower is made up and counted, and reads a picture: text alone is measured."""
    published = shape_config("qwen3-vl-8b")
    text = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=48, vocab_size=300)
    vision = dict(hidden_size=64, intermediate_size=36, num_heads=4, out_hidden_size=64, num_position_embeddings=64)
    parts = {"text_config": text, "vision_config": vision}
    tiny = published | {name: published[name] | change for name, change in parts.items()}
    monkeypatch.setitem(KNOWN, "tiny", tiny)
    words = "throughput --shape tiny --num-layers 4 --num-requests 2 --input-len 12 --output-len 6 -q ptpc_fp8"
    found = bench(tmp_path, *words.split())
    check_figures("custom", found["workloads"]["custom"])
    (line,) = [line for line in found["engine"] if line.split()[:2] == ["vision", "ptpc_fp8"]]
    linears = 27 * (4 * 64 * 64 + 2 * 64 * 36) + 4 * (256 * 256 + 256 * 64)
    assert f"{linears / 1e6:.2f} M" in line
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    config = EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu", dtype="float32", max_model_len=64)
    model = cast("VisionModel", ModelRunner(config).model)
    patches, grid = model.warm_up_image()
    with torch.inference_mode():
        features = model.encode(patches, [grid])
    assert features.shape == (256, 4 * 64)
    assert torch.isfinite(features).all()
    assert all(one.std() > 1e-3 for one in features.split(64, 1))


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "steps.png"
    words = "profile --device cpu --num-requests 3 --input-len 20 --output-len 16 --steps 3 --png"
    found = bench(tmp_path, *words.split(), str(png))
    prefill, decode = found["steps"]
    assert "a prefill step of 60 tokens" in prefill["name"]
    assert "a decode step of 3 requests" in decode["name"]
    for step in (prefill, decode):
        assert sum(step["roles_us"].values()) == pytest.approx(step["wall_us"], rel=1e-6)
        assert step["roles_us"]["linear"] > 0
        assert step["roles_us"][GAPS] > 0
        assert sum(k["us"] for k in step["kernels"]) == pytest.approx(step["busy_us"])
    # A step has 4 products in each of 6 layers and the head, whatever the number of steps looked at. What multiplies them has
    # another name on every kind of CPU, and operators of little time around it; the longest is the product itself.
    product = next(k for k in decode["kernels"] if k["role"] == "linear")
    assert product["calls"] == 25, decode["kernels"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "gaps" in capsys.readouterr().out


def test_kernels_that_overlap_add_up_to_the_time_that_they_took() -> None:
    """One that starts early waits for the one before; what runs inside another's time takes none."""

    def kernel(name: str, start: float, end: float, device: str = "CUDA") -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=device), time_range=SimpleNamespace(start=start, end=end)
        )

    ran = [
        kernel("_norm_quant", 9, 13),
        kernel("_small_linear", 0, 10),
        kernel("_small_linear", 20, 26),
        kernel("_quantize", 21, 25),
    ]
    found = _kernels([*ran, kernel("aten::mm", 0, 99, "CPU")], 2)
    assert [(k.name, k.role, k.us, k.calls) for k in found] == [
        ("_small_linear", "linear", 8.0, 1.0), ("_norm_quant", "norm", 1.5, 0.5), ("_quantize", "quantize", 0.0, 0.5),
    ]  # fmt: skip


@cases(
    ("kernel", "role"),
    [
        ("_norm_quant", "norm"),
        ("_silu_mul_quant", "activation"),
        ("_rope_write_kv", "rope, cache"),
        ("_decode_attention", "attention"),
        ("_prefill_attention", "attention"),
        ("_stage_kv", "attention"),
        ("_small_linear", "linear"),
        ("gated_product", "linear"),
        ("between_attentions", "layers as one"),
        ("_quantize", "quantize"),
        ("nvjet_qqtst_128x256_128x4_1x2_h_bz_coopA_TNT", "linear"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "linear"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::reduce_kernel<512, 1, ArgMaxOps<float>>", "sampling"),
        ("_sample_compact", "sampling"),
        ("_latent_attention", "attention"),
        ("_write_latent", "rope, cache"),
        ("_index_logits", "indexer"),
        ("_select", "indexer"),
        ("void at::native::index_select_kernel", "copies"),
        ("_route", "routing"),
        ("_grouped_linear", "linear"),
        ("octavo_sample", "sampling"),
        ("vectorized_elementwise_kernel", "other"),
    ],
)
def test_roles(kernel: str, role: str) -> None:
    assert role_of(kernel) == role


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--max-num-seqs", "8")
    yield server
    server.stop()


def test_serve(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--num-requests", "6", "--input-len", "30", "--output-len", "7"]
    offline = bench(tmp_path, "throughput", *size)
    (tmp_path / "out.json").rename(tmp_path / "offline.json")
    where = ["--base-url", server.url, "--max-concurrency", "3", "--offline-json", str(tmp_path / "offline.json")]
    w = bench(tmp_path, "serve", *where, *size)["workloads"]["custom"]
    check_figures("custom", w)
    assert w["max_concurrency"] == 3
    assert w["of_offline"] == pytest.approx(w["out_tok_s"] / offline["workloads"]["custom"]["out_tok_s"])
    assert "of offline" in capsys.readouterr().out
    refused(
        f"serve --base-url {server.url} --num-requests 2 --input-len 4096", "the server refused a request: The prompt", capsys
    )
    other = f"serve --base-url {server.url} --num-requests 2 --offline-json {tmp_path / 'offline.json'}"
    refused(other, "its workload custom is of another size; run both with the same.", capsys)
    drawn = " ".join(["serve", *where, *size, "--sampling", "top_k=3,temperature=1"])
    refused(drawn, "its tokens are chosen otherwise; run both with the same --sampling.", capsys)


class Counting(BaseHTTPRequestHandler):
    """A server of one sentence, which keeps what it was asked and how many asked at a time."""

    bodies: ClassVar[list[dict[str, Any]]] = []
    busy = most = 0

    def do_GET(self) -> None:
        self.answer(b'{"data": [{"id": "counted"}]}')

    def do_POST(self) -> None:
        Counting.busy += 1
        Counting.most = max(Counting.most, Counting.busy)
        Counting.bodies.append(body := json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        time.sleep(0.02)
        events = [{"choices": [{"text": "x"}]}] * body["max_tokens"]
        events.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        Counting.busy -= 1
        self.answer(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n")

    def answer(self, data: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_what_a_server_is_asked() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/v1"
            found = online.bench(url, None, [Workload("custom", 12, 40, 5)], 3, 1, None, 7)
        finally:
            server.shutdown()
    assert found["model"] == "counted"
    asked = Counting.bodies[3:]  # after the warm-up, as many as run at a time
    assert len(asked) == 12
    assert Counting.most == 3
    assert len({tuple(body["prompt"]) for body in asked}) == 12
    assert {len(body["prompt"]) for body in asked} == {40}
    wanted = {"model": "counted", "max_tokens": 5, "temperature": 0, "repetition_penalty": 1, "top_k": -1, "ignore_eos": True}
    wanted |= {"stream": True}
    assert all(wanted.items() <= body.items() for body in asked)


def test_the_bench_of_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["attention", "--device", "cpu", "--shape", "decode 1 x 1024", "--json", str(tmp_path / "ops.json")]
    monkeypatch.setattr(sys, "argv", ["bench.ops", *words])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process
    bench_ops()
    (row,) = json.loads((tmp_path / "ops.json").read_text())["ops"]
    assert "decode 1 x 1024" in capsys.readouterr().out
    assert row["gb_s"] * row["us"] * 1e3 == pytest.approx(2 * 1024 * 8 * 128 + 2 * 2 * 32 * 128)  # codes read, q and o
    assert row["tflops"] * row["us"] * 1e6 == pytest.approx(4 * 1024 * 32 * 128)
    assert row["of_library"] == pytest.approx(row["library_us"] / row["us"])
    assert row["of_limit"] == pytest.approx(row["limit_us"] / row["us"])


def refused(line: str, sentence: str, capsys: pytest.CaptureFixture[str], code: int = 1) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:  # argparse's way; the rest returns
        raise SystemExit(main(["bench", *line.split()]))
    told = capsys.readouterr().err
    assert exit.value.code == code
    assert sentence in told
    assert told.count("\n") == 1


@cases(
    ("line", "code", "sentence"),
    [
        ("", 2, "a mode is missing; the modes are throughput, latency, serve, profile"),
        ("troughput", 2, "'troughput' is no mode; did you mean throughput"),
        ("throughput --workloda A", 2, "did you mean --workload"),
        ("throughput --workload A,Z", 1, "--workload 'Z' is not known; known are A, B, C, D, E, F."),
        ("throughput --workload A --input-len 3", 1, "leave out --input-len, or --workload."),
        ("throughput --num-requests 0", 1, "--num-requests must be positive, not 0."),
        ("throughput --workload A --repeats 0", 1, "--repeats must be positive, not 0."),
        (
            "throughput --sampling heat=1",
            1,
            "--sampling 'heat=1' is not known; it takes NAME=NUMBER of temperature, top_p, top_k",
        ),
        ("serve --sampling temperature=0.7,top_k=x", 1, "--sampling top_k must be a whole number, not 'x'."),
        ("throughput --sampling top_p=1.5", 1, "--sampling: top_p must be between 0 and 1, not 1.5."),
        ("throughput --shape llama-3.1-9b", 1, "--shape 'llama-3.1-9b' is not known; did you mean 'llama-3.1-8b'?"),
        ("throughput --shape llama-3.1-8b --num-layers 0", 1, "--num-layers must be positive, not 0."),
        ("throughput --shape llama-3.1-8b --num-layers 33", 1, "--num-layers 33 is more than the model has; use at most 32."),
        ("throughput -q bf16 M --shape qwen3-8b", 1, "Two models were given, M and --shape qwen3-8b; give one."),
        ("throughput --num-layers 2", 1, "--num-layers is for random weights; add --load-format dummy, or use --shape."),
        ("throughput --shape qwen3-8b --load-format auto", 1, "are for random weights; leave out --load-format"),
        ("throughput --json /nowhere/x.json", 1, "--json /nowhere/x.json: there is no directory /nowhere."),
        ("throughput --png x.png", 2, "unrecognized arguments: --png"),
        ("--profile --steps 0", 1, "--steps must be positive, not 0."),
        ("profile -tp 2 -pp 2", 1, "looks into one rank; leave --tensor-parallel-size out."),
        ("profile -pp 2", 1, "looks into one rank; leave --pipeline-parallel-size out."),
        ("M --latency --shape qwen3-8b", 1, "Two models were given, M and --shape qwen3-8b; give one."),
        ("serve --base-url localhost:8000", 1, "--base-url 'localhost:8000' is no URL"),
        ("serve --base-url http://127.0.0.1:9", 1, "No server answers at http://127.0.0.1:9"),
        ("serve --workload F", 1, "workload F times decoding alone, which a client cannot see"),
        ("serve --max-concurrency 0", 1, "--max-concurrency must be positive, not 0."),
        ("serve --offline-json /nowhere", 1, "--offline-json /nowhere cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_one_sentence(line: str, code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(line, sentence, capsys, code)


@cases(
    ("line", "sentence"),
    [
        ("--shapes nosuch", "--shapes 'nosuch' is not known"),
        ("--accelerator nosuch", "--accelerator 'nosuch' is not known"),
        ("--workload Z", "--workload 'Z' is not known"),
    ],
)
def test_large_models_are_checked_before_one_is_served(
    line: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["large_models", *line.split()])
    monkeypatch.setattr(large_models, "try_model", lambda *_: pytest.fail("a model was tried"))
    with pytest.raises(SystemExit) as raised:
        large_models.main()
    assert raised.value.code == 2
    assert sentence in capsys.readouterr().err


def test_workloads_of_large_models() -> None:
    """Names go together, and sizes alone. What is tried depends on the number of GPUs."""
    size = ["--num-requests", "128", "--input-len", "1024", "--output-len", "256"]
    assert large_models.runs("C,B,D,128x1024/256") == [["--workload", "C,B,D"], size]
    assert large_models.runs("A") == [["--workload", "A"]]
    assert large_models.runs("") == []
    assert "qwen3-vl-235b-a22b" in large_models.shapes_on(4)
    assert "deepseek-v3.2" in large_models.shapes_on(8)


def test_a_server_that_ends_by_itself_is_said_to_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_models, "get", lambda *_: (0, ""))
    with (
        pytest.raises(RuntimeError, match=r"ended with exit code 1 after \d+ s, never ready: octavo"),
        large_models.serving(tmp_path / "nothing", [], 300),
    ):
        pytest.fail("it was ready")
