"""TLS, a Unix socket, a root path, cross-origin calls, and what of them is refused before a model is loaded."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cases import cases
from server.api_client import Client
from server.processes import Server

from octavo.cli import main, make_parser
from octavo.demo import MODEL_DIR
from octavo.server import serve
from octavo.server.app import make_app
from octavo.server.serve_arguments import cross_origin

TLS = Path(__file__).parents[1] / "data" / "tls"
CERT, KEY = str(TLS / "cert.pem"), str(TLS / "key.pem")
ANSWER = {"prompt": "def f", "max_tokens": 3}


@pytest.fixture(scope="module")
def tls_server() -> Iterator[Server]:
    flags = ["--ssl-certfile", CERT, "--ssl-keyfile", KEY, "--ssl-ca-certs", CERT, "--ssl-cert-reqs", "2"]
    server = Server(*flags, "--root-path", "/llm/", "--api-key", "K", fake=True)
    yield server
    server.stop()


def trusting(*, with_certificate: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=CERT)
    if with_certificate:
        context.load_cert_chain(CERT, KEY)
    return context


def test_https_behind_a_root_path_for_clients_with_a_certificate(tls_server: Server) -> None:
    url = tls_server.url.replace("http:", "https:")
    with httpx.Client(verify=trusting(with_certificate=True)) as client:
        for path in ("/health", "/llm/health"):
            assert client.get(url + path).status_code == 200
        for path in ("/v1/models", "/llm/v1/models", "/llm/llm/health", "/llmhealth"):
            assert client.get(url + path).status_code == 401
        for path in ("/v1/completions", "/llm/v1/completions"):
            answer = client.post(url + path, json=ANSWER, headers={"Authorization": "Bearer K"})
            assert answer.json()["usage"]["completion_tokens"] == 3
    with httpx.Client(verify=trusting(with_certificate=False)) as client, pytest.raises(httpx.TransportError):
        client.get(url + "/health")
    assert any(f"Octavo is ready on https://127.0.0.1:{tls_server.port}" in line for line in tls_server.log)


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as left:  # as a server that was killed leaves it
        left.bind(path)
    (tmp_path / "c.yaml").write_text(f"uds: {path}\nserved-model-name: named\noverride-generation-config: {{top_k: 1}}\n")
    server = Server("--config", str(tmp_path / "c.yaml"), fake=True)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://unix") as client:
            answer = client.post("/v1/completions", json=ANSWER).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert any(f"Octavo is ready on unix:{path}" in line for line in server.log)
        assert main(["serve", str(MODEL_DIR), "--uds", path]) == 1  # in use
        server.signal(signal.SIGTERM)
        assert server.end() == 0
        assert not os.path.exists(path)
    finally:
        server.stop()


@cases(
    ("flags", "sentence"),
    [
        ("--ssl-keyfile {key}", "--ssl-keyfile needs --ssl-certfile, the server's certificate; give both, or neither."),
        ("--ssl-certfile /nowhere", "--ssl-certfile /nowhere is no file; give a file in PEM format."),
        ("--ssl-certfile {cert}", "; give its key with --ssl-keyfile."),
        ("--ssl-certfile {cert} --ssl-keyfile {other}", "cannot be used with the key in {other} (KEY_VALUES_MISMATCH)."),
        ("--ssl-certfile {cert} --ssl-keyfile {locked}", "--ssl-keyfile {locked} is encrypted; give a key without a password."),
        ("--ssl-certfile {cert} --ssl-keyfile {key} --ssl-ciphers X", "--ssl-ciphers X cannot be used ("),
        ("--ssl-certfile {cert} --ssl-keyfile {key} --ssl-ca-certs {key}", "--ssl-ca-certs {key} cannot be used ("),
        ("--ssl-certfile {cert} --ssl-keyfile {key} --ssl-cert-reqs 2", "give --ssl-ca-certs too, whose they must be."),
        ("--uds /nowhere/socket", "Cannot listen on --uds /nowhere/socket: No such file or directory."),
        ("--uds {key}", "--uds {key} exists and is in use, or no socket; give another path."),
        ("--allowed-origins [x", "--allowed-origins [x is not a valid JSON list ("),
        ("--allowed-headers [1]", "--allowed-headers [1] must list strings."),
    ],
)
def test_what_cannot_be_used_is_said_before_loading(flags: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"cert": CERT, "key": KEY, "other": TLS / "other_key.pem", "locked": TLS / "encrypted_key.pem"}
    assert main(["serve", "--port", "0", *flags.format(**files).split()]) == 1
    told = capsys.readouterr().err
    assert sentence.format(**files) in told
    assert told.count("\n") == 1


def preflight(client: Client, flags: list[str], origin: str, **headers: str) -> httpx.Response:
    args = make_parser("serve", serve.add_arguments).parse_args(flags)
    transport = httpx.ASGITransport(make_app(client.served, (), cross_origin(args)))
    sent = {"Origin": origin, "Access-Control-Request-Method": "POST", **headers}

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.options("/v1/completions", headers=sent)

    return asyncio.run(ask())


@cases("spelling", [json.dumps, lambda origins: " ".join(origins)], ids=["json", "words"])
def test_origins_methods_and_headers(spelling: Callable[[list[str]], str], client: Client) -> None:
    def flag(name: str, *values: str) -> list[str]:
        text = spelling(list(values))
        return [f"--allowed-{name}", *([text] if text.startswith("[") else text.split())]

    def allowed(answer: httpx.Response) -> str | None:
        return answer.headers.get("access-control-allow-origin") if answer.status_code == 200 else None

    assert allowed(preflight(client, flag("origins", "*"), "http://a")) == "*"
    two = flag("origins", "http://a", "http://b")
    assert allowed(preflight(client, two, "http://b")) == "http://b"
    assert allowed(preflight(client, two, "http://c")) is None
    assert allowed(preflight(client, flag("methods", "GET"), "http://a")) is None
    asks = {"Access-Control-Request-Headers": "x-own"}
    assert allowed(preflight(client, flag("headers", "x-other"), "http://a", **asks)) is None
    assert allowed(preflight(client, flag("headers", "x-own"), "http://a", **asks)) == "*"
    credentials = preflight(client, [*two, "--allow-credentials"], "http://a").headers
    assert credentials["access-control-allow-credentials"] == "true"


def test_default_variables_of_the_chat_template(make_client: Callable[..., Client]) -> None:
    client = make_client(template="{{ enable_thinking }} {{ style }}")
    client.served.template_kwargs = {"enable_thinking": False, "style": "x"}

    def prompt(**body: Any) -> str:
        client.chat(**body)
        return client.engine.tokenizer.decode(client.engine.calls[-1][0])

    assert prompt() == "False x"
    assert prompt(chat_template_kwargs={"style": "y"}) == "False y"
    assert prompt(reasoning_effort="high") == "True x"


def test_log_probabilities_up_to_the_limit(make_client: Callable[..., Client]) -> None:
    client = make_client()
    client.engine.info = client.engine.info.__class__(**{**vars(client.engine.info), "max_logprobs": 30})
    assert len(client.chat(logprobs=True, top_logprobs=30)["choices"]) == 1
    for path, name, body in (
        ("/v1/completions", "logprobs", {"prompt": "a", "logprobs": 31}),
        (
            "/v1/chat/completions",
            "logprobs",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 31},
        ),
    ):
        answer = client.post(path, body)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"{name} must be between 0 and 30, not 31.")
