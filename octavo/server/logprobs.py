"""Log-probabilities in the formats of the two endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.messages import Logprob, Logprobs
from octavo.text.tokenizer import Tokenizer

__all__ = ["chat_logprobs", "completion_logprobs", "prompt_logprobs"]

LOWEST = -9999.0  # vLLM's stand-in for -inf; also for NaN, which JSON cannot express


def completion_logprobs(
    tokenizer: Tokenizer | None, entries: Iterable[tuple[int, Logprobs | None]], offsets: Sequence[int]
) -> dict[str, list[Any]]:
    """The completions format, for tokens whose texts start at `offsets`. A prompt's first token has no logprobs."""
    tokens, chosen, top = [], [], []
    for token_id, entry in entries:
        tokens.append(_text(tokenizer, token_id))
        chosen.append(None if entry is None else _value(entry[0]))
        top.append(None if entry is None else {_text(tokenizer, e.token_id): _value(e) for e in entry})
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": list(offsets)}


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[Logprobs], as_ids: bool = False) -> dict[str, Any]:
    """The chat format: each token as text, or `as_ids` as its id, with its bytes and alternatives."""

    def entry_of(e: Logprob) -> dict[str, Any]:
        return _chat_token(tokenizer, e, as_ids)

    content = [{**entry_of(e[0]), "top_logprobs": [entry_of(one) for one in e[1:]]} for e in entries]
    return {"content": content}


def prompt_logprobs(tokenizer: Tokenizer | None, entries: Sequence[Logprobs | None]) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's format: for each prompt token its candidates by token id."""
    return [None if entry is None else {str(e.token_id): _candidate(tokenizer, e) for e in entry} for entry in entries]


def _candidate(tokenizer: Tokenizer | None, e: Logprob) -> dict[str, Any]:
    return {"logprob": _value(e), "rank": e.rank, "decoded_token": _text(tokenizer, e.token_id)}


def _chat_token(tokenizer: Tokenizer, e: Logprob, as_ids: bool) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(e.token_id)
    token = _text(None, e.token_id) if as_ids else spelled.decode("utf-8", "replace")
    return {"token": token, "logprob": _value(e), "bytes": list(spelled)}


def _text(tokenizer: Tokenizer | None, token_id: int) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _value(e: Logprob) -> float:
    return e.logprob if e.logprob > LOWEST else LOWEST  # unlike `max`, this comparison also replaces NaN
