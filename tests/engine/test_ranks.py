"""Engines of several ranks, which are processes over gloo: the tokens are those of one rank."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tokens
from engine.test_core import ENGINE, LENGTH, TWELVE, request, run, token_ids
from engine.test_images import IMAGE, SIDES, image, prompt, requests
from models.test_kimi import kimi, write
from models.test_logits import CASES, randomize
from models.test_qwen3_vl import qwen3_vl, qwen3_vl_moe
from ops.cases import case
from rank_processes import RankProcesses
from ranks import storage_bytes
from tools.planner import plan_of

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.convert.key_rounding import key_rounding, write_key_rounding
from octavo.demo import MODEL_DIR
from octavo.engine import grammar
from octavo.engine.block_pool import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.encoder_cache import EncoderCache
from octavo.engine.place import Place
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import EncoderPart, Request
from octavo.errors import OctavoError
from octavo.files import KEY_ROUNDING
from octavo.messages import EngineRequest, StructuredOutput
from octavo.models import MODEL_TYPES
from octavo.text.llguidance_grammar import serialize
from octavo.weights import SafetensorsSource

SIZES = (2, 4)
MIXTURES = ("qwen3_moe", "mixtral", "glm4_moe", "minimax_m2", "deepseek_v3", "kimi_k25", "qwen3_vl_moe")
OVER_TWO = ("llama", "qwen3_moe", "deepseek_v3", "qwen3_vl")
SEEING = ("qwen3_vl", "qwen3_vl_moe", "kimi_k25")
TOWERS_WHOLE: dict[str, Any] = dict(mm_encoder_tp_mode="data")
EXPERTS_WHOLE: dict[str, Any] = dict(enable_expert_parallel=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankProcesses]]:
    made = {size: RankProcesses(size, tmp_path_factory.mktemp("ranks")) for size in SIZES}
    yield made
    for one in made.values():
        one.close()


def checkpoint(model_type: str, path: Path, seed: int = 0) -> str:
    """A tiny one of this type; of Kimi-K2.5 with experts in INT4."""
    torch.manual_seed(seed)
    if model_type == "kimi_k25":
        write(path, kimi(), int4=True)
    elif model_type in ("qwen3_vl", "qwen3_vl_moe"):
        (qwen3_vl if model_type == "qwen3_vl" else qwen3_vl_moe)().save_pretrained(path)
    else:
        randomize(CASES[model_type if model_type != "kimi_k2" else "deepseek_v3"]()).save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | dict(model_type=model_type)))
    return str(path)


def asked(model_type: str) -> list[EngineRequest]:
    """Greedy and sampled, with penalties, of all lengths, with shared prefixes; images, where the model sees them."""
    found = [replace(TWELVE[i], params=replace(TWELVE[i].params, max_tokens=14)) for i in (0, 2, 3, 4, 6, 9)]
    found.append(request("probabilities", tokens(30, seed=5), temperature=0, logprobs=2, prompt_logprobs=2, max_tokens=5))
    family = {"qwen3_vl_moe": "qwen3_vl"}.get(model_type, model_type)
    return found + (requests(family) if family in SIDES else [])


@dataclass
class Answers:
    """Tokens; which tokens' probabilities were said, and these; what the start says of the model, and of each rank."""

    tokens: dict[str, list[int]]
    ids: list[list[int]]
    logprobs: list[float]
    model: str
    each: str

    def differences(self, one: Answers, size: int) -> list[str]:
        """What is not as `one` rank says it."""
        values = torch.tensor(self.logprobs), torch.tensor(one.logprobs)
        right = {
            "tokens": self.tokens == one.tokens,
            "probabilities": self.ids == one.ids and torch.allclose(*values, atol=1e-4),
            "parameters": self.model == one.model,
            "ranks": f" stored on rank 0 of {size}, " in self.each and self.each.endswith(f" on each of {size} ranks"),
        }
        return [what for what, is_so in right.items() if not is_so]


