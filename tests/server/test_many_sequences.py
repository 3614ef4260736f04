"""One request for thousands of answers: refused before any work, or begun piece by piece."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import httpx
import pytest
from server.api_client import Client

from octavo.messages import SamplingParams
from octavo.server.app import make_app
from octavo.server.completions import MAX_SEQUENCES
from octavo.text.tokenizer import Tokenizer

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize(("prompts", "n"), [(2000, 128), (33, 128), (MAX_SEQUENCES + 1, None)])
def test_too_many_are_refused_before_anything_is_encoded(
    client: Client, monkeypatch: pytest.MonkeyPatch, prompts: int, n: int | None
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("a prompt was encoded"))
    response = client.post(COMPLETIONS, {"prompt": ["a"] * prompts, "n": n})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        f"The request asks for {prompts * (n or 1)} answers ({prompts} prompts, n = {n or 1}); at most 4096 are given, "
        "so send several requests."
    )
    assert not client.engine.requests


def test_many_are_begun_piece_by_piece(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two turns of the event loop come the sequences of one prompt at most, and they are checked once."""
    checks = 0
    check = SamplingParams.__post_init__

    def counted(params: SamplingParams) -> None:
        nonlocal checks
        checks += 1
        check(params)

    monkeypatch.setattr(SamplingParams, "__post_init__", counted)
    seen = [0]

    async def look() -> None:
        while True:
            seen.append(len(client.engine.requests))
            await asyncio.sleep(0)

    async def main() -> httpx.Response:
        looking = asyncio.ensure_future(look())
        transport = httpx.ASGITransport(make_app(client.served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
            body: dict[str, Any] = {"prompt": [[5]] * 32, "n": 128, "max_tokens": 1}
            response = await http.post(COMPLETIONS, json=body)
        looking.cancel()
        return response

    response = asyncio.run(main())
    assert len(response.json()["choices"]) == 32 * 128
    assert max(b - a for a, b in pairwise(seen)) <= 128
    assert checks <= 1 + 32 * 2
