"""Log-probabilities in the formats of the two endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.messages import Logprob, Logprobs
from octavo.server.json_pieces import Later
from octavo.text.tokenizer import Tokenizer

__all__ = ["chat_logprobs", "completion_logprobs", "prompt_logprobs"]

LOWEST = -9999.0  # vLLM's stand-in for -inf; also for NaN, which JSON cannot express


def completion_logprobs(
    tokenizer: Tokenizer | None, entries: Iterable[tuple[int, Logprobs | None]], offsets: Sequence[int]
) -> dict[str, list[Any]]:
    """The completions format, for tokens whose texts start at `offsets`. A prompt's first token has no logprobs.

    A prompt's alternatives are made when they are written.
    """
    tokens, chosen, top = list[str](), list[float | None](), list[Any]()
    for token_id, entry in entries:
        tokens.append(_text(tokenizer, token_id))
        chosen.append(None if entry is None else _value(entry[0]))
        top.append(_top(tokenizer, entry) if isinstance(entry, tuple) else entry and Later(_top, tokenizer, entry))
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": list(offsets)}


def _top(tokenizer: Tokenizer | None, entry: Logprobs) -> dict[str, float]:
    return {_text(tokenizer, e.token_id): _value(e) for e in entry}


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[Logprobs], as_ids: bool = False) -> dict[str, Any]:
    """The chat format: each token as text, or `as_ids` as its id, with its bytes and alternatives."""

    def entry_of(e: Logprob) -> dict[str, Any]:
        return _chat_token(tokenizer, e, as_ids)

    content = [{**entry_of(e[0]), "top_logprobs": [entry_of(one) for one in e[1:]]} for e in entries]
    return {"content": content}


def prompt_logprobs(tokenizer: Tokenizer | None, entries: Sequence[Logprobs | None]) -> list[Later | None]:
    """vLLM's format: for each prompt token its candidates by token id, made when they are written."""
    return [None if entry is None else Later(_candidates, tokenizer, entry) for entry in entries]


def _candidates(tokenizer: Tokenizer | None, entry: Logprobs) -> dict[str, dict[str, Any]]:
    return {
        str(e.token_id): {"logprob": _value(e), "rank": e.rank, "decoded_token": _text(tokenizer, e.token_id)} for e in entry
    }


def _chat_token(tokenizer: Tokenizer, e: Logprob, as_ids: bool) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(e.token_id)
    token = _text(None, e.token_id) if as_ids else spelled.decode("utf-8", "replace")
    return {"token": token, "logprob": _value(e), "bytes": list(spelled)}


def _text(tokenizer: Tokenizer | None, token_id: int) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _value(e: Logprob) -> float:
    return e.logprob if e.logprob > LOWEST else LOWEST  # unlike `max`, this comparison also replaces NaN
