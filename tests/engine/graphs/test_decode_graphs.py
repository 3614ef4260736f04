"""Which rows a decode graph computes, without a device: a capture that only remembers what to run again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from octavo import ops
from octavo.batch import ForwardBatch, Span, build
from octavo.engine.graphs.block_tables import KEPT, BlockTables
from octavo.engine.graphs.cpu_replay import RecordedSteps
from octavo.engine.graphs.decode import DecodeGraphs
from octavo.errors import OctavoError
from octavo.kvcache import KVCache, LayerCache, Layout, Views, spec_for
from octavo.ops import reference
from octavo.ops.cpu import library, native, op_recorder
from octavo.platform import Platform

BLOCK, SCRATCH = 4, 99


DEVICE = Platform(torch.device("cpu"), "test")


pytestmark = pytest.mark.usefixtures("replays")


class Model:
    """Writes token ids to a cache at their slots; its logits say what each row was given, and what it chooses is 1000 more."""

    def __init__(self) -> None:
        self.cache = torch.full(((SCRATCH + 1) * BLOCK,), -1)
        self.bounds: list[int] = []

    def __call__(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        self.cache[batch.slot_mapping] = batch.input_ids
        self.bounds.append(batch.context_lens[0])
        table = batch.block_tables[:, :3].long()
        columns = (batch.input_ids, batch.positions, batch.slot_mapping, batch.seq_lens.long(), *table.unbind(1))
        return torch.stack(columns, 1), batch.input_ids + 1000


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def graphs(model: Model) -> DecodeGraphs:
    return DecodeGraphs(model, DEVICE, BLOCK, 9, 10_000, SCRATCH, lambda size, context: context)


def test_sizes_and_contexts(graphs: DecodeGraphs) -> None:
    assert graphs.sizes == [1, 2, 4, 8, 9]
    assert graphs.contexts == [512, 4096, 10_000]
    assert len(graphs) == 15


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_rows_of_a_step(count: int, graphs: DecodeGraphs, model: Model) -> None:
    """Tokens from the host and from the last step; rows that are left over touch nobody's blocks."""
    model.cache.fill_(-1)
    spans = [Span([50 + i], i + 2, [3 * i + 1, 3 * i + 2, 3 * i + 3]) for i in range(count)]
    last = torch.arange(200, 209)
    sources = [i + 1 if i % 2 else -1 for i in range(count)]
    found = graphs.run(spans, last, sources)
    assert found is not None
    logits, chosen = found
    assert logits.shape[0] == chosen.shape[0] == count
    assert chosen.tolist() == [row[0] + 1000 for row in logits.tolist()]
    for i, (row, span) in enumerate(zip(logits.tolist(), spans, strict=True)):
        slot = span.block_ids[span.start // BLOCK] * BLOCK + span.start % BLOCK
        width = max(s.start for s in spans) // BLOCK + 1
        token = 201 + i if i % 2 else 50 + i
        assert row[:4] == [token, span.start, slot, span.start + 1]
        assert row[4 : 4 + min(width, 3)] == list(span.block_ids[: min(width, 3)])
        assert model.cache[slot] == token
    written = (model.cache >= 0).nonzero().flatten().tolist()
    mine = {s.block_ids[s.start // BLOCK] * BLOCK + s.start % BLOCK for s in spans}
    assert set(written) - mine <= {SCRATCH * BLOCK}


@pytest.mark.parametrize("count", [1, 3, 9])
def test_rotary_rows_lengths_and_what_is_live(count: int) -> None:
    """A request's rows are its own; rows that are left over have no context, whatever was there before, and are not live."""
    seen: list[list[list[int]]] = []

    def forward(batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        assert batch.live is not None
        assert batch.live.dtype is torch.int32
        seen.append([x.tolist() for x in (batch.positions, batch.rotary_rows, batch.seq_lens, batch.live)])
        return batch.input_ids.unsqueeze(1), batch.input_ids

    graphs = DecodeGraphs(forward, DEVICE, BLOCK, 9, 100, SCRATCH, lambda size, context: context)
    assert all(not any(lengths) and live == [0] for _, _, lengths, live in seen)  # while it captures
    for before in (9, count):
        spans = [Span([5], 10 + i, [1, 2, 3, 4, 5], rotary_delta=7 - 3 * i) for i in range(before)]
        graphs.run(spans, None, [-1] * before)
    size = next(size for size in graphs.sizes if size >= count)
    rest = [0] * (size - count)
    assert seen[-1] == [
        [*range(10, 10 + count), *rest],
        [*(17 - 2 * i for i in range(count)), *rest],
        [*range(11, 11 + count), *rest],
        [count],
    ]


def test_what_a_longer_step_left_does_not_matter(graphs: DecodeGraphs) -> None:
    graphs.run([Span([1], 9, [7, 8, 9])] * 4, None, [-1] * 4)
    found = graphs.run([Span([2], 0, [5])], None, [-1])
    assert found is not None
    assert found[0].tolist()[0][:5] == [2, 0, 20, 1, 5]


def test_what_a_replay_chose_is_the_next_ones_token(graphs: DecodeGraphs) -> None:
    """Without a copy, in another order, in a batch of another size, and beside a token that the host knows."""
    _, chosen = graphs.run([Span([i], 3, [1]) for i in range(3)], None, [-1] * 3) or pytest.fail("no graph")
    assert chosen.tolist() == [1000, 1001, 1002]
    spans = [Span([0], 4, [1, 2]), Span([7], 0, [3]), Span([0], 4, [1, 2]), Span([0], 4, [1, 2]), Span([9], 1, [4])]
    _, chosen = graphs.run(spans, chosen, [2, -1, 0, 1, -1]) or pytest.fail("no graph")
    assert chosen.tolist() == [2002, 1007, 2000, 2001, 1009]


def test_block_tables_are_sent_where_they_changed(graphs: DecodeGraphs) -> None:
    def blocks(spans: list[Span]) -> list[list[int]]:
        logits, _ = graphs.run(spans, None, [-1] * len(spans)) or pytest.fail("no graph")
        return [row[4:] for row in logits.tolist()]

    assert blocks([Span([1], 9, [7, 8, 9]), Span([1], 2, [4])]) == [[7, 8, 9], [4, 0, 0]]
    graphs.tables.zero_()  # what is known to be there is not sent again
    assert blocks([Span([1], 10, [7, 8, 9]), Span([1], 3, [4])]) == [[0, 0, 0], [0, 0, 0]]
    assert blocks([Span([1], 10, [7, 8, 6]), Span([1], 3, [4])]) == [[7, 8, 6], [4, 0, 0]]


def test_tables_follow_lists_that_grow() -> None:
    """Of several parts of the requests in turn, whose lists grow in place; another list of the same length is not taken for one
    of them, and one that a preempted request has got anew is read anew."""
    rng = random.Random(0)
    tables, parts = BlockTables(6), [[[rng.randrange(99)] for _ in range(3)] for _ in range(KEPT + 1)]
    for step in range(200):
        part = rng.choice(parts)
        for row, blocks in enumerate(part):
            if rng.random() < 0.2:
                part[row] = [rng.randrange(99)]
            elif rng.random() < 0.3:
                blocks += [rng.randrange(99) for _ in range(rng.randrange(3))]
        found = tables.of(list(part)).tolist()
        assert found == [(blocks + [0] * 6)[:6] for blocks in part], step


def test_the_bound_on_the_context_is_the_next_one(graphs: DecodeGraphs, model: Model) -> None:
    blocks = list(range(1, 90)) * 30
    for start, bound in ((511, 512), (512, 4096), (9_999, 10_000)):
        graphs.run([Span([1], start, blocks)], None, [-1])
        assert model.bounds[-1] == bound


def test_bounds_that_make_no_difference_share_a_graph(model: Model) -> None:
    """It is of the longest of them, since a step's contexts may be."""
    graphs = DecodeGraphs(
        model, DEVICE, BLOCK, 4, 10_000, SCRATCH, lambda size, context: min(context, 4096) if size == 1 else 1
    )
    assert len(graphs) == 4
    for start, size, bound in ((5, 1, 512), (600, 1, 10_000), (9_000, 1, 10_000), (5, 2, 10_000), (9_000, 4, 10_000)):
        graphs.run([Span([1], start, list(range(1, 90)) * 30)] * size, None, [-1] * size)
        assert model.bounds[-1] == bound


def test_more_requests_than_any_graph(graphs: DecodeGraphs) -> None:
    assert graphs.run([Span([1], 0, [1])] * 10, None, [-1] * 10) is None
    assert graphs.run([Span([1], 0, [1])], torch.zeros(10, dtype=torch.int64), [9]) is None  # chosen by such a step


def test_no_memory_to_capture_in_is_one_sentence(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fn: Callable[[], Any], pool: object = None) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "capture", full)
    with pytest.raises(OctavoError, match="--gpu-memory-utilization"):
        DecodeGraphs(model, DEVICE, BLOCK, 2, 100, SCRATCH, lambda size, context: context)


def test_kernels_are_compiled_before_any_capture(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are powers of two and the largest, each variant once, and what the caller rehearses."""
    ran: list[str] = []

    @contextmanager
    def compiling() -> Iterator[None]:
        ran.append("compile")
        yield
        ran.append("compiled")

    def forward(batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        ran.append(f"{len(batch.query_lens)}x{batch.context_lens[0]}")
        return model(batch)

    monkeypatch.setattr(ops, "compile_ahead", compiling)
    DecodeGraphs(
        forward, DEVICE, BLOCK, 9, 10_000, SCRATCH, lambda size, context: context > 512,
        lambda: ran.append("prefill"),
    )  # fmt: skip
    done = ran.index("compiled")
    both = [f"{size}x{context}" for size in (1, 2, 4, 8, 9) for context in (512, 10_000)]
    assert ran[:done] == ["compile", "prefill", *both]
    assert set(ran[done + 1 :]) == set(both)


def test_on_a_cpu_each_size_is_recorded_when_it_comes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, without rows to spare, and the recording computes the step: it runs from what the step before chose."""
    monkeypatch.setattr(ops, "capture", op_recorder.capture)
    steps = RecordedSteps(model, BLOCK, 40, 10_000)
    assert steps.run([Span([1], 0, [1])] * 33, None, [-1] * 33) is None
    assert (len(steps), len(model.bounds)) == (0, 0)
    chosen = None
    for step, count in enumerate((3, 3, 2, 3, 2, 1)):
        tables = [[3 * i + 1 + 20 * (step % 2), 3 * i + 2, 3 * i + 3] for i in range(count)]
        spans = [Span([7 * (not step)], 3 + step, table) for table in tables]
        before = chosen.tolist() if chosen is not None else [7] * count
        sources = [i % len(before) if step else -1 for i in range(count)]
        given = [before[i % len(before)] for i in range(count)]
        logits, chosen = steps.run(spans, chosen, sources) or pytest.fail("not recorded")
        slots = [table[(3 + step) // BLOCK] * BLOCK + (3 + step) % BLOCK for table in tables]
        rows = [[token, 3 + step, slot, 4 + step, *table] for token, slot, table in zip(given, slots, tables, strict=True)]
        assert logits.tolist() == rows
        assert chosen.tolist() == [token + 1000 for token in given]
    assert len(steps) == len(model.bounds) == 3  # Python went through the model for recordings only


def test_a_request_with_fewer_blocks_than_the_one_before_it_in_the_row(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "capture", op_recorder.capture)
    steps = RecordedSteps(model, BLOCK, 4, 12)
    for span in (Span([5], 11, [1, 2, 3]), Span([6], 2, [9]), Span([7], 3, [8, 7, 6, 5])):
        logits, _ = steps.run([span], None, [-1]) or pytest.fail("not recorded")
        held = span.block_ids[:3]
        assert logits[0, 4 : 4 + len(held)].tolist() == held


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
def test_a_recorded_step_rotates_by_its_requests_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one in each replay; as the reference does with a table shifted by as much."""
    cos_sin, spec = torch.randn(60, 16), spec_for("auto", 2, 16, torch.float32, torch.float8_e4m3fn, Layout.BY_HEAD)
    weight = torch.randn(100, 8, 16)
    ours, theirs = (KVCache([spec], 9, BLOCK, DEVICE.device).views[0] for _ in range(2))

    def attended(batch: ForwardBatch, op: Any, views: Views, table: Tensor, rows: Tensor) -> Tensor:
        q, k, v = weight[batch.input_ids].split([4, 2, 2], 1)
        cache = LayerCache(views, torch.ones(1), torch.ones(1))
        q = op.rope_write_kv(q, k, v, ops.Rope(None, table, rows), cache, batch.slot_mapping)
        out: Tensor = op.attention(q, cache, batch, 0.25, None)
        return out.flatten(1)

    def forward(batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        return attended(batch, native, ours, cos_sin, batch.rotary_rows), batch.input_ids

    monkeypatch.setattr(ops, "capture", op_recorder.capture)
    steps = RecordedSteps(forward, BLOCK, 4, 32)
    for place, delta in enumerate((7, 0, 11, -2)):
        spans = [Span([3 + place], place, [1], rotary_delta=delta), Span([50 + place], place, [2], rotary_delta=delta)]
        logits, _ = steps.run(spans, None, [-1, -1]) or pytest.fail("not recorded")
        batch = build(spans, BLOCK, DEVICE.device)
        expected = attended(batch, reference, theirs, cos_sin.roll(-delta, 0), batch.positions)
        assert relative_error(logits, expected) < 1e-6
    assert len(steps) == 1
