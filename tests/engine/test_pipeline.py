"""Engines whose layers are split over pipeline stages, processes over gloo: the tokens are those of one rank."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import tokens
from engine.replays import capture
from engine.test_core import ENGINE, request, run, token_ids
from engine.test_ranks import answers, asked, checkpoint, lives, structured
from models.test_logits import llama, randomize
from rank_processes import RankProcesses
from ranks import storage_bytes
from safetensors.torch import load_file

from octavo import LLM, SamplingParams, ops
from octavo.config import EngineConfig
from octavo.distributed import TensorParallel
from octavo.engine.block_pool import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.pipeline import Pipeline
from octavo.engine.place import Place, Pulse
from octavo.engine.runner import ModelRunner
from octavo.engine.sampling_row import SamplingRow
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Request, ScheduledRequest
from octavo.engine.step_tokens import StepTokens
from octavo.errors import OctavoError
from octavo.frontend.router import Replicas
from octavo.messages import Logprob

Run = Callable[..., list[Any]]
# Models, dense, of experts, of MLA, and what shares a state beside; their splits: ranks a stage, stages.
SPLITS = {"llama": ((1, 2), (2, 2)), "qwen3_moe": ((2, 2),), "deepseek_v3": ((1, 2),), "glm_moe_dsa": ((2, 2),)}
AHEAD = {"llama": ((1, 2), (1, 3)), "qwen3_moe": ((2, 2),), "glm_moe_dsa": ((1, 3),)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """What a function gives on each of so many ranks, which are the first of four processes."""
    directory, numbers = tmp_path_factory.mktemp("ranks"), count()
    processes = RankProcesses(4, directory)
    yield lambda size, fn, *args: processes.run(among, size, str(directory / str(next(numbers))), fn, args)[:size]
    processes.close()


def among(place: Place, size: int, store: str, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The answer of one of `size` ranks; None on others. store: of these alone."""
    return fn(replace(place, size=size, store=store, links=place.links[: size - 1]), *args) if place.rank < size else None


def split(tp: int, pp: int) -> dict[str, Any]:
    return dict(tensor_parallel_size=tp, pipeline_parallel_size=pp)


def test_stages_say_what_one_rank_says(ranks: Run, tmp_path: Path) -> None:
    """Tokens on every rank, probabilities on rank 0, which answers; in chunks, from the prefix cache and preempted."""
    failed: list[str] = []
    for model_type, splits in SPLITS.items():
        path, wanted = checkpoint(model_type, tmp_path / model_type), asked(model_type)
        one = answers(Place(), path, wanted, {})
        assert len({token for ids in one.tokens.values() for token in ids}) > 12, "outputs too dull to tell a mistake by"
        for tp, pp in splits:
            found = ranks(tp * pp, answers, path, wanted, split(tp, pp))
            wrong = found[0].differences(one, tp * pp)
            assert " in stage 0 of 2, on CPU" in found[0].model  # whose parameters are fewer
            failed += [f"{model_type}, {tp} x {pp}: {what}" for what in wrong if what != "parameters"]
            failed += [f"{model_type}, {tp} x {pp}, rank {n}" for n, each in enumerate(found) if each.tokens != one.tokens]
    assert not failed, "\n".join(failed)


def ahead(place: Place, fn: Callable[..., Any], *args: Any) -> Any:
    """What `fn` gives of a stage that does as on an accelerator: it replays decode and prefill graphs, and computes tokens
    before a host has read them."""

    def make_graphs(runner: ModelRunner) -> None:
        runner.num_blocks -= 1  # the scratch block
        runner.graphs = runner.prompts = None
        if runner.model.limits().eager is None:
            runner._capture_graphs()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Pipeline, "ahead", property(lambda self: True, lambda self, value: None), raising=False)
        monkeypatch.setattr(ModelRunner, "_make_graphs", make_graphs)
        monkeypatch.setattr(ops, "capture", capture)
        monkeypatch.setattr(ops, "captures", lambda head_dim, weights, latent=False: not latent)
        return fn(place, *args)


class Line:
    """The stages as the last of two sees them, which keeps what is sent to the first."""

    number, count, first, last = 1, 2, False, True

    def __init__(self) -> None:
        self.sent: list[list[Any]] = []

    def send_numbers(self, numbers: torch.Tensor, rank: int, stage: int) -> None:
        self.sent.append(numbers.tolist())

    def send(self, tensors: Sequence[torch.Tensor], rank: int, stage: int) -> None:
        self.sent.append([pickle.loads(bytes(one.tolist())) for one in tensors])


