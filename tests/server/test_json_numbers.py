"""JSON spells neither NaN nor infinity, and neither does an answer."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import pytest
from cases import cases
from server.api_client import Client

from octavo.messages import Logprob
from octavo.server.events import _dump

PATHS = {
    "/v1/completions": {"prompt": "def f", "logprobs": 2, "prompt_logprobs": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 2,
    },
}  # fmt: skip


def strict(text: str) -> Any:
    """JSON as a client in any language reads it: Python's reader alone takes NaN."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is no JSON: {text}")

    return json.loads(text, parse_constant=refuse)


def numbers(value: Any, key: str = "") -> list[float]:
    """Every logprob in an answer."""
    if isinstance(value, dict):
        return [n for k, v in value.items() for n in numbers(v, k)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v, key)]
    return [value] if isinstance(value, float) else []


@cases("stream", [False, True], ids=["whole", "stream"])
@cases("path", PATHS)
@cases("value", [float("-inf"), float("nan")], ids=str)
def test_logprobs_of_tokens_that_cannot_come(
    value: float, path: str, stream: bool, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the chosen token too, which is such a one where what may come is among the tokens that the model rules out."""
    found = tuple(Logprob(5 + rank, value, rank) for rank in range(3))
    monkeypatch.setattr(client.engine, "_logprobs", lambda *_: found)
    response = client.post(path, {**PATHS[path], "stream": stream})
    assert response.status_code == 200, response.text
    if stream:
        bodies = [block.removeprefix("data: ") for block in response.text.strip().split("\n\n")]
        assert bodies.pop() == "[DONE]"
    else:
        bodies = [response.text]
    assert all("error" not in strict(body) for body in bodies)
    assert {n for body in bodies for n in numbers(strict(body))} == {-9999.0}


def test_an_event_is_json_or_an_error() -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            _dump({"choices": [{"logprob": value}]})
