"""Collectives over torch.distributed: what each rank gives, and what all get, in the order of ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.distributed import FileStore
from torch.multiprocessing.spawn import spawn

from octavo.distributed import CPU, join, leave

RANKS = 2


def exchange(rank: int, directory: str) -> None:
    """One process's part. What it got is written to a file, for the test to read."""
    entered: list[int] = []
    try:
        first, second = (partial(FileStore, f"{directory}/{name}", RANKS) for name in ("first", "second"))
        tp = join(rank, RANKS, first, "first", CPU, entering=lambda: entered.append(1))
        given = torch.tensor([[1.0 + rank, -2.0 * rank, 3.0]])
        found = {
            "sum": tp.all_reduce(given.clone()), "max": tp.max_reduce(given.clone()), "columns": tp.all_gather(given),
            "rows": tp.all_gather(given, 0), "strided": tp.all_gather(given.expand(2, 3).mT, 0),
        }  # fmt: skip
        assert len(entered) == len(found), "of those that wait, the one that has entered fewer is waited for"
        again = join(rank, RANKS, first, "first", CPU)  # as an engine after another in this process does
        found["again"] = again.all_gather(given)
        other = join(1 - rank, RANKS, second, "second", CPU)
        found["other"] = other.all_gather(given)
        torch.save(found, f"{directory}/{rank}.pt")
    finally:
        leave()
    assert not torch.distributed.is_initialized()


def test_a_group_of_processes(tmp_path: Path) -> None:
    spawn(exchange, (str(tmp_path),), nprocs=RANKS)
    first, second = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[2.0, -2.0, 3.0]])
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["sum"], first + second)
        assert torch.equal(found["max"], torch.maximum(first, second))
        assert torch.equal(found["columns"], torch.cat([first, second], 1))
        assert torch.equal(found["again"], torch.cat([first, second], 1))
        assert torch.equal(found["other"], torch.cat([second, first], 1))
        assert torch.equal(found["rows"], torch.cat([first, second]))
        assert torch.equal(found["strided"], torch.cat([first.expand(2, 3).mT, second.expand(2, 3).mT]))