def test_hosts_are_told_of_steps_in_their_order() -> None:
    """A chunk of a prompt, whose probabilities are asked for, samples nothing; the step before it has tokens on their way."""
    line, ahead = Line(), 64
    last = Pipeline(cast("Any", None), TensorParallel(stages=cast("Any", line)), Pulse(), ahead=True)
    decoded = Request(request("decoded", [5, 6], max_tokens=9), ahead)
    asked = Request(request("asked", tokens(30), prompt_logprobs=2), ahead)

    def sampled(one: Request, count: int, samples: bool, out: StepTokens) -> StepTokens:
        row = SamplingRow(one.params, one.token_ids, one.num_prompt_tokens, 0)
        return last.sampled(out, [ScheduledRequest(one, 0, count, samples)], [row])

    tokens_out, probabilities = StepTokens(), {"asked": [(Logprob(7, -0.5, 1),)]}
    tokens_out.put(torch.tensor([9]), ["decoded"])
    steps = [
        sampled(decoded, 2, True, tokens_out),
        sampled(asked, 8, False, StepTokens(prompt_logprobs=probabilities)),
    ]
    assert line.sent == [], "the host may not have the first step's tokens yet"
    assert [step.to_host() for step in steps] == [[9], []]
    assert line.sent == [[9], [], [({}, probabilities)]]
    assert all(step.tell_early() for step in steps)
    assert len(line.sent) == 3, "once"


def test_graphs_of_stages_and_tokens_that_go_back_to_the_first(ranks: Run, tmp_path: Path) -> None:
    """As on accelerators: tokens are those of one rank, whichever requests need their last token on the host."""
    failed: list[str] = []
    for model_type, splits in AHEAD.items():
        path, wanted = checkpoint(model_type, tmp_path / model_type), asked(model_type)
        one = answers(Place(), path, wanted, {})
        for tp, pp in splits:
            found = ranks(tp * pp, ahead, answers, path, wanted, split(tp, pp))
            failed += [f"{model_type}, {tp} x {pp}, rank {n}" for n, each in enumerate(found) if each.tokens != one.tokens]
            failed += [
                f"{model_type}, {tp} x {pp}: {what}" for what in found[0].differences(one, tp * pp) if what == "probabilities"
            ]
    assert not failed, "\n".join(failed)


def chunked(place: Place, path: str, options: dict[str, Any]) -> dict[str, list[int]]:
    """Tokens of a request that decodes beside a prompt in chunks, whose probabilities are asked for."""
    core = EngineCore(EngineConfig(**dict(model=path, max_num_batched_tokens=8) | ENGINE | options), None, place)
    decoded = request("decoded", [5, 6, 7], temperature=0, max_tokens=30)
    asked = request("asked", tokens(60, seed=5), temperature=0, prompt_logprobs=2, max_tokens=3)
    return token_ids(run(core, [decoded, asked], apart=3)[0])