def answers(place: Place, path: str, wanted: list[EngineRequest], options: dict[str, Any]) -> Answers:
    """Of an engine of this process's place. What it says whole it says again from its prefix cache, and in parts and preempted;
    the last two are tried without `options`."""
    core = EngineCore(EngineConfig(**dict(model=path, tensor_parallel_size=place.size) | ENGINE | options), None, place)
    outputs, _ = run(core, wanted)
    found = token_ids(outputs)
    if not options or "pipeline_parallel_size" in options:
        again, sums = run(core, wanted)
        assert sums.prefix_cache_hits > 50
        assert token_ids(again) == found
        room = EncoderCache(0 if core.runner.encoder is None else core.runner.encoder.capacity)
        stages, ahead = core.scheduler.stages, core.scheduler.ahead
        core.scheduler = Scheduler(BlockPool(26, 4, True), 256, 23, LENGTH, room, stages=stages, ahead=ahead)
        parts, sums = run(core, wanted, apart=1)
        assert sums.num_preemptions or stages > 2  # whose steps in flight hold the few requests that fit
        assert token_ids(parts) == found
    said = [
        entry for out in outputs["probabilities"] for entry in [*(out.prompt_logprobs or ()), *(out.logprobs or ())] if entry
    ]
    ids, values = [[one.token_id for one in entry] for entry in said], [one.logprob for entry in said for one in entry]
    each = [line for line in core.info.report if line.startswith(("weights: ", "KV cache: "))]
    return Answers(found, ids, values, core.info.report[0], "\n".join(each))


def test_every_architecture_says_what_one_rank_says(ranks: dict[int, RankProcesses], tmp_path: Path) -> None:
    """Weights split over ranks, and experts whole, of which ranks have unequal numbers. All over four ranks; over two, where no
    layer does anything else than over four, a dense model and one of each other kind."""
    failed: list[str] = []
    for model_type in MODEL_TYPES:
        path, wanted = checkpoint(model_type, tmp_path / model_type), asked(model_type)
        one = answers(Place(), path, wanted, {})
        assert len({token for ids in one.tokens.values() for token in ids}) > 12, "outputs too dull to tell a mistake by"
        for size in SIZES if model_type in OVER_TWO else SIZES[1:]:
            for options in [
                {},
                *([EXPERTS_WHOLE] if model_type in MIXTURES else ()),
                *([TOWERS_WHOLE] if model_type in SEEING else ()),
            ]:
                where = f"{model_type}, {size} ranks, {options}"
                try:
                    found = ranks[size].run(answers, path, wanted, options)
                except AssertionError as error:
                    failed.append(f"{where}: {error}")
                else:
                    failed += [f"{where}: {wrong}" for each in found if (wrong := each.differences(one, size))]
    assert not failed, "\n".join(failed)


def features(place: Place, path: str, mode: str) -> tuple[list[torch.Tensor], int]:
    """Of five images, of which one is encoded in three parts, as is another whose request ends after the first; and how many
    patches this rank's tower has read."""
    config = EngineConfig(**dict(model=path, tensor_parallel_size=place.size, mm_encoder_tp_mode=mode) | ENGINE)
    encoder = EngineCore(config, None, place).runner.encoder
    assert encoder is not None
    family = "kimi_k25" if "kimi" in path else "qwen3_vl"
    asked = prompt("all", [10, *[IMAGE] * 6], *(image(family, seed, 2 * seed, 4) for seed in range(1, 7)))
    *whole, parted, gone = Request(asked, LENGTH).images_within(0, LENGTH)
    before, read = encoder.model.encoder_input, 0

    def counted(patches: torch.Tensor, grids: Any) -> Any:
        nonlocal read
        read += len(patches)
        return before(patches, grids)

    encoder.model.encoder_input = counted  # type: ignore[method-assign]
    encoder.run([EncoderPart(parted, 0, 3), EncoderPart(gone, 0, 2), *map(EncoderPart, whole[:3])], [])
    encoder.run([EncoderPart(parted, 1, 3)], [gone.key])
    encoder.run([EncoderPart(parted, 2, 3), *map(EncoderPart, whole[3:])], [whole[0].key])
    encoder.run([EncoderPart(whole[0])], [])
    assert not encoder._begun
    assert gone.key not in encoder.features
    return [encoder.features[one.key] for one in (*whole, parted)], read


def test_towers_whole_on_every_rank(ranks: dict[int, RankProcesses], tmp_path: Path) -> None:
    """Each image is read by one rank, and every rank has its features, which are those of one rank."""
    for model_type in ("qwen3_vl", "kimi_k25"):
        path = checkpoint(model_type, tmp_path / model_type)
        expected, read = features(Place(), path, "weights")
        for size in SIZES:
            found = ranks[size].run(features, path, "data")
            with case(model_type, size):
                for own, _ in found:
                    for one, other in zip(own, expected, strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
                patches = [count for _, count in found]
                assert sum(patches) == read
                assert min(patches) > 0


def allocated(place: Place, path: str, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes of this rank's weights and tables, and of its cache."""
    given = dict(model=path, tensor_parallel_size=place.size, device="cpu", threads=1)
    runner = EngineCore(EngineConfig(**given | options), None, place).runner
    return storage_bytes(runner.model), runner.cache.nbytes  # type: ignore[arg-type]


def test_ranks_allocate_what_is_planned(ranks: dict[int, RankProcesses], tmp_path: Path) -> None:
    """In processes; tests/tools/test_plan_ranks.py has more models, and weights alone."""
    options: dict[str, Any] = dict(quantization="ptpc_fp8", kv_cache_dtype="fp8", cpu_kv_cache_gib=0.01, max_num_seqs=64)
    for model_type, more in {"llama": {}, "qwen3_moe": EXPERTS_WHOLE, "qwen3_vl": TOWERS_WHOLE}.items():
        path = checkpoint(model_type, tmp_path / model_type)
        words = [word for name, value in (options | more).items()
                 for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))]  # fmt: skip
        for size in SIZES:
            found = ranks[size].run(allocated, path, options | more)
            plan = plan_of(path, "--device", "cpu", *words, "-tp", str(size), "--num-accelerators", str(size))
            fit = plan.asked.fit
            with case(model_type, size, found):
                assert fit is not None
                assert found[0] == (pytest.approx(fit.weights + fit.positions, rel=0.02), pytest.approx(fit.cache, rel=0.02))
                assert all(weights <= found[0][0] and cache == found[0][1] for weights, cache in found)


