"""Large answers are encoded piece by piece, and read as if they had been in one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from cases import cases
from server.api_client import Client

from octavo.server import json_pieces
from octavo.server.json_pieces import SLICE, json_body

CHOICE = {"index": 0, "text": 'é"\n\u2028🙂', "logprobs": {"content": [{"token": "a", "top_logprobs": [{"b": [1]}]}] * 130}}
ANSWERS: list[dict[str, Any]] = [
    {},
    {"choices": []},
    {"a": None, "b": [], "c": {}, "d": [1] * SLICE, "e": [1] * (SLICE + 1), "f": [[]], "g": "choices"},
    {"id": "x", "choices": [CHOICE, {**CHOICE, "logprobs": None}], "usage": {"n": 1, "m": {"k": 1.5}}},
    {"tokens": list(range(1000)), "token_strs": None},
]


@cases("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_it_is_the_same_json(answer: dict[str, Any]) -> None:
    expected = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
    assert asyncio.run(json_body(answer)) == expected


def test_nan_is_still_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        asyncio.run(json_body({"choices": [{"a": [float("nan")]}]}))


def test_no_piece_of_a_large_answer_is_large(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.engine.text = " hello world" * 100
    sizes: list[int] = []
    dump = json_pieces._dump

    def counted(value: Any) -> str:
        text = dump(value)
        sizes.append(len(text))
        return text

    monkeypatch.setattr(json_pieces, "_dump", counted)
    for path, more in (
        ("/v1/completions", {"prompt": "a", "logprobs": 20, "prompt_logprobs": 20}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20}),
    ):
        sizes.clear()
        body = {**more, "n": 16, "max_tokens": 200, "return_token_ids": True}
        assert len(client.post(path, body).json()["choices"]) == 16
        assert max(sizes) < 150_000 < 800_000 < sum(sizes)
