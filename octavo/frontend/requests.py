"""Validates a request and makes the engine's sequences from it. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from octavo.errors import InvalidRequest
from octavo.images import PlacedImage
from octavo.messages import EngineInfo, EngineRequest, SamplingParams
from octavo.text.llguidance_grammar import serialize
from octavo.text.tokenizer import Tokenizer

__all__ = ["check_images", "check_request", "engine_requests"]


def engine_requests(
    info: EngineInfo,
    tokenizer: Tokenizer | None,
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    eos_token_ids: frozenset[int],
    cache_salt: str | None = None,
    images: Sequence[PlacedImage] = (),
) -> list[EngineRequest]:
    """The n sequences of one request in the engine's form, each with its seed.

    Raises InvalidRequest as check_request and check_images do.
    """
    check_images(info, images)
    grammar = check_request(info, tokenizer, prompt_token_ids, params)
    if grammar is not None:
        params = replace(params, structured=None)  # the grammar is sent once, in the validated form
    more: dict[str, Any] = {"bad_words": _bad_words(info, tokenizer, params.bad_words), "cache_salt": cache_salt}
    more["images"] = tuple(images)
    if params.n == 1:
        return [EngineRequest(request_id, prompt_token_ids, params, eos_token_ids, grammar, **more)]
    return [
        EngineRequest(f"{request_id}-{i}", prompt_token_ids, params.sequence(i), eos_token_ids, grammar, **more)
        for i in range(params.n)
    ]


def _bad_words(info: EngineInfo, tokenizer: Tokenizer | None, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word at the start of a text and after a space: the sequences that vLLM forbids. Those with a token that
    the model does not have, as a tokenizer may, are never written.
    """
    if not words:
        return ()
    if tokenizer is None:
        raise InvalidRequest(
            "bad_words need a tokenizer, and the checkpoint has no tokenizer.json; use logit_bias.", "bad_words"
        )
    spelled: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        spelled[bare] = None
        # a separate space token before the same tokens would forbid the same sequences as `bare`
        if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
            spelled[spaced] = None
    return tuple(word for word in spelled if word and max(word) < info.vocab_size)


def check_images(info: EngineInfo, images: Sequence[PlacedImage]) -> None:
    """Raises InvalidRequest for images that the engine cannot encode."""
    if images and not info.image_tokens:
        raise InvalidRequest("This model reads no images here; send text alone.", "messages")
    if (largest := max((placed.image.tokens for placed in images), default=0)) > info.image_tokens:
        raise InvalidRequest(
            f"An image has {largest} tokens, and at most {info.image_tokens} are read here; make it smaller.", "messages"
        )


def check_request(
    info: EngineInfo, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], params: SamplingParams
) -> str | None:
    """Raises InvalidRequest for a request that the engine could never serve, before anything is sent to it.

    Returns the grammar of a structured output in llguidance's format.
    """
    length, longest, wanted = len(prompt_token_ids), info.max_model_len, params.max_tokens
    if not length:
        raise InvalidRequest("The prompt is empty; send at least one token.", "prompt")
    if length >= longest:
        raise InvalidRequest(f"The prompt has {length} tokens; at most {longest - 1} fit beside one to generate.", "prompt")
    if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < info.vocab_size:
        wrong = next(token for token in prompt_token_ids if not 0 <= token < info.vocab_size)
        raise InvalidRequest(f"Token id {wrong} is out of the vocabulary of {info.vocab_size} tokens.", "prompt")
    if wanted is not None and length + wanted > longest:
        raise InvalidRequest(
            f"This model's maximum context length is {longest} tokens. However, you requested {length + wanted} tokens "
            f"({length} in the prompt, {wanted} in the completion). Please reduce the prompt or max_tokens.",
            "max_tokens",
        )
    for name in ("logprobs", "prompt_logprobs"):
        if (asked := getattr(params, name)) is not None and asked > info.max_logprobs:
            raise InvalidRequest(f"{name} must be between 0 and {info.max_logprobs}, not {asked}.", name)
    if (unknown := next((i for i in params.logit_bias or () if not 0 <= i < info.vocab_size), None)) is not None:
        raise InvalidRequest(f"logit_bias names token {unknown}; the vocabulary has {info.vocab_size}.", "logit_bias")
    if (unknown := next((i for i in params.allowed_token_ids or () if not 0 <= i < info.vocab_size), None)) is not None:
        raise InvalidRequest(
            f"allowed_token_ids names token {unknown}; the vocabulary has {info.vocab_size}.", "allowed_token_ids"
        )
    if params.stop and (tokenizer is None or not params.detokenize):
        reason = "detokenize is off" if tokenizer is not None else "the checkpoint has no tokenizer.json"
        raise InvalidRequest(f"Stop strings need text, and {reason}; use stop_token_ids.", "stop")
    return None if params.structured is None else serialize(params.structured)
