"""Samples tokens from logits.

Sampling inverts the cumulative distribution at one uniform number per token. The number is a hash of the request's seed and
the token's position in its output, so sampling has no generator state: preempting a request, or batching it with others,
changes nothing. The hash is SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo import ops
from octavo.batch import to_device
from octavo.engine.sampling_row import SamplingRow
from octavo.engine.token_history import Histories, History
from octavo.messages import Logprob, Logprobs, SamplingParams

__all__ = ["NO_TOKEN", "logprobs_of", "sample", "uniform", "warm_up"]

_MASK = (1 << 64) - 1
NO_TOKEN = -1  # returned for a row whose every token is forbidden


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1), determined by the arguments alone."""
    z = (seed * 0xD1342543DE82EF95 + (place + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / float(1 << 53)


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], histories: Histories | None = None, requests: Sequence[str] = ()
) -> Tensor:
    """Samples one token per row of FP32 `logits` [rows, vocab]: int64 [rows], on the logits' device.

    A row whose request forbids every token gets NO_TOKEN. The logits may be overwritten. `histories` holds the token ids of
    the rows' `requests` on the device, and the sampled tokens are appended to it; None: the host knows all tokens.
    """
    for i, row in enumerate(rows):
        if row.adjusted:
            _adjust(logits[i], row)
    if histories is None:
        histories, requests = Histories(logits.device), [str(i) for i in range(len(rows))]
    penalized = [i for i, row in enumerate(rows) if row.penalized]
    names = [requests[i] for i in penalized]
    for history in histories.of(penalized, names, [rows[i] for i in penalized]):
        _penalize(logits, history, [rows[i].params for i in history.at])
    for i, row in enumerate(rows):
        if row.grammar is not None:
            logits[i].masked_fill_(row.grammar.forbidden().to(logits.device), float("-inf"))
        if row.bad_words is not None:
            row.bad_words.forbid(logits[i], row.token_ids, row.num_prompt_tokens)
    restricted = [i for i, row in enumerate(rows) if row.restricted]
    none_left = logits[restricted].amax(1) == float("-inf") if restricted else None  # before sampling overwrites the logits
    tokens = _choose(logits, rows)
    if none_left is not None:
        tokens[restricted] = torch.where(none_left, NO_TOKEN, tokens[restricted])
    if penalized:
        histories.add(names, tokens[to_device(penalized, torch.int64, logits.device)])
    return tokens


def _adjust(logits: Tensor, row: SamplingRow) -> None:
    """Applies logit biases and `min_tokens` in place to one row."""
    assert row.rules is not None
    if row.rules.biased:
        row.rules.bias(logits)
    if row.num_output_tokens < row.params.min_tokens and not (row.grammar and row.grammar.finished):
        row.rules.forbid_end(logits)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(values, torch.float32, like.device).unsqueeze(1)


def _penalize(logits: Tensor, history: History, params: Sequence[SamplingParams]) -> None:
    """Applies penalties in place to the rows of `history`, in vLLM's order.

    The repetition penalty applies once to each token of prompt and output, the presence penalty once to each output token, the
    frequency penalty once per occurrence in the output. Only the logits of these tokens are read and written; a token that
    occurs more than once gets the same value written several times.
    """
    place = torch.arange(history.ids.shape[1], device=logits.device)
    row = to_device(history.at, torch.int64, logits.device).unsqueeze(1)
    ids = torch.where(place < history.tokens, history.ids, history.ids[:, :1])
    repetition = _column([p.repetition_penalty for p in params], logits)
    values = logits[row, ids]
    logits[row, ids] = torch.where(values > 0, values / repetition, values * repetition)
    chosen = (place >= history.prompt) & (place < history.tokens)
    if any(p.frequency_penalty for p in params):
        frequency = _column([p.frequency_penalty for p in params], logits)
        logits.index_put_((row.expand_as(ids), ids), -frequency * chosen, accumulate=True)
    if any(p.presence_penalty for p in params):
        first = torch.minimum(history.prompt, history.tokens - 1)  # first output token, if there is one
        ids = torch.where(chosen, history.ids, history.ids.gather(1, first))
        presence = _column([p.presence_penalty for p in params], logits)
        logits[row, ids] = logits[row, ids] - presence * (history.tokens > history.prompt)


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    kinds = [None if row.params.greedy else row.filtered for row in rows]
    if len(set(kinds)) == 1:
        return ops.argmax(logits) if kinds[0] is None else _sample_rows(logits, rows, kinds[0])
    tokens = ops.argmax(logits)
    for filtered in (False, True):  # separate calls, so that a row's sampling never depends on the rows beside it
        if chosen := [i for i, kind in enumerate(kinds) if kind is filtered]:
            at = to_device(chosen, torch.int64, logits.device)
            tokens[at] = _sample_rows(logits[at], [rows[i] for i in chosen], filtered)
    return tokens


def _sample_rows(logits: Tensor, rows: Sequence[SamplingRow], filtered: bool) -> Tensor:
    params, vocab, filters = [row.params for row in rows], logits.shape[1], None
    if filtered:
        top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
        shares = to_device([[p.top_p for p in params], [p.min_p for p in params]], torch.float32, logits.device)
        filters = ops.Filters(to_device(top_k, torch.int32, logits.device), shares[0], shares[1], max(top_k))
    temperature = to_device([p.temperature for p in params], torch.float32, logits.device)
    u = to_device([uniform(row.seed, row.num_output_tokens) for row in rows], torch.float64, logits.device)
    return ops.sample(logits, temperature, u, filters)


def warm_up(logits: Tensor) -> None:
    """Warm-up: samples from logits [1, vocab] without and with top-k/top-p/min-p filters."""
    for filtered in (False, True):
        _sample_rows(logits, [SamplingRow(SamplingParams(), [0], 1, 0)], filtered)


def logprobs_of(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[Logprobs]:
    """Log-probabilities of each row's token and its `counts[row]` best alternatives, from raw logits [rows, vocab]."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1))  # rows with NO_TOKEN are never reported
    ranks = (logprobs > chosen).sum(-1).add(1).tolist()
    top, ids = logprobs.topk(min(max(counts), logits.shape[1]), -1)
    out: list[Logprobs] = []
    for i, (token, value, count) in enumerate(zip(tokens.tolist(), chosen.squeeze(1).tolist(), counts, strict=True)):
        alternatives = zip(ids[i, :count].tolist(), top[i, :count].tolist(), strict=True)
        out.append((Logprob(token, value, ranks[i]), *(Logprob(t, v, rank) for rank, (t, v) in enumerate(alternatives, 1))))
    return out