GRAMMAR = StructuredOutput("regex", r"(yes|no), [0-9]{2,4}: (true|maybe)")


def structured(place: Place, slow: int, stages: int = 1) -> dict[str, list[int]]:
    """Three requests of a grammar and one without; compiling it, and finding its tokens, takes long on rank `slow`."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((grammar.GrammarCompiler, "compile"), (grammar.Grammar, "find")) if place.rank == slow else ():
            patch.setattr(owner, name, _late(getattr(owner, name)))
        size = dict(tensor_parallel_size=place.size // stages, pipeline_parallel_size=stages)
        config = EngineConfig(**dict(model=str(MODEL_DIR)) | size | ENGINE)
        core, text = EngineCore(config, None, place), serialize(GRAMMAR)
        wanted = [request(str(i), tokens(9), (0,), text, seed=i, max_tokens=30) for i in range(3)]
        return token_ids(run(core, [*wanted, request("free", tokens(20), temperature=0)], apart=1)[0])


def _late(before: Callable[..., Any]) -> Callable[..., Any]:
    def late(*args: Any) -> Any:
        time.sleep(0.03)
        return before(*args)

    return late


def test_structured_output(ranks: dict[int, RankProcesses]) -> None:
    """Whichever rank is behind."""
    expected = structured(Place(), 1)
    text = LLM(MODEL_DIR, load_format="dummy", device="cpu").get_tokenizer().decode
    for i in range(3):
        assert re.fullmatch(GRAMMAR.grammar, text(expected[str(i)])), expected
    for size, slow in ((2, 0), (2, 1), (4, 3)):
        with case(size, slow):
            assert ranks[size].run(structured, slow) == [expected] * size


def lives(place: Place, first: str, second: str, stages: int = 1) -> list[Any]:
    """Tokens before and after sleep, after a reload, and after one that was refused; measured KV scales."""
    size = dict(tensor_parallel_size=place.size // stages, pipeline_parallel_size=stages)
    options = dict(kv_cache_dtype="fp8", calculate_kv_scales=True)
    core = EngineCore(EngineConfig(**dict(model=first) | size | ENGINE | options), None, place)
    wanted = [request(str(n), tokens(n, seed=n), temperature=0) for n in (3, 20, 60)]
    found, scales = [token_ids(run(core, wanted)[0])], torch.cat(core.runner.model.kv_scales()[0])  # type: ignore[attr-defined]
    core.sleep()
    core.wake()
    found.append(token_ids(run(core, wanted)[0]))
    core.reload(second)
    found.append(token_ids(run(core, wanted)[0]))
    with pytest.raises(OctavoError, match="nowhere"):
        core.reload("/nowhere")
    return [*found, token_ids(run(core, wanted)[0]), scales]


def test_weights_are_freed_restored_and_reloaded_on_every_rank(ranks: dict[int, RankProcesses], tmp_path: Path) -> None:
    """And KV scales are those of the largest key and value of all heads, as one rank measures them."""
    first, second = (checkpoint("llama", tmp_path / str(seed), seed) for seed in range(2))
    *expected, scales = lives(Place(), first, second)
    assert expected[0] == expected[1] != expected[2] == expected[3]
    for size in SIZES:
        for *found, theirs in ranks[size].run(lives, first, second):
            torch.testing.assert_close(theirs, scales, rtol=1e-4, atol=0)
            differ = [(i, name) for i, each in enumerate(found) for name in each if each[name] != expected[i][name]]
            assert len(differ) <= 2, differ  # a key between two codes


def damaged_for_one(place: Place, first: str, second: str, bad: int) -> tuple[str, list[dict[str, list[int]]]]:
    """What a reload says that rank `bad` alone cannot read to its end; tokens before, after it, and after one that all can."""
    core = EngineCore(EngineConfig(model=first, tensor_parallel_size=place.size, quantization="fp8", **ENGINE), None, place)
    wanted = [request(str(n), tokens(n, seed=n), temperature=0) for n in (3, 20)]
    found = [token_ids(run(core, wanted)[0])]
    with pytest.MonkeyPatch.context() as patch:
        if place.rank == bad:
            patch.setattr(SafetensorsSource, "finish", _fails)
            patch.setattr(SafetensorsSource, "read", _fails_late(SafetensorsSource.read))
        with pytest.raises(OctavoError) as error:
            core.reload(second)
    found.append(token_ids(run(core, wanted)[0]))
    core.reload(second)
    return str(error.value), [*found, token_ids(run(core, wanted)[0])]


def _fails(_: SafetensorsSource) -> None:
    raise OSError("the disk is gone")


def _fails_late(before: Callable[..., Any]) -> Callable[..., Any]:
    def read(source: SafetensorsSource, name: str, *given: Any) -> Any:
        if "layers.1." in name:
            raise OctavoError(f"{name} is torn.")
        return before(source, name, *given)

    return read


def test_what_one_rank_cannot_read_no_rank_loads(ranks: dict[int, RankProcesses], tmp_path: Path) -> None:
    """Though quantizing exchanges scales, in the middle of which the others would wait for ever."""
    first, second = (checkpoint("llama", tmp_path / str(seed), seed) for seed in range(2))
    for bad in range(2):
        found = ranks[2].run(damaged_for_one, first, second, bad)
        for rank, (sentence, (old, still, new)) in enumerate(found):
            who = "" if rank == bad else f"Rank {bad}: "
            assert re.fullmatch(who + r"model\.layers\.1\..* is torn\.", sentence), sentence
            assert old == still != new


def rounded_keys(place: Place, path: str) -> tuple[dict[str, list[int]], torch.Tensor]:
    """Tokens, and the codes of keys [tokens, heads, dim] that this rank has of a prompt in the first layer."""
    options = dict(model=path, tensor_parallel_size=place.size, kv_cache_dtype="fp8", kv_cache_rounding="calibrated")
    core = EngineCore(EngineConfig(**options | ENGINE), None, place)
    found = token_ids(run(core, [request("0", tokens(40, seed=1), temperature=0)])[0])
    attention = core.runner.model.attention_layers()[0]  # type: ignore[attr-defined]
    assert attention.cache.key_rounding.order.shape == (attention.kv_heads, attention.head_dim)
    return found, attention.cache.views["k"].view(torch.uint8).flatten(0, 1)[:40].clone()


def test_ranks_round_keys_as_one(ranks: dict[int, RankProcesses], tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    count, dim = config["num_key_value_heads"], config["head_dim"]
    queries = torch.randn(config["num_hidden_layers"], count, 2 * dim, dim) @ torch.randn(dim, dim)
    layers = {number: key_rounding(gram) for number, gram in enumerate(queries.mT @ queries)}
    write_key_rounding(tmp_path / "model" / KEY_ROUNDING, layers)
    expected, codes = rounded_keys(Place(), path)
    assert codes.any()
    for size in SIZES:
        found = ranks[size].run(rounded_keys, path)
        assert [one for one, _ in found] == [expected] * size
        assert torch.cat([part for _, part in found][:: max(1, size // count)], 1).equal(codes)


def test_an_llm_of_two_ranks(tmp_path: Path) -> None:
    first, second = (checkpoint("llama", tmp_path / str(seed), seed) for seed in range(2))
    options: dict[str, Any] = dict(dtype="float32", device="cpu", threads=1, max_model_len=LENGTH)
    params = SamplingParams(n=3, seed=1, max_tokens=12, prompt_logprobs=1, logprobs=1)

    def said(llm: LLM) -> list[list[int]]:
        (out,) = llm.generate([tokens(20)], params, use_tqdm=False)
        assert len([entry for entry in out.prompt_logprobs or () if entry]) == 19
        return [one.token_ids for one in out.outputs]

    want, other = (said(LLM(path, **options)) for path in (first, second))
    assert want != other
    llm = LLM(first, tensor_parallel_size=2, **options)
    assert said(llm) == want
    llm.sleep()
    with pytest.raises(OctavoError, match="sleeps"):
        said(llm)
    llm.wake_up()
    assert said(llm) == want
    llm.reload_weights(second)
    assert said(llm) == other
    with pytest.raises(OctavoError, match="nowhere"):
        llm.reload_weights("/nowhere")
    assert said(llm) == other
