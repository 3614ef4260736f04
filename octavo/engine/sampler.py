"""Chooses tokens from logits.

A random choice inverts the cumulative distribution at one uniform number a token, and that number is a hash of the request's
seed and the token's place in its output. It needs no generator's state: preempting a request, or running it beside others,
changes nothing. The hash is SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.batch import to_device
from octavo.engine.grammar import Grammar
from octavo.engine.request import Logprob, Logprobs, SamplingParams

__all__ = ["SamplingRow", "logprobs_of", "sample", "uniform"]

_MASK = (1 << 64) - 1


@dataclass(slots=True)
class SamplingRow:
    """What decides the next token of one request."""

    params: SamplingParams
    token_ids: Sequence[int]  # prompt and output so far, less the pending ones
    num_prompt_tokens: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    num_pending: int = 0  # tokens chosen before this one whose values only the device knows yet

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending - self.num_prompt_tokens

    @property
    def plain(self) -> bool:
        """Whether the logits are used as they are."""
        return not self.follows and not self.params.logit_bias and self.num_output_tokens >= self.params.min_tokens

    @property
    def follows(self) -> bool:
        """Whether the choice depends on the values of the tokens before, which the host must then know."""
        p = self.params
        penalties = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        return penalties or self.grammar is not None

    @property
    def synchronous(self) -> bool:
        """Whether the step that computes this row must be over before the next one is launched.

        The next choice needs its token's value, or its log-probabilities are read at once and there is nothing to gain.
        """
        return self.follows or self.params.logprobs is not None or self.params.prompt_logprobs is not None

    @property
    def filtered(self) -> bool:
        """Whether only the likeliest tokens are drawn from."""
        p = self.params
        return p.top_p < 1 or p.top_k > 0 or p.min_p > 0


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    z = (seed * 0xD1342543DE82EF95 + (place + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / float(1 << 53)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """One token a row of FP32 `logits` [rows, vocab], which may be overwritten: int64 [rows], on the logits' device."""
    for i, row in enumerate(rows):
        if not row.plain:
            _adjust(logits[i], row)
    tokens = logits.argmax(-1)
    for filtered in (False, True):  # apart, so that how a row is drawn never depends on the rows beside it
        if drawn := [i for i, row in enumerate(rows) if not row.params.greedy and row.filtered is filtered]:
            at = to_device(drawn, torch.int64, logits.device)
            tokens[at] = _draw(logits[at], [rows[i] for i in drawn], filtered)
    return tokens


def _adjust(logits: Tensor, row: SamplingRow) -> None:
    """Biases, bans and penalties, in place on one row, in vLLM's order."""
    p, device = row.params, logits.device
    for token, bias in (p.logit_bias or {}).items():
        logits[token] += bias
    if row.num_output_tokens < p.min_tokens and not (row.grammar and row.grammar.finished):
        enders = [token for token in {*row.eos_token_ids, *p.stop_token_ids} if 0 <= token < len(logits)]
        logits.index_fill_(0, to_device(enders, torch.int64, device), float("-inf"))
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.token_ids)), device=device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and row.num_output_tokens:
        output = torch.tensor(list(row.token_ids[row.num_prompt_tokens :]), device=device)
        ids, counts = output.unique(return_counts=True)
        logits[ids] -= p.frequency_penalty * counts + p.presence_penalty
    if row.grammar is not None:
        logits.masked_fill_(row.grammar.forbidden().to(device), float("-inf"))


def _draw(logits: Tensor, rows: Sequence[SamplingRow], filtered: bool) -> Tensor:
    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device(values, dtype, logits.device).unsqueeze(1)

    probs = (logits / column([r.params.temperature for r in rows])).softmax(-1)
    u = column([uniform(r.seed, r.num_output_tokens) for r in rows], torch.float64)
    if not filtered:
        return _invert(probs, u)
    vocab = probs.shape[1]
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    keep = rank < column([r.params.top_k if r.params.top_k > 0 else vocab for r in rows])
    # min_p and top_k come first; top_p's share is of what they leave
    keep &= probs >= probs[:, :1] * column([r.params.min_p for r in rows])
    probs = probs * keep
    before = probs.cumsum(-1) - probs
    keep = before < column([r.params.top_p for r in rows]) * probs.sum(-1, keepdim=True)
    keep[:, 0] = True
    return order.gather(1, _invert(probs * keep, u).unsqueeze(1)).squeeze(1)


def _invert(probs: Tensor, u: Tensor) -> Tensor:
    """The first index at which the cumulative sum exceeds u times its total."""
    total = probs.double().cumsum(-1)
    index = torch.searchsorted(total, u * total[:, -1:], right=True).squeeze(1)
    last = (probs > 0).int().mul(torch.arange(probs.shape[1], device=probs.device)).amax(-1)  # rounding must not pass it
    return torch.minimum(index, last)


def logprobs_of(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[Logprobs]:
    """For each row the chosen token and its `counts[row]` likeliest alternatives, of the raw logits [rows, vocab]."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    ranks = (logprobs > chosen).sum(-1).add(1).tolist()
    top, ids = logprobs.topk(min(max(counts), logits.shape[1]), -1)
    out = []
    for i, (token, value, count) in enumerate(zip(tokens.tolist(), chosen.squeeze(1).tolist(), counts, strict=True)):
        alternatives = zip(ids[i, :count].tolist(), top[i, :count].tolist(), strict=True)
        out.append((Logprob(token, value, ranks[i]), *(Logprob(t, v, rank) for rank, (t, v) in enumerate(alternatives, 1))))
    return out
