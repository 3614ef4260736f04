"""Texts that are far too long are refused before they are encoded, and what is encoded lets other streams go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from server.api_client import Client

from octavo.demo import MODEL_DIR
from octavo.text.tokenizer import PIECE, Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOO_LONG = "The prompt has more than 1024 tokens; at most 1023 fit beside one to generate."


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The length of each text that is encoded, and the thread that does it."""
    seen: list[tuple[int, str]] = []
    encode = Tokenizer._encode

    def watched(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        seen.append((len(text), threading.current_thread().name))
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "_encode", watched)
    return seen


def words(count: int) -> str:
    return " ".join(f"w{i}x" for i in range(count))


@pytest.mark.parametrize("make", [lambda text: {"prompt": text}, lambda text: {"prompt": ["a", text]}], ids=["one", "of two"])
def test_of_a_prompt_that_is_far_too_long_a_piece_is_encoded(
    client: Client, encoded: list[tuple[int, str]], make: Callable[[str], object]
) -> None:
    encoded.clear()
    response = client.post(COMPLETIONS, make(words(200_000)))
    assert (response.status_code, response.json()["error"]["message"]) == (400, TOO_LONG)
    assert sum(length for length, _ in encoded) <= PIECE
    assert not client.engine.requests


def test_of_a_chat_that_is_far_too_long_a_piece_is_encoded(client: Client, encoded: list[tuple[int, str]]) -> None:
    encoded.clear()
    response = client.post(CHAT, {"messages": [{"role": "user", "content": words(200_000)}]})
    assert (response.status_code, response.json()["error"]["message"]) == (400, TOO_LONG)
    assert sum(length for length, _ in encoded) <= PIECE


def test_tokenize_and_detokenize_are_bounded_too(client: Client, encoded: list[tuple[int, str]]) -> None:
    encoded.clear()
    response = client.post("/tokenize", {"prompt": words(1_000_000)})
    assert response.json()["error"]["message"] == "The prompt has more than 131072 tokens; at most 131072 are read."
    assert sum(length for length, _ in encoded) < 500_000
    response = client.post("/tokenize", {"prompt": "a" * 3 * 2**17})
    assert response.json()["error"]["message"].endswith(" tokens; at most 131072 are listed.")
    response = client.post("/detokenize", {"tokens": [5] * (2**17 + 1)})
    assert response.json()["error"]["message"] == "tokens has 131073 ids; at most 131072 are read."
    assert client.post("/tokenize", {"prompt": words(1000)}).json()["count"] > 1024, "what does not fit can be counted"


@pytest.mark.parametrize("prompt", [words(500), ["word " * 100] * 20], ids=["one", "many"])
def test_long_texts_are_encoded_in_a_thread(client: Client, encoded: list[tuple[int, str]], prompt: str | list[str]) -> None:
    encoded.clear()
    client.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    names = {name for length, name in encoded if length > len(client.engine.text)}
    assert names
    assert threading.main_thread().name not in names


def test_text_up_to_the_limit_is_never_refused_early() -> None:
    """Blanks are the densest text: many characters a token."""
    tokenizer = Tokenizer(MODEL_DIR)
    for text in (" " * 100_000, words(10_000), "\n" * 70_000, "🙂" * 9_000):
        assert not tokenizer.exceeds(text, len(tokenizer.encode(text)))
    assert tokenizer.exceeds(words(200_000), 1024)
    assert not tokenizer.exceeds("", 1)


def test_encoding_lets_other_threads_run() -> None:
    tokenizer, text = Tokenizer(MODEL_DIR), words(100_000)
    started = time.perf_counter()
    thread = threading.Thread(target=tokenizer.encode, args=(text,))
    longest, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < 0.5 * (time.perf_counter() - started), "the interpreter's lock was held"


def test_the_key_is_asked_for_wherever_work_is_done(client: Client) -> None:
    client.api_keys = ["secret"]
    for path, body in [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]}), (COMPLETIONS, {"prompt": "a"})]:
        assert client.post(path, body).json()["error"]["code"] == "invalid_api_key"
        assert client.post(path, body, headers={"Authorization": "Bearer secret"}).status_code == 200
    for path in ("/health", "/ping", "/version", "/metrics"):
        assert client.get(path).status_code == 200
