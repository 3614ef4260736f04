"""Log-probabilities of a prompt are packed where they cross between processes, and read as they were."""

from __future__ import annotations

import pickle
import random
import time

import pytest

from octavo.messages import Logprob, Logprobs, TokenOutput
from octavo.token_logprobs import PackedLogprobs


def rows(count: int, alternatives: int) -> list[Logprobs | None]:
    draw = random.Random(0)
    return [
        None,
        *(
            tuple(Logprob(draw.randrange(2**17), -draw.expovariate(1), rank) for rank in range(alternatives + 1))
            for _ in range(count - 1)
        ),
    ]


def test_they_are_what_they_were() -> None:
    given = [None, *rows(5, 3)[1:], (Logprob(7, float("-inf"), 131_072),)]
    output = pickle.loads(pickle.dumps(TokenOutput("r", [1], prompt_logprobs=given)))
    found = output.prompt_logprobs
    assert isinstance(found, PackedLogprobs)
    assert [entry and tuple(entry) for entry in found] == given
    assert found == given
    assert found != given[:-1]
    assert (len(found), found[0]) == (6, None)
    assert [tuple(entry or ()) for entry in found[-2:]] == given[-2:]
    with pytest.raises(IndexError):
        found[6]
    entry, expected = found[1], given[1]
    assert entry is not None and expected is not None  # noqa: PT018
    assert (len(entry), entry[0], entry[-1], entry[1:]) == (4, expected[0], expected[-1], expected[1:])
    assert pickle.loads(pickle.dumps(TokenOutput("r", [1]))).prompt_logprobs is None


def test_those_of_a_long_prompt_are_read_at_once() -> None:
    """As objects they took seconds, in which the API process sent no token."""
    data = pickle.dumps(TokenOutput("r", [1], prompt_logprobs=rows(20_000, 20)))
    began = time.process_time()
    output = pickle.loads(data)
    assert time.process_time() - began < 0.1
    assert len(output.prompt_logprobs) == 20_000
