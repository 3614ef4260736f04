"""Every endpoint over the fake engine: shapes, streams, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from cases import cases
from server.api_client import Client

from octavo.demo import MODEL_DIR
from octavo.frontend import requests
from octavo.frontend.requests import check_request
from octavo.server.app import make_app
from octavo.server.error_responses import ApiError, error_response

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
ALL = (COMPLETIONS, CHAT, "/v1/responses", "/v1/messages")


def any_body(path: str) -> dict[str, Any]:
    """A body that the path takes."""
    if path == "/v1/responses":
        return {"input": "a"}
    return {"prompt": "a", "messages": [USER], "max_tokens": 9, "tokens": [5]}


def test_completion_has_openais_shape(client: Client) -> None:
    answer = client.complete(max_tokens=6)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "demo"
    choice = {"index": 0, "text": " hello world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert answer["choices"] == [choice]
    details = {"cached_tokens": 3}
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 6,
        "total_tokens": 8,
        "prompt_tokens_details": details,
    }


@cases(("prompt", "choices"), [("a", 1), (["a", "b"], 2), ([5, 6], 1), ([[5, 6], [7]], 2), (["a", [5]], 2)], ids=str)
def test_prompt_forms(make_client: Callable[..., Client], prompt: Any, choices: int) -> None:
    client = make_client()
    answer = client.complete(prompt=prompt, n=2, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * choices))
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert len(client.engine.calls) == choices


def test_completion_stream_is_one_chunk_a_token(client: Client) -> None:
    events = client.events(COMPLETIONS, stream_options={"include_usage": True})
    *tokens, last = events
    assert len(tokens) == 6
    assert "".join(event["choices"][0]["text"] for event in tokens) == " hello world"
    assert [event["choices"][0]["finish_reason"] for event in tokens] == [None] * 5 + ["stop"]
    assert all(event["usage"] is None for event in tokens)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert all("usage" not in event for event in client.events(COMPLETIONS))


def test_continuous_usage(client: Client) -> None:
    events = client.events(COMPLETIONS, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5, 6, 6]


def test_completion_logprobs_and_echo(client: Client) -> None:
    choice = client.complete(logprobs=2, echo=True, max_tokens=1)["choices"][0]
    assert choice["text"] == "def f h"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == "def f h"
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 3, 5]
    assert logprobs["top_logprobs"][0] is None
    assert -9999.0 in logprobs["top_logprobs"][1].values()  # -inf, which JSON cannot spell


LIBRARY = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))  # the text of tokens, by who wrote them
WRITTEN = " size=-1 é 🌶 naïve"


@pytest.mark.parametrize("asked", [{}, {"stop": ["size=-2", " naïvety"]}, {"echo": True}, {"echo": True, "stop": ["=-1 é 🌶🌶"]}])
def test_text_offsets_are_places_in_the_text(make_client: Any, asked: dict[str, Any]) -> None:
    """Whatever keeps text and tokens apart: a stop string that holds text back, characters of several tokens, an echo."""
    client = make_client(WRITTEN)
    tokenizer = client.engine.tokenizer
    prompt = "def 🌶(" if "echo" in asked else "def f"
    ids, start = (tokenizer.encode(prompt), len(prompt)) if "echo" in asked else ([], 0)
    written = tokenizer.encode(WRITTEN)
    whole = [len(LIBRARY.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]
    whole += [start + len(LIBRARY.decode(written[:i]).rstrip("\ufffd")) for i in range(len(written))]
    choice = client.complete(prompt=prompt, logprobs=0, max_tokens=100, **asked)["choices"][0]
    assert choice["text"] == (prompt if ids else "") + WRITTEN
    assert choice["logprobs"]["text_offset"] == whole
    events = client.events(COMPLETIONS, prompt=prompt, logprobs=0, max_tokens=100, **asked)
    assert [offset for event in events for offset in event["choices"][0]["logprobs"]["text_offset"]] == whole


def test_echo_without_tokens_scores_the_prompt(client: Client) -> None:
    answer = client.complete(logprobs=0, echo=True, max_tokens=0)
    choice = answer["choices"][0]
    assert choice["text"] == "def f"
    assert len(choice["logprobs"]["tokens"]) == 2
    assert answer["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length"


def test_prompt_logprobs(client: Client) -> None:
    choice = client.complete(prompt_logprobs=1)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert {"logprob": -0.5, "rank": 1, "decoded_token": " f"} in choice["prompt_logprobs"][1].values()
    assert "prompt_logprobs" in client.chat(prompt_logprobs=0)


def test_chat_has_openais_shape(client: Client) -> None:
    answer = client.chat(logprobs=True, top_logprobs=1, max_completion_tokens=1, n=2)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert len(answer["choices"]) == 2
    choice = answer["choices"][1]
    assert choice["message"] == {"role": "assistant", "content": " h"}
    assert choice["finish_reason"] == "length"
    token = choice["logprobs"]["content"][0]
    assert (token["token"], token["logprob"], token["bytes"]) == (" h", -0.5, [32, 104])
    assert len(token["top_logprobs"]) == 1


def test_each_choice_of_a_chat_stream_begins_with_its_role(client: Client) -> None:
    first: dict[int, Any] = {}
    for event in client.events(CHAT, n=3):
        for choice in event["choices"]:
            first.setdefault(choice["index"], choice["delta"])
    assert first == {index: {"role": "assistant", "content": ""} for index in range(3)}


def test_chat_stream(client: Client) -> None:
    events = client.events(CHAT, stream_options={"include_usage": True})
    first, *tokens, last = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len(tokens) == 6
    assert "".join(event["choices"][0]["delta"]["content"] for event in tokens) == " hello world"
    assert tokens[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 16


def test_chat_renders_the_template(client: Client) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    client.chat(messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}])
    prompt, params, _ = client.engine.calls[-1]
    decoded = client.engine.tokenizer.decode(prompt, skip_special_tokens=False)
    assert decoded == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert params.max_tokens is None  # as many as the context holds


def test_chat_continues_the_last_message(client: Client) -> None:
    client.chat(messages=[USER, {"role": "assistant", "content": "I say"}], continue_final_message=True)
    decoded = client.engine.tokenizer.decode(client.engine.calls[-1][0], skip_special_tokens=False)
    assert decoded.endswith("<|im_start|>assistant\nI say")


def test_sampling_values_come_from_the_request_then_the_model(client: Client) -> None:
    recommended = client.engine.tokenizer.default_sampling
    client.complete(temperature=0.1, top_k=None, ignore_eos=True, logit_bias={"7": 2}, stop="x", seed=None)
    params = client.engine.calls[-1][1]
    assert params.temperature == 0.1
    assert params.top_k == recommended["top_k"]
    assert params.ignore_eos
    assert params.logit_bias == {7: 2.0}
    assert params.stop == ("x",)
    assert params.max_tokens == 16


def test_the_model_s_max_new_tokens_is_the_default(client: Client) -> None:
    recommended = client.engine.tokenizer.default_sampling
    for limit, chat, completion in ((7, 7, 7), (100_000, 1014, 16)):
        recommended["max_tokens"] = limit
        client.chat()
        client.complete()
        client.chat(max_tokens=3)
        assert [params.max_tokens for _, params, _ in client.engine.calls[-3:]] == [chat, completion, 3]


def test_what_vllm_bench_sends_is_taken(client: Client) -> None:
    client.complete(
        model="demo", temperature=0.0, repetition_penalty=1.0, max_tokens=128, logprobs=None, ignore_eos=True, best_of=None
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_checked_once_and_first(client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    checked: list[list[int]] = []

    def check(info: Any, tokenizer: Any, prompt: list[int], params: Any) -> str | None:
        checked.append(prompt)
        return check_request(info, tokenizer, prompt, params)

    monkeypatch.setattr(requests, "check_request", check)
    for path, body in ((COMPLETIONS, {"prompt": [[5, 6], [7]]}), (CHAT, {"messages": [USER]})):
        assert client.post(path, {**body, "n": 2, "stream": stream}).status_code == 200
    assert checked == [prompt for prompt, _, _ in client.engine.calls]
    assert len(checked) == 3
    running = len(client.engine.calls)
    assert client.post(COMPLETIONS, {"prompt": [[5, 6], [4096]], "stream": stream}).status_code == 400
    assert [prompt for prompt, _, _ in client.engine.calls[running:]] == [[5, 6]]
    assert not client.engine.aborted  # the first prompt never ran


CONTENT = "messages.0.content should be a string or a list of parts like {'type': 'text', 'text': ...}"


@cases(
    ("body", "param", "sentence"),
    [
        ({"stop": 5}, "stop", "stop should be a string, or a list, not 5."),
        ({"stop": ["a", 1]}, "stop.1", "stop.1 should be a string, not 1."),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias has a key that should be a whole number, not 'x'."),
        ({"guided_json": 5}, "guided_json", "guided_json should be an object, or a string, or true or false, not 5."),
        ({"stream": [1]}, "stream", "stream should be true or false, not [1]."),
        ({"cache_salt": ""}, "cache_salt", "cache_salt should be a string of 1 or more characters, not ''."),
        ({"stream_options": "yes"}, "stream_options", "stream_options should be an object, not 'yes'."),
        ({"tool_choice": "any"}, "tool_choice", "tool_choice should be 'none', 'auto' or 'required', or an object, not 'any'."),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "tool_choice.function is missing."),
        ({"messages": None}, "messages", "messages is missing."),
        ({"messages": []}, "messages", "messages should have 1 or more entries."),
        *(
            ({"messages": [{"role": "user", "content": content}]}, "messages.0.content", f"{CONTENT}{told}.")
            for content, told in (
                (3, ", not a number"),
                (True, ", not true or false"),
                ({"type": "text"}, ", not an object"),
                ([1, 2], ", and its part 0 is a number"),
                (["a", None], ", and its part 1 is null"),
                ([{"type": "text", "text": 5}], ", and its part 0 is a text without a text"),
                ([{}], ", and its part 0 is an object without such a type"),
            )
        ),
        (
            {"guided_json": {"$ref": "#"}},
            "guided_json",
            "guided_json cannot be followed: its reference '#' leads back to itself alone; put it into a property or items.",
        ),
    ],
    ids=str,
)
def test_wrong_types_are_told_in_words_of_the_api(client: Client, body: dict[str, Any], param: str, sentence: str) -> None:
    """And not in those of pydantic, which names its validators, too."""
    error = client.post(CHAT, {"messages": [USER], **body}).json()["error"]
    assert (error["message"], error["param"]) == (sentence, param)


BAD = [
    (COMPLETIONS, {"prompt": 3}, 400, "prompt"),
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [4096]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [10**30]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "\ud800"}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [5] * 5000}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 1024}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "n": 100000}, 400, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, 400, "best_of"),
    (COMPLETIONS, {"prompt": "a", "use_beam_search": True}, 400, "use_beam_search"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": []}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5000": 1}}, 400, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "stop": [""]}, 400, "stop"),
    (COMPLETIONS, {"prompt": "a", "stream": "perhaps"}, 400, "stream"),
    (COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, 404, "model"),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "a("}, 400, "guided_regex"),
    (COMPLETIONS, {"prompt": "a", "guided_choice": []}, 400, "guided_choice"),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "a", "guided_json": {}}, 400, "guided_regex"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "xml"}}, 400, "response_format.type"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "json_schema"}}, 400, "response_format"),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": [{"content": "hi"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    (CHAT, {"messages": [USER], "top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 30}, 400, "logprobs"),
    (CHAT, {"messages": [USER], "chat_template": "{{ 1 }}"}, 400, "chat_template"),
    (CHAT, {"messages": [USER], "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"messages": [USER], "tools": [{"type": "function"}]}, 400, "tools.0.function"),
    (CHAT, {"messages": [USER], "max_completion_tokens": 5000}, 400, "max_tokens"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"messages": []}, 400, "messages"),
    ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
    ("/detokenize", {}, 400, "tokens"),
    ("/v1/nothing", {}, 404, None),
    ("/version", {}, 405, None),
]


@cases(("path", "body", "status", "param"), BAD, ids=str)
def test_bad_requests_get_one_sentence(client: Client, path: str, body: Any, status: int, param: str | None) -> None:
    for more in ({}, {"stream": True}) if path.startswith("/v1/c") and "stream" not in body else ({},):
        response = client.request("POST", path, content=json.dumps({**body, **more}))
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert error["message"].endswith((".", "}."))
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400
    assert client.complete()["choices"]  # the server lives on


@cases("body", [b"", b"nonsense", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b"1" * 10_000])
def test_nonsense_json(client: Client, body: bytes) -> None:
    response = client.request("POST", COMPLETIONS, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("The body ")


HALF = "\ud800\n\x1b[31m"


@cases(
    ("path", "body"),
    [
        *((path, {"model": HALF, "prompt": "a", "messages": [USER]}) for path in (COMPLETIONS, CHAT, "/tokenize")),
        ("/detokenize", {"model": HALF, "tokens": [5]}),
        (COMPLETIONS, {"prompt": "a", "stop": [HALF]}),
        (COMPLETIONS, {"prompt": "a", HALF: 1}),
        (COMPLETIONS, {"prompt": "a", "guided_regex": HALF}),
        (CHAT, {"messages": [{"role": HALF, "content": "a"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": f"image_{HALF}"}]}]}),
        (
            CHAT,
            {
                "messages": [USER],
                "tools": [{"function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": HALF}},
            },
        ),
        (CHAT, {"messages": [USER], "chat_template_kwargs": {"x": [HALF]}}),
    ],
    ids=str,
)
def test_half_a_surrogate_pair_is_refused(
    client: Client, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    for content in (json.dumps(body).encode(), json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")):
        response = client.request("POST", path, content=content)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"].startswith("The body ")
    assert not caplog.records
    pair = client.request("POST", COMPLETIONS, content=b'{"prompt": "\\ud83d\\ude00", "echo": true, "max_tokens": 1}')
    assert pair.json()["choices"][0]["text"].startswith("\N{GRINNING FACE}")


def test_the_log_holds_no_raw_text_of_a_client(
    client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        try:
            raise KeyError("first\n\x1b[31m")
        except KeyError as error:
            raise ValueError(f"cannot read {HALF} caf\xe9") from error

    monkeypatch.setattr(client.engine, "generate", fail)
    response = client.post(COMPLETIONS, {"prompt": "a"})
    assert response.status_code == 500
    (record,) = caplog.records
    told = record.getMessage()
    assert record.exc_info is None
    assert "in fail\n" in told
    assert told.splitlines()[-1] == r"ValueError: cannot read \ud800\n\x1b[31m caf\xe9"
    assert "\x1b" not in told


def test_an_error_that_repeats_what_cannot_be_encoded_is_still_told() -> None:
    response = error_response(ApiError(404, "The model '\ud800' is not served."))
    assert json.loads(response.body)["error"]["message"] == "The model '?' is not served."


def test_unknown_fields_and_nulls_are_ignored(client: Client) -> None:
    client.complete(nothing_known=1, n=None, stop=None, stream=None, stream_options=None, logprobs=None, user=None, echo=None)
    client.chat(store=True, tools=None, tool_choice=None, response_format=None, metadata={}, parallel_tool_calls=None)


def test_a_large_body_is_413(client: Client) -> None:
    assert client.request("POST", COMPLETIONS, content=b" " * (client.served.gate.body_bytes + 1)).status_code == 413
    assert client.request("POST", COMPLETIONS, content=b"{}", headers={"content-length": "9" * 30}).status_code == 413


def test_template_switches_cannot_replace_its_arguments(client: Client) -> None:
    client.chat(chat_template_kwargs={"messages": [], "template": "x", "self": 1, "tools": 3, "enable_thinking": False})


def test_models(client: Client) -> None:
    answer = client.get("/v1/models").json()
    assert [card["id"] for card in answer["data"]] == ["demo", "other"]
    assert answer["data"][0]["max_model_len"] == 1024
    assert client.get("/v1/models/other").json()["id"] == "other"
    assert client.get("/v1/models/a/b").status_code == 404
    assert client.complete(model="other")["model"] == "other"


def test_tokenize_and_back(client: Client) -> None:
    answer = client.post("/tokenize", {"prompt": "def f", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 2
    assert answer["max_model_len"] == 1024
    assert client.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "def f"}
    assert client.post("/tokenize", {"messages": [USER]}).json()["count"] == 10


def test_health_follows_the_engine(client: Client) -> None:
    assert client.get("/health").status_code == client.get("/ping").status_code == 200
    client.engine.healthy = False
    assert client.get("/health").status_code == client.get("/ping").status_code == 503
    response = client.post(COMPLETIONS, {"prompt": "a"})
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"


def test_health_sees_an_engine_that_stands_still(client: Client) -> None:
    client.served.engine_timeout = 30.0
    client.engine.silent_seconds = 29.0
    assert client.get("/health").status_code == 200
    client.engine.silent_seconds = 31.0
    response = client.get("/health")
    assert response.status_code == client.get("/ping").status_code == 503
    assert response.json()["error"] == {
        "message": "The engine has had work for 31 s and made no step.",
        "type": "server_error",
        "param": None,
        "code": "engine_stalled",
    }
    client.served.engine_timeout = 0.0
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_engine_that_dies_ends_the_stream_with_an_error(client: Client, path: str) -> None:
    client.engine.fail_after = 2
    events = client.events(path)
    assert events[-1]["error"]["message"] == "The engine died."
    client.engine.fail_after = 0
    response = client.post(path, {"prompt": "a", "messages": [USER], "stream": True})
    assert response.status_code == 503  # nothing was sent yet, so the status can tell


def test_api_key(client: Client) -> None:
    client.api_keys = ["secret", "other"]
    assert client.get("/health").status_code == 200
    wrong = ("Bearer wrong", "secret", "Bearer s\xe9cret", "Bearer secre", "Bearer ", "Bearer secrets", "Basic secret")
    for headers in ({}, *({"Authorization": one} for one in wrong)):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        response = client.get("/v1/models", headers=encoded)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for key in client.api_keys:
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_a_key_beyond_ascii(client: Client) -> None:
    client.api_keys = ["clé"]
    for sent, status in (("clé".encode(), 200), (b"cle", 401), (b"cl\xe9", 401)):
        assert client.get("/v1/models", headers={"Authorization": b"Bearer " + sent}).status_code == status


@pytest.mark.parametrize("path", [*ALL, "/invocations", "/v1/messages/count_tokens", "/tokenize", "/detokenize"])
def test_bodies_that_a_page_may_send_unasked_are_refused(client: Client, path: str) -> None:
    body = json.dumps(any_body(path) if path != "/tokenize" else {"prompt": "a"})
    form = "application/x-www-form-urlencoded"
    for kind, more, status in [
        ("application/json", {}, 200),
        ("Application/JSON; charset=utf-8", {"Origin": "http://page"}, 200),
        ("application/problem+json", {}, 200),
        (None, {}, 200),
        (form, {}, 200),  # what curl -d and urllib say when they are told nothing
        ("text/plain", {}, 415),
        ("text/plain;charset=UTF-8", {"Origin": "null"}, 415),
        ("multipart/form-data; boundary=x", {}, 415),
        ("application/octet-stream", {}, 415),
        (form, {"Origin": "http://page"}, 415),
        (form, {"Sec-Fetch-Site": "cross-site"}, 415),
        (None, {"Origin": "http://page"}, 415),
    ]:
        headers = {**more, **({"Content-Type": kind} if kind else {})}
        response = client.request("POST", path, content=body, headers=headers)
        assert response.status_code == status, (kind, more, response.text)
        if status == 415:
            said = (kind or "of no type").partition(";")[0]
            assert response.json()["error"]["message"] == (
                f"The body should be JSON, not {said}; send Content-Type: application/json."
            )


def test_request_ids(client: Client) -> None:
    response = client.post(COMPLETIONS, {"prompt": "a"}, headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    assert client.get("/v1/nothing").headers["x-request-id"]
    client.post(COMPLETIONS, {"prompt": "a"}, headers={"X-Request-Id": "mine-1"})
    assert len({call[2] for call in client.engine.calls}) == 2  # the engine needs ids that differ


def test_a_closing_server_refuses(client: Client) -> None:
    client.served.gate.closing = True
    assert client.post(COMPLETIONS, {"prompt": "a"}).status_code == 503
    assert client.get("/health").status_code == 503


def test_metrics(client: Client) -> None:
    client.complete()
    client.complete(n=3, max_tokens=2)
    page = client.get("/metrics").text
    labels = 'engine="0",model_name="demo"'
    for line in (
        f"vllm:num_requests_running{{{labels}}} 1.0",
        f"vllm:num_requests_waiting{{{labels}}} 0.0",
        f"vllm:kv_cache_usage_perc{{{labels}}} 0.5",
        f"vllm:prompt_tokens_total{{{labels}}} 4.0",
        f"vllm:generation_tokens_total{{{labels}}} 12.0",
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="demo"} 1.0',
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="demo"} 3.0',
        f"vllm:inter_token_latency_seconds_count{{{labels}}} 8.0",
        f"vllm:prefix_cache_queries_total{{{labels}}} 4.0",
        f"vllm:prefix_cache_hits_total{{{labels}}} 0.0",
        f"vllm:num_preemptions_total{{{labels}}} 0.0",
    ):
        assert line in page
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "iteration_tokens_total",
    ):
        assert f"vllm:{name}_count{{{labels}}} 2.0" in page
    assert "_created" not in page


def test_a_client_that_leaves_is_aborted(client: Client) -> None:
    client.engine.delay = 0.01
    for path in (*ALL, "/invocations"):
        for stream in (True, False):
            asyncio.run(_leave(client, path, stream))
    assert len(client.engine.aborted) == 10
    assert client.served.gate.running == 0
    assert 'finished_reason="abort",model_name="demo"} 10.0' in client.get("/metrics").text


async def _leave(client: Client, path: str, stream: bool) -> None:
    body = json.dumps({**any_body(path), "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while len(client.engine.calls) == asked:  # a chat's template may need a process that starts first
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.025)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None: ...

    asked = len(client.engine.calls)
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
    await asyncio.wait_for(make_app(client.served)(scope, receive, send), 15)


def test_cors(client: Client) -> None:
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert client.request("OPTIONS", COMPLETIONS, headers=headers).headers["access-control-allow-origin"] == "*"
