"""Steps of several ranks that are computed in two halves: the tokens are those of one rank and whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from engine.test_ranks import Answers, answers, asked, checkpoint
from rank_processes import RankProcesses

from octavo import ops
from octavo.engine.place import Place
from octavo.messages import EngineRequest
from octavo.models import dense
from octavo.ops import half

SIZE = 2


class InTurn:
    """In the place of streams: the halves' launches are executed as they are made."""

    def __init__(self) -> None:
        self.entered = list[int]()

    @contextmanager
    def both(self) -> Iterator[None]:
        yield

    @contextmanager
    def half(self, number: int) -> Iterator[None]:
        assert half.current() is None
        with half.launching(number):
            self.entered.append(number)
            yield


def answers_in_halves(place: Place, path: str, wanted: list[EngineRequest]) -> tuple[Answers, list[int]]:
    """As `answers`, every step of several tokens in two halves; and the halves, in the order in which they were launched."""
    halves = InTurn()
    chosen = lambda tokens, *_: halves if tokens > 1 else None, "in turn"
    with patch.dict(ops._COMPOSED, halves=chosen), patch.object(dense, "UNIT", 1):
        return answers(place, path, wanted, {}), halves.entered


def test_they_say_what_whole_steps_of_one_rank_say(tmp_path: Path) -> None:
    """With windows, experts and images too; with prefixes from the cache, prompts in parts and preemption."""
    ranks = RankProcesses(SIZE, tmp_path)
    try:
        for model_type in ("llama", "mistral", "qwen3_moe", "qwen3_vl"):
            path, wanted = checkpoint(model_type, tmp_path / model_type), asked(model_type)
            one = answers(Place(), path, wanted, {})
            for found, entered in ranks.run(answers_in_halves, path, wanted):
                assert not found.differences(one, SIZE), model_type
                assert len(entered) > 500
                assert entered == [0, 1] * (len(entered) // 2)
    finally:
        ranks.close()
