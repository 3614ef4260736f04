"""What a prompt's graph computes, without a device: a capture that only remembers what to run again."""

from __future__ import annotations

import pytest
import torch
from cases import cases
from torch import Tensor

from octavo.batch import ForwardBatch, Span
from octavo.engine.graphs.prefill import PrefillGraphs
from octavo.platform import Platform

BLOCK, SCRATCH = 16, 60
DEVICE = Platform(torch.device("cpu"), "test")


pytestmark = pytest.mark.usefixtures("replays")


class Model:
    """Adds up token ids times positions, as a causal model could: what comes after a token does not matter to it."""

    def __init__(self) -> None:
        self.cache = torch.full(((SCRATCH + 1) * BLOCK,), -1)
        self.sizes: list[int] = []

    def __call__(self, batch: ForwardBatch, last: Tensor) -> tuple[Tensor, Tensor]:
        assert batch.query_lens == batch.context_lens == [batch.num_tokens]
        assert batch.seq_lens.tolist() == [batch.num_tokens]
        assert batch.query_start_loc.tolist() == [0, batch.num_tokens]
        self.sizes.append(batch.num_tokens)
        self.cache[batch.slot_mapping] = batch.input_ids
        self.table = batch.block_tables[0].tolist()
        assert batch.live is not None
        assert batch.live.dtype is torch.int32
        self.live, self.rotary_rows = batch.live.tolist(), batch.rotary_rows.tolist()
        seen = (batch.input_ids * (batch.positions + 1)).cumsum(0)[last]
        return torch.stack([seen, last], 1), seen + 1


@cases("length", [2, 63, 64, 65, 200, 512])
def test_a_prompt_is_what_it_is_alone(length: int) -> None:
    model = Model()
    graphs = PrefillGraphs(model, DEVICE, BLOCK, 4096, SCRATCH)
    graphs.capture()
    for start in (3, 1):  # the second is not what the first left
        ids, blocks = list(range(start, start + length)), list(range(2, 2 + -(-length // BLOCK)))
        model.cache.fill_(-1)
        logits, tokens = graphs.run(Span(ids, 0, blocks)) or pytest.fail("no graph")
        expected = sum(token * (at + 1) for at, token in enumerate(ids))
        assert logits.tolist() == [[expected, length - 1]]
        assert tokens.tolist() == [expected + 1]
        assert model.sizes[-1] == next(size for size in (64, 128, 256, 512) if size >= length)
        assert model.cache[2 * BLOCK : 2 * BLOCK + length].tolist() == ids
        written = set((model.cache >= 0).nonzero().flatten().tolist())
        assert written - set(range(2 * BLOCK, 2 * BLOCK + length)) <= {SCRATCH * BLOCK}
        assert model.table[: len(blocks)] == blocks
        assert set(model.table[len(blocks) :]) <= {SCRATCH}


@pytest.mark.parametrize("delta", [0, 7])
def test_rotary_rows_and_what_is_live(delta: int) -> None:
    model = Model()
    graphs = PrefillGraphs(model, DEVICE, BLOCK, 4096, SCRATCH)
    graphs.capture()
    for length in (100, 70, 128):
        graphs.run(Span([3] * length, 0, list(range(9)), rotary_delta=delta))
        assert model.live == [length]
        assert model.rotary_rows[:length] == list(range(delta, delta + length))
        assert not any(model.rotary_rows[length:])  # of what is not there: any row that there is


def test_what_no_graph_takes() -> None:
    graphs = PrefillGraphs(Model(), DEVICE, BLOCK, 200, SCRATCH)
    assert graphs.sizes == [64, 128]
    assert graphs.run(Span([1] * 129, 0, list(range(9)))) is None
    assert graphs.run(Span([1] * 20, 16, [0, 1, 2])) is None  # the rest of a prompt whose beginning is known
    assert PrefillGraphs(Model(), DEVICE, BLOCK, 63, SCRATCH).run(Span([1] * 5, 0, [0])) is None