def test_chunks_whose_probabilities_are_asked_for_beside_tokens_on_their_way(ranks: Run, tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    assert ranks(2, ahead, chunked, path, split(1, 2)) == [chunked(Place(), path, {})] * 2


def held(place: Place, path: str, options: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of this rank's weights and tables; blocks of its cache, and its caches."""
    core = EngineCore(EngineConfig(**dict(model=path) | ENGINE | options), None, place)
    assert not [note for note in core.runner.report.notes if "not loaded" in note]  # by this stage, as the other says
    return storage_bytes(core.runner.model), core.runner.num_blocks, len(core.runner.cache.views)  # type: ignore[arg-type]


def test_a_stage_holds_its_layers_alone(ranks: Run, tmp_path: Path) -> None:
    """Three layers, two of them in the first stage; a tied embedding in both. Blocks are as many as fit the larger stage."""
    randomize(llama(tie_word_embeddings=True, num_hidden_layers=3)).save_pretrained(tmp_path)
    sizes = {name: 4 * tensor.numel() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    whole, blocks, _ = held(Place(), str(tmp_path), {})
    tables = whole - sum(sizes.values())
    own = (r"embed_tokens|layers\.[01]\.", r"embed_tokens|layers\.2\.|model\.norm")
    for stage, found in enumerate(ranks(2, held, str(tmp_path), split(1, 2))):
        stored = sum(size for name, size in sizes.items() if re.search(own[stage], name))
        assert found == (pytest.approx(stored + tables, rel=0.001), blocks, 2 - stage)


def test_a_grammar_and_other_weights(ranks: Run, tmp_path: Path) -> None:
    """Whichever stage is behind with a grammar; weights are freed, restored and reloaded, with measured KV scales."""
    expected = structured(Place(), 1)
    for slow in range(2):
        assert ranks(2, structured, slow, 2) == [expected] * 2
    first, second = (checkpoint("llama", tmp_path / str(seed), seed) for seed in range(2))
    *before, _ = lives(Place(), first, second)
    for *found, _ in ranks(2, lives, first, second, 2):
        assert found == before


def test_of_ranks_that_stand_still_the_one_with_the_smallest_numbers_is_waited_for() -> None:
    """Two stages in two passes, of unlike numbers of exchanges, and a meeting of all."""
    first, last = Pulse(), Pulse()

    def numbers(pulse: Pulse) -> tuple[int, int]:
        return pulse.turns, pulse.exchanges

    first.enter(0, 2)
    last.enter(1, 2)
    assert numbers(first) < numbers(last), "the first computes, the last waits for its state"
    for _ in range(3):
        first.exchange()
    first.pass_on()
    last.exchange()
    assert numbers(last) < numbers(first), "the last computes, the first waits for its tokens"
    first.enter(0, 2)
    assert numbers(last) < numbers(first), "or is a pass ahead"
    first.pass_on()
    last.enter(1, 2)
    assert numbers(last) < numbers(first)
    first.meet()
    assert numbers(last) < numbers(first)
    last.meet()
    assert numbers(last) == numbers(first)


def test_what_is_refused(ranks: Run, tmp_path: Path) -> None:
    seeing, text = checkpoint("qwen3_vl", tmp_path / "seeing"), checkpoint("llama", tmp_path / "text")
    for path, options, sentence in (
        (seeing, {}, "serves text alone: .* add --language-model-only"),
        (
            text,
            dict(kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=("1",)),
            "--kv-cache-dtype-skip-layers is not served with",
        ),
    ):
        for said in ranks(2, refused, path, split(1, 2) | options):
            assert re.search(sentence, said), said


def refused(place: Place, path: str, options: dict[str, Any]) -> str:
    with pytest.raises(OctavoError) as error:
        EngineCore(EngineConfig(**dict(model=path) | ENGINE | options), None, place)
    return str(error.value)


def test_each_stage_has_a_step_of_its_own() -> None:
    """Two of six requests for each of three stages; one whose token is not back is left out, and a prompt's chunks follow."""
    scheduler = Scheduler(BlockPool(64, 4, False), 8, 12, 64, stages=3)
    for n in range(6):
        scheduler.add(request(str(n), [5, 6], max_tokens=9))
    first = scheduler.schedule()
    assert len(first.items) == 6  # all prompts fit into one step
    assert scheduler.schedule().items == []
    scheduler.update(first, [7] * 6)
    flying = deque(scheduler.schedule() for _ in range(3))
    for _ in range(6):
        taken = [{item.request.request_id for item in step.items} for step in flying]
        assert [len(ids) for ids in taken] == [2, 2, 2]
        assert len(set().union(*taken)) == 6
        scheduler.update(flying.popleft(), [7, 7])
        flying.append(scheduler.schedule())
    scheduler.add(request("long", list(range(5, 35)), max_tokens=9))
    chunks = [next(item for item in scheduler.schedule().items if item.request.request_id == "long") for _ in range(3)]
    assert [(item.start, item.num_tokens, item.samples) for item in chunks] == [(0, 12, False), (12, 12, False), (24, 6, True)]


def test_llm_and_replicas_of_stages(tmp_path: Path) -> None:
    """LLM says what one rank says. Of two engines of two stages each, one goes on when a stage of the other is killed."""
    path = checkpoint("llama", tmp_path)
    params, options = SamplingParams(temperature=0, max_tokens=9), dict(device="cpu", threads=1, dtype="float32")
    prompts = [[5 + n, 6, 7, 8] for n in range(6)]
    found = [
        [out.outputs[0].token_ids for out in LLM(path, **options, pipeline_parallel_size=pp).generate(prompts, params, False)]
        for pp in (1, 2)
    ]
    assert found[0] == found[1]

    async def main() -> None:
        config = EngineConfig(model=path, **options, pipeline_parallel_size=2, data_parallel_size=2)  # type: ignore[arg-type]
        engines = await Replicas.start(config)

        async def tokens(number: int, name: str) -> list[int]:
            deltas = engines.generate(prompts[0], params, name, number=number)
            return [token async for delta in deltas for token in delta.token_ids]

        try:
            assert await asyncio.gather(tokens(0, "a"), tokens(1, "b")) == [list(found[0][0])] * 2
            first = engines.engines[0]
            assert first is not None
            os.kill(first._processes._processes[1].pid or 0, signal.SIGKILL)
            assert (await asyncio.wait_for(first.death(), 20)).startswith("Rank 1 of the engine was killed")
            assert await tokens(1, "c") == list(found[0][0])
        finally:
            await engines.shutdown()

    asyncio.run(main())
