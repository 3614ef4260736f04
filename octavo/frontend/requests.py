"""A request on its way in: checked once, then the sequences that the engine is asked for. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octavo.errors import InvalidRequest
from octavo.messages import EngineInfo, EngineRequest, SamplingParams
from octavo.text.llguidance_grammar import serialize
from octavo.text.tokenizer import Tokenizer

__all__ = ["check_request", "engine_requests"]


def engine_requests(
    info: EngineInfo,
    tokenizer: Tokenizer | None,
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    eos_token_ids: frozenset[int],
) -> list[EngineRequest]:
    """The n sequences of one request as the engine takes them, each with a seed of its own.

    Raises InvalidRequest as check_request does.
    """
    grammar = check_request(info, tokenizer, prompt_token_ids, params)
    if grammar is not None:
        params = replace(params, structured=None)  # the grammar crosses once, in the form that was validated
    if params.n == 1:
        return [EngineRequest(request_id, prompt_token_ids, params, eos_token_ids, grammar)]
    sequences = []
    for i in range(params.n):
        seed = None if params.seed is None else params.seed + i
        prompt_logprobs = params.prompt_logprobs if i == 0 else None  # they are the same for all
        one = replace(params, n=1, seed=seed, prompt_logprobs=prompt_logprobs)
        sequences.append(EngineRequest(f"{request_id}-{i}", prompt_token_ids, one, eos_token_ids, grammar))
    return sequences


def check_request(
    info: EngineInfo, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], params: SamplingParams
) -> str | None:
    """Raises InvalidRequest for what the engine could never serve, before anything is sent to it.

    Returns the grammar of a structured output as the engine compiles it.
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
    if (unknown := next((i for i in params.logit_bias or () if not 0 <= i < info.vocab_size), None)) is not None:
        raise InvalidRequest(f"logit_bias names token {unknown}; the vocabulary has {info.vocab_size}.", "logit_bias")
    if params.stop and (tokenizer is None or not params.detokenize):
        reason = "detokenize is off" if tokenizer is not None else "the checkpoint has no tokenizer.json"
        raise InvalidRequest(f"Stop strings need text, and {reason}; use stop_token_ids.", "stop")
    return None if params.structured is None else serialize(params.structured)
