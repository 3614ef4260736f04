"""The engine serves whatever keeps its contract; models split over ranks or stages give the whole one's logits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cases import cases
from conftest import COMMON, VOCAB, Loaded, LoadModel, relative_error, tokens
from models import test_vision, toy, toy_granite
from models.as_told import AsTold
from models.test_logits import CASES, randomize
from ranks import run_ranks
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

import octavo.models
from octavo import LLM, SamplingParams, batch, ops
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.models.dense import FusedLM
from octavo.models.interface import ModelInput, StageState
from octavo.platform import Platform


@pytest.fixture
def toy_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(octavo.models, "MODEL_TYPES", (*octavo.models.MODEL_TYPES, "toy"))
    monkeypatch.setitem(sys.modules, "octavo.models.toy", toy)


PROMPTS = [tokens(9, 1), tokens(30, 2), [5]]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.usefixtures("toy_architecture")
def test_an_architecture_of_another_kind_is_served(tmp_path: Path, eager: bool) -> None:
    """Greedy tokens and their log-probabilities are the float64 model's, decoded through two caches a layer."""
    weights = toy.write(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", device="cpu", block_size=4, enforce_eager=eager)
    prompts = [[token % toy.VOCAB for token in prompt] for prompt in PROMPTS]
    params = SamplingParams(max_tokens=20, temperature=0, logprobs=0, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        one = output.outputs[0]
        expected = toy.logits_in_float64(weights, [*prompt, *one.token_ids]).log_softmax(-1)[len(prompt) - 1 : -1]
        assert one.token_ids == expected.argmax(-1).tolist()
        found = [next(iter(entry.values())).logprob for entry in one.logprobs or []]
        assert found == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
    core = llm._core
    assert len(core.runner.cache.views) == 2 * toy.LAYERS
    assert (core.runner.graphs is None) == (eager or core.runner.platform.widened_dtype is not None)


@pytest.mark.parametrize("options", [{"quantization": "ptpc_fp8"}, {"quantization": "fp8", "quantize_lm_head": True}])
@pytest.mark.usefixtures("toy_architecture")
def test_it_is_quantized_like_any_other(tmp_path: Path, options: dict[str, object]) -> None:
    weights = toy.write(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", device="cpu", kv_cache_dtype="fp8", block_size=4, **options)
    views = llm._core.runner.cache.views
    assert {v["k"].dtype for v in views[::2]} == {torch.float32}
    assert {v["k"].dtype.itemsize for v in views[1::2]} == {1}
    ids = [token % toy.VOCAB for token in tokens(60)]
    (output,) = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    found = torch.tensor([entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)])
    exact = toy.logits_in_float64(weights, ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    error = relative_error(found, exact)
    assert 1e-4 < error < 0.08, "rounding to FP8 is seen, and no more than that"


# Writers of checkpoints of every architecture that is served, and of each option that changes what a layer computes.
EVERY = {name: lambda path, name=name: save(CASES[name](), path) for name in CASES} | {
    name: lambda path, name=name: test_vision.saved(name, path) for name in test_vision.CASES if "," not in name
}


def save(model: PreTrainedModel, path: Path) -> None:
    randomize(model).save_pretrained(path)


def implemented() -> set[type]:
    """The classes of all architectures that are served; some share one."""
    return {octavo.models.architecture({"model_type": name}).Model for name in octavo.models.MODEL_TYPES}


def error_as_told(loaded: Loaded) -> float | None:
    """Of the logits of decode steps that are computed by `parts`, against those op by op. None where it tells why not."""
    told = loaded.model.parts()
    if isinstance(told, str):
        return None
    ids, steps = tokens(24), (16, *[1] * 8)
    whole = loaded.logits(ids, steps)
    loaded.model.model.fused = fused = AsTold(told)
    found = loaded.logits(ids, steps)
    assert fused.steps == 8
    return relative_error(found[16:], whole[16:])


def error_of_head(loaded: Loaded) -> float:
    """Of the logits by `head`, which `octavo compare` takes a batch at a time, against `logits`, which is what is served."""
    hidden = torch.randn(3, loaded.model.head.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return relative_error(loaded.model.head(hidden), loaded.model.logits(hidden))


def test_layers_do_what_megakernels_are_told(tmp_path: Path, load_model: LoadModel) -> None:
    """A megakernel computes a layer by `parts` alone, so what else a layer does would be lost where there is one."""
    told: set[type] = set()
    for case, write in EVERY.items():
        torch.manual_seed(0)
        write(tmp_path / case)
        loaded = load_model(tmp_path / case)
        if isinstance(loaded.model, FusedLM) and (error := error_as_told(loaded)) is not None:
            assert error < 1e-5, case
            told.add(type(loaded.model))
    assert told == {model for model in implemented() if issubclass(model, FusedLM)}, "each has a case that tells its layers"


def test_logits_are_the_heads(tmp_path: Path, load_model: LoadModel) -> None:
    seen: set[type] = set()
    for case, write in EVERY.items():
        write(tmp_path / case)
        loaded = load_model(tmp_path / case)
        assert error_of_head(loaded) == 0, case
        seen.add(type(loaded.model))
    assert seen == implemented()


@pytest.mark.parametrize("written", [toy_granite.Model, toy_granite.Untold, toy_granite.ScaledBehind])
def test_what_a_model_leaves_untold_is_seen(
    written: type[toy_granite.Untold], tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has Granite's logits op by op. A megakernel would lose a factor of `Untold`, `octavo compare` one of the last."""
    monkeypatch.setattr(octavo.models, "MODEL_TYPES", (*octavo.models.MODEL_TYPES, "granite"))
    monkeypatch.setitem(sys.modules, "octavo.models.granite", toy_granite)
    monkeypatch.setattr(toy_granite, "Model", written)
    torch.manual_seed(0)
    factors = dict(residual_multiplier=0.3, logits_scaling=4.0, attention_multiplier=16**-0.5)
    reference = randomize(GraniteForCausalLM(GraniteConfig(**COMMON, **factors, tie_word_embeddings=False)))
    reference.save_pretrained(tmp_path)
    loaded, ids = load_model(tmp_path), tokens(24)
    with torch.no_grad():
        assert relative_error(loaded.logits(ids, (16, *[1] * 8)), reference(torch.tensor([ids])).logits[0]) < 1e-4
    error = error_as_told(loaded)
    assert error is not None and error > 0.1 if written is toy_granite.Untold else error is None
    assert (error_of_head(loaded) > 1) == (written is toy_granite.ScaledBehind)


@cases("ranks", [2, 4])
@cases("case", CASES)
def test_ranks_give_the_whole_models_logits(case: str, ranks: int, tmp_path: Path, load_model: LoadModel) -> None:
    torch.manual_seed(0)
    randomize(CASES[case]()).save_pretrained(tmp_path)
    ids = tokens(40)
    whole = load_model(tmp_path).logits(ids, (30, 1, 9))

    def run(tp: TensorParallel) -> torch.Tensor:
        part = load_model(tmp_path, tp=tp).logits(ids, (30, 1, 9))
        return Vocabulary(VOCAB, tp).whole(part)

    for logits in run_ranks(ranks, run):
        assert relative_error(logits, whole) < 1e-5


@pytest.mark.parametrize("ranks", [3, 8])
def test_ranks_that_query_heads_do_not_split_over_are_refused(ranks: int, tmp_path: Path, load_model: LoadModel) -> None:
    """Four query heads: more ranks than that would each have a part of the output projection that is not their heads'."""
    randomize(CASES["llama"]()).save_pretrained(tmp_path)
    with pytest.raises(
        OctavoError, match=f"4 heads .*do not split over {ranks} ranks; use a --tensor-parallel-size of 1, 2 or 4"
    ):
        load_model(tmp_path, tp=TensorParallel(0, ranks))


STAGES = {
    "llama, tied": (1, 1, 1), "qwen3": (1, 1, 1), "mistral, sliding window": (1, 1, 1), "glm4_moe": (1, 1, 1),
    "minimax_m2": (1, 1, 1), "deepseek_v3": (1, 1, 1), "deepseek_v32": (2, 2, 2),
    "glm_moe_dsa, one indexer, experts first": (2, 1, 1),
}  # fmt: skip


@cases("case", STAGES)
def test_stages_give_the_whole_models_logits(case: str, tmp_path: Path, load_model: LoadModel) -> None:
    """Three layers, of so many caches each, as two stages, each of which reads its own weights only; the state between them is
    plain tensors: two, and, from an indexer whose choice the next stage's layers share, that."""
    torch.manual_seed(0)
    randomize(CASES[case]()).save_pretrained(tmp_path)
    ids = tokens(40)
    whole = load_model(tmp_path)
    stages = [load_model(tmp_path, layers=layers) for layers in (range(0, 1), range(1, 3))]
    caches = STAGES[case]
    assert [len(stage.cache.views) for stage in stages] == [caches[0], sum(caches[1:])]
    found = []
    with torch.inference_mode():
        for start, stop in ((0, 5), (5, 30), (30, 31), (31, 40)):
            spans = [batch.Span(ids[start:stop], start, list(range(1, 12)))]
            first, second = (batch.build(spans, 4, whole.platform.device) for _ in stages)  # as two processes would
            state = stages[0].model(first, stages[0].model.embed(first.input_ids))
            assert isinstance(state, StageState)
            assert not isinstance(state, ModelInput)
            assert {type(part) for part in (state.x, state.residual, *state.extras)} == {torch.Tensor}
            assert bool(state.extras) == ("one indexer" in case and stop > 6)
            found.append(stages[1].model.logits(stages[1].model(second, state)))
    assert relative_error(torch.cat(found), whole.logits(ids, (5, 25, 1, 9))) < 1e-6


def test_the_argmax_over_ranks() -> None:
    """Of equal logits the first wins, and NaN counts as the largest: as on one rank. Rows past the vocabulary never win."""
    ops.bind(Platform(torch.device("cpu"), "test"))
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    logits[1, [2, 7]] = 9.0
    logits[2, [4, 9]] = 9.0
    logits[3, 8] = torch.nan
    logits[4] = -torch.inf
    padded = torch.nn.functional.pad(logits, (0, 2), value=-torch.inf)

    def run(tp: TensorParallel) -> tuple[torch.Tensor, torch.Tensor]:
        vocabulary, part = Vocabulary(10, tp), padded.chunk(tp.size, 1)[tp.rank].contiguous()
        return vocabulary.argmax(part), vocabulary.whole(part)

    for ranks in (1, 2, 3, 4):
        for found, whole in run_ranks(ranks, run):
            assert found.tolist() == logits.argmax(-1).tolist()
            assert torch.equal(whole[:, :10].nan_to_num(), logits.nan_to_num())


def test_a_rank_that_fails_ends_the_others() -> None:
    def run(tp: TensorParallel) -> None:
        if tp.rank == 1:
            raise ValueError("no weights")
        tp.all_reduce(torch.ones(3))

    with pytest.raises(ValueError, match="no weights"):
        run_ranks(2, run)
