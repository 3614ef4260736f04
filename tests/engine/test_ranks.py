"""Engines of several ranks, which are processes over gloo: the tokens are those of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import COMMON
from engine.test_core import ENGINE, LENGTH, TWELVE, run, token_ids
from models.test_logits import randomize
from rank_processes import RankProcesses
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.config import EngineConfig
from octavo.engine.block_pool import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.place import Place
from octavo.engine.scheduler import Scheduler

SIZES = (2, 4)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankProcesses]]:
    made = {size: RankProcesses(size, tmp_path_factory.mktemp("ranks")) for size in SIZES}
    yield made
    for one in made.values():
        one.close()


def answers(place: Place, path: str, blocks: int | None = None, **options: Any) -> tuple[dict[str, list[int]], int, int]:
    """Tokens of TWELVE, preemptions, and tokens found in the prefix cache, of an engine of this process's place."""
    core = EngineCore(EngineConfig(**dict(model=path, tensor_parallel_size=place.size) | ENGINE | options), None, place)
    if blocks is not None:
        pool = BlockPool(blocks, 4, core.scheduler.pool.prefix_caching)
        core.scheduler = Scheduler(pool, 256, core.runner.max_num_batched_tokens, LENGTH)
    outputs, sums = run(core, TWELVE)
    return token_ids(outputs), sums.num_preemptions, sums.prefix_cache_hits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    randomize(LlamaForCausalLM(LlamaConfig(**COMMON))).save_pretrained(path)
    return str(path)


def test_ranks_say_what_one_says(ranks: dict[int, RankProcesses], llama: str) -> None:
    """Whole, in parts, and preempted; greedy and sampled, with penalties and logprobs."""
    expected, *_ = answers(Place(), llama)
    assert len({token for ids in expected.values() for token in ids}) > 50
    for size in SIZES:
        for options in ({}, {"max_num_batched_tokens": 11}, {"blocks": 26, "max_num_batched_tokens": 30}):
            for found, preemptions, _ in ranks[size].run(answers_of, llama, options):
                assert found == expected, (size, options)
                assert bool(preemptions) == ("blocks" in options)


def answers_of(place: Place, path: str, options: dict[str, Any]) -> tuple[dict[str, list[int]], int, int]:
    return answers(place, path, **options)
