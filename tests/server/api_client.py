"""The HTTP surface over a fake engine, called without a socket."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
from server.fake_engine import FakeEngine

from octavo.server.app import make_app
from octavo.server.serving import Served


@dataclass
class Client:
    """HTTP without a socket."""

    engine: FakeEngine
    served: Served
    api_keys: list[str] = field(default_factory=list)

    def request(self, method: str, path: str, **how: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            app = make_app(self.served, self.api_keys)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **how)

        return asyncio.run(send())

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.request("GET", path, **how)

    def post(self, path: str, body: Any, **how: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **how)

    def complete(self, **body: Any) -> dict[str, Any]:
        return ok(self.post("/v1/completions", {"prompt": "def f", **body}))

    def chat(self, **body: Any) -> dict[str, Any]:
        return ok(self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **body}))

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        start = {"prompt": "def f"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
        response = self.post(path, {**start, "stream": True, **body})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        blocks = response.text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]

    def typed_events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream that names them."""
        response = self.post(path, {**body, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        *blocks, end = response.text.split("\n\n")
        assert end == ""
        found = [json.loads(block.partition("\ndata: ")[2]) for block in blocks]
        assert [block.partition("\n")[0] for block in blocks] == [f"event: {event['type']}" for event in found]
        return found


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
