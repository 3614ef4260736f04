"""Operators' endpoints: who may call them, what they say of themselves, and a real server that is reloaded under load."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cases import cases
from conftest import COMMON, tokens
from frontend.test_operations import ask, of
from frontend.test_operations import operate as over_engines
from safetensors.torch import load_file, save_file
from server.api_client import Client, ok
from server.processes import Server
from starlette.routing import Route
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.operations import Operations
from octavo.frontend.router import Engine
from octavo.server.admin import Allowed
from octavo.server.app import make_app
from octavo.server.http import JsonEndpoint
from octavo.server.openapi import describing_routes, openapi
from octavo.server.protocol import ApiModel
from octavo.server.serve import add_arguments, make_served, operate
from octavo.server.side_processes import side_processes

PATHS = {
    "/sleep": "POST", "/wake_up": "POST", "/is_sleeping": "GET", "/pause": "POST", "/resume": "POST", "/is_paused": "GET",
    "/reset_prefix_cache": "POST", "/server_info": "GET", "/update_weights_from_disk": "POST", "/collective_rpc": "POST",
}  # fmt: skip
SLEEP = {"/sleep", "/wake_up", "/is_sleeping"}
PROMPTS = [tokens(20, 1), tokens(9, 2), tokens(3, 3)]
LENGTH = 150


def test_they_are_closed_by_default(client: Client) -> None:
    for path, method in PATHS.items():
        response = client.request(method, path, json={})
        sentence = response.json()["error"]["message"]
        assert (response.status_code, "--enable-admin-endpoints" in sentence) == (404, True), path
        assert ("--enable-sleep-mode" in sentence) == (path in SLEEP), path


@cases("allowed", [Allowed(), Allowed(sleep=True), Allowed(admin=True)])
def test_what_is_open_is_described(client: Client, allowed: Allowed) -> None:
    described = described_by(client, allowed)["paths"]
    wanted = set(PATHS) if allowed.admin else SLEEP if allowed.sleep else set()
    assert described.keys() & PATHS.keys() == wanted
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models/{name}", "/tokenize", "/load"} <= described.keys()


def described_by(client: Client, allowed: Allowed) -> dict[str, Any]:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(client.served, allowed=allowed))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as sent:
            return await sent.get("/openapi.json")

    return ok(asyncio.run(send()))


def test_every_reference_of_the_description_leads_somewhere(client: Client) -> None:
    """And bodies are those of the models that read them."""
    described = described_by(client, Allowed(admin=True))
    text = json.dumps(described)
    names = described["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= names.keys()
    assert described["openapi"].startswith("3.1")
    identities = [one["operationId"] for methods in described["paths"].values() for one in methods.values()]
    assert len(set(identities)) == len(identities)
    chat = described["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert names[schema]["required"] == ["messages"]
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    assert described["paths"]["/wake_up"]["post"]["parameters"][0]["name"] == "tags"


def test_a_route_that_is_added_is_described() -> None:
    class Added(ApiModel):
        """Something new."""

        some_field: int

    async def handle(request: Added, request_id: str) -> dict[str, Any]:
        return {}

    routes = [Route("/added/{of}", JsonEndpoint(Added, handle, side_processes()), methods=["POST"])]
    found = openapi(routes)["paths"]["/added/{of}"]["post"]
    assert found["summary"] == "Something new."
    assert found["parameters"][0]["in"] == "path"
    assert [route.path for route in describing_routes(routes)] == ["/openapi.json", "/docs"]


def test_the_page_has_no_script(client: Client) -> None:
    client.api_keys.append("secret")
    page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    assert re.findall(r"https?://", page.text) == []
    assert "max_completion_tokens" in page.text
    assert client.get("/openapi.json").json()["info"]["title"] == "Octavo"


def test_tokenizer_info(client: Client) -> None:
    found = ok(client.get("/tokenizer_info"))
    assert (found["eos_token"], found["tokenizer_class"]) == ("<|endoftext|>", "PreTrainedTokenizerFast")
    assert "messages" in found["chat_template"]
    client.served.chat_template = "{{ other }}"
    assert ok(client.get("/tokenizer_info"))["chat_template"] == "{{ other }}"
    client.engine.tokenizer = None  # type: ignore[assignment]
    assert client.get("/tokenizer_info").status_code == 400


@cases(
    ("given", "variable", "expected"),
    [
        ([], None, Allowed()),
        ([], "0", Allowed()),
        ([], "1", Allowed(admin=True)),
        (["--enable-sleep-mode"], None, Allowed(sleep=True)),
        (["--enable-admin-endpoints"], None, Allowed(admin=True)),
    ],
)
def test_what_opens_them(
    given: list[str], variable: str | None, expected: Allowed, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags, or vLLM's variable."""

    async def opened(*flags: str) -> Allowed:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        allowed, writing = operate(parser.parse_args(flags), EngineConfig(), client.served)
        assert (writing is None) == ("--disable-log-stats" in flags)
        assert (client.served.log_request is not None) == ("--enable-log-requests" in flags)
        if writing is not None:
            writing.cancel()
        return allowed

    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", variable)
    for more in ((), ("--disable-log-stats", "--disable-log-requests"), ("--enable-log-requests",)):
        client.served.log_request = None
        assert asyncio.run(opened(*given, *more)) == expected


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of the same shapes, and one whose last layer is damaged."""
    root, paths = tmp_path_factory.mktemp("checkpoints"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**COMMON))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.ndim == 2 else 1)
        paths.append(root / str(seed))
        model.save_pretrained(paths[-1])
    paths.append(shutil.copytree(paths[1], root / "damaged"))
    weights = load_file(paths[2] / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, paths[2] / "model.safetensors")
    return paths


@pytest.fixture(scope="module")
def server(checkpoints: list[Path]) -> Iterator[Server]:
    flags = "--dtype float32 --threads 1 --cpu-kv-cache-gib 0.05 --served-model-name m --enable-admin-endpoints"
    server = Server("--model", str(checkpoints[0]), *flags.split(), "--enable-log-requests", "--uvicorn-log-level", "info")
    yield server
    server.stop()


def post(server: Server, path: str, body: Any = None, **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def reload(server: Server, path: Path, **more: Any) -> httpx.Response:
    return post(server, "/update_weights_from_disk", {"model_path": str(path), **more})


def generate(server: Server, prompt: list[int], length: int = LENGTH) -> list[int]:
    """The tokens of a stream."""
    body = {"model": "m", "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": True}
    found: list[int] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                found += event["choices"][0].get("token_ids") or []
    assert len(found) == length
    return found


@pytest.fixture(scope="module")
def expected(checkpoints: list[Path]) -> list[list[list[int]]]:
    """What each of the two models says to each prompt."""
    params = SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True)
    found = []
    for path in checkpoints[:2]:
        llm = LLM(path, dtype="float32", threads=1, device="cpu", cpu_kv_cache_gib=0.05)
        found.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)])
    return found


def test_under_load_every_answer_is_of_one_model(
    server: Server, checkpoints: list[Path], expected: list[list[list[int]]]
) -> None:
    """Streams of three clients, while weights come and go, and damaged ones are refused."""
    ends, wrong, seen = threading.Event(), [], [0, 0]

    def client(number: int) -> None:
        while not ends.is_set():
            found = generate(server, PROMPTS[number])
            of = [model for model in range(2) if expected[model][number] == found]
            if len(of) != 1:
                wrong.append((number, found))
                return
            seen[of[0]] += 1

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client, number) for number in range(3)]
        try:
            for turn in range(6):
                assert ok(reload(server, checkpoints[(turn + 1) % 2]))["success"] is True
                refused = reload(server, checkpoints[2], abort_all_requests=True)
                assert refused.status_code == 400
                assert "holds NaN" in refused.json()["error"]["message"]
        finally:
            ends.set()
        for each in clients:
            each.result()
    assert not wrong
    assert min(seen) > 2, seen
    ok(reload(server, checkpoints[0]))


def test_reloading_in_vllms_way(server: Server, checkpoints: list[Path], expected: list[list[list[int]]]) -> None:
    """Sleep, weights alone, reload, the cache."""
    assert ok(post(server, "/sleep?level=2")) == {"status": "sleeping", "level": 2}
    assert server.get("/health")[0] == 200
    assert json.loads(server.get("/is_sleeping")[1]) == {"is_sleeping": True}
    refused = post(server, "/v1/completions", {"prompt": [1], "max_tokens": 1})
    assert (refused.status_code, "POST /wake_up" in refused.text) == (503, True)
    assert post(server, "/wake_up?tags=kv_cache").status_code == 400
    assert ok(post(server, "/wake_up?tags=weights")) == {"status": "sleeping", "tags_woken": ["weights"]}
    assert 'sleep_state="discard_all"} 1.0' in server.get("/metrics")[1]
    arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoints[1])}}
    assert ok(post(server, "/collective_rpc", arguments)) == {"results": [None]}
    assert ok(post(server, "/wake_up?tags=kv_cache"))["status"] == "awake"
    assert generate(server, PROMPTS[0]) == expected[1][0]
    assert 'sleep_state="awake"} 1.0' in server.get("/metrics")[1]
    ok(post(server, "/sleep"))
    ok(post(server, "/wake_up"))
    assert generate(server, PROMPTS[1]) == expected[1][1], "the weights that were reloaded last"
    info = json.loads(server.get("/server_info?config_format=json")[1])
    assert info["weights"] == str(checkpoints[1])
    assert info["vllm_config"]["model_config"]["model"] == str(checkpoints[0])
    assert info["vllm_config"]["parallel_config"]["tensor_parallel_size"] == 1
    assert "--dtype float32" in json.loads(server.get("/server_info")[1])["vllm_config"]
    ok(reload(server, checkpoints[0]))


def test_pause_and_the_prefix_cache(server: Server) -> None:
    assert ok(post(server, "/pause?mode=wait"))["status"] == "paused"
    assert json.loads(server.get("/is_paused")[1]) == {"is_paused": True}
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(generate, server, PROMPTS[0], 3)
        assert server.get("/health")[0] == 200
        assert not held.done()
        ok(post(server, "/resume"))
        assert len(held.result(30)) == 3
    ask = {"prompt": [7] * 40, "max_tokens": 1}
    cached = []
    for path in ("", "", "/reset_prefix_cache"):
        if path:
            assert post(server, path).status_code == 200
        answer = ok(post(server, "/v1/completions", ask))
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 32, 0]


@pytest.mark.parametrize(("mode", "asleep"), [("wait", False), ("abort", True)])
def test_a_caller_who_leaves_while_answers_are_awaited_takes_it_back(mode: str, asleep: bool) -> None:
    """And not one that ends answers, whose clients have been told already."""

    async def test(engine: Engine, operations: Operations) -> None:
        served = make_served(engine, ["m"])
        served.operations = operations
        app, sent = make_app(served, allowed=Allowed(admin=True)), iter([{"type": "http.request"}])

        async def receive() -> dict[str, Any]:
            if (message := next(sent, None)) is None:
                await asyncio.sleep(0.2 * (mode == "wait"))
            return message or {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        running = asyncio.create_task(ask(engine, "running"))
        await asyncio.sleep(0.2)
        scope = {"type": "http", "method": "POST", "path": "/sleep", "query_string": f"mode={mode}".encode(), "headers": []}
        await app(scope, receive, send)
        if asleep:
            with pytest.raises(OctavoError, match="sleeps"):
                await running
            while 'sleep_state="weights_offloaded"} 1.0' not in (await served.metrics.text()).decode():
                await asyncio.sleep(0.01)
            assert operations.asleep
        else:
            assert not running.done()
            assert await ask(engine, "after", 3) == of(0, 3)
            assert await running == of(0)
            await asyncio.sleep(0.1)
            assert not operations.asleep

    over_engines(test)


def test_what_they_refuse_is_said_in_a_sentence(server: Server) -> None:
    cases: list[tuple[str, Any, dict[str, str], int, str]] = [
        ("/sleep?level=3", None, {}, 400, "level must be 1 or 2, not '3'."),
        ("/sleep?mode=keep", None, {}, 400, "mode=keep is not served"),
        ("/pause?mode=now", None, {}, 400, "mode must be abort or wait"),
        ("/wake_up?tags=all", None, {}, 400, "tags must be weights or kv_cache, not 'all'."),
        ("/server_info", None, {}, 405, "not with this HTTP method"),
        ("/update_weights_from_disk", {}, {}, 400, "model_path is missing."),
        ("/update_weights_from_disk", {"model_path": "/nowhere"}, {}, 400, "there is no model at '/nowhere'"),
        (
            "/update_weights_from_disk",
            {"model_path": "/x", "load_format": "npcache"},
            {},
            400,
            "load_format should be 'auto' or",
        ),
        ("/update_weights_from_disk", {"model_path": "/x", "flush_cache": False}, {}, 400, "flush_cache should be true, not f"),
        ("/collective_rpc", {"method": "sleep"}, {}, 400, "method should be 'reload_weights', not 'sleep'."),
        ("/collective_rpc", {"method": "reload_weights", "args": [1]}, {}, 400, "args should have at most 0 entries."),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"x": 1}}, {}, 400, "kwargs.x is not known here."),
        ("/collective_rpc", {"method": "reload_weights", "timeout": 0}, {}, 400, "timeout should be over 0, not 0."),
        ("/collective_rpc", {"method": "reload_weights", "timeout": 1e-9}, {}, 504, "loading goes on"),
        ("/sleep", None, {"Origin": "http://page"}, 403, "answers no web page"),
        ("/collective_rpc", {"method": "reload_weights"}, {"Origin": "http://page"}, 403, "answers no web page"),
    ]
    for path, body, headers, status, sentence in cases:
        response = post(server, path, body, **headers)
        assert response.status_code == status, (path, body, response.text)
        assert sentence in response.json()["error"]["message"], (path, body, response.text)
    assert json.loads(server.get("/is_sleeping")[1]) == {"is_sleeping": False}


def test_the_log_has_lines_for_requests_and_for_reloads(server: Server, checkpoints: list[Path]) -> None:
    """Runs last of those over this server."""
    ok(reload(server, checkpoints[0]))
    ok(post(server, "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True}))
    server.wait_for("3 prompt tokens (0 cached), 2 generated, length, ")
    server.wait_for('"POST /v1/completions HTTP/1.1" 200 OK')
    server.wait_for(f"octavo: loaded the weights of {checkpoints[0]} in ")
