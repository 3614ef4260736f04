"""One row of logits, with the request state that sampling its next token needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.engine.grammar import Grammar
from octavo.engine.token_rules import BadWords, TokenRules
from octavo.messages import SamplingParams

__all__ = ["SamplingRow", "waits_for_tokens"]


def waits_for_tokens(params: SamplingParams) -> bool:
    """Whether a request's tokens are read by the host in the step that samples them."""
    return params.logprobs is not None or params.prompt_logprobs is not None


@dataclass(slots=True)
class SamplingRow:
    """Sampling state of one request, for all its steps: `num_pending` is set for each, and `token_ids` grows."""

    params: SamplingParams
    token_ids: Sequence[int]  # prompt and output so far, without pending tokens
    num_prompt_tokens: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    num_pending: int = 0  # tokens already sampled whose values are still on the device only
    rules: TokenRules | None = None  # the TokenRules of `params`; None: made here
    bad_words: BadWords | None = None
    _free: bool = field(init=False)  # whether nothing but a grammar and `min_tokens` may change the logits

    def __post_init__(self) -> None:
        if self.rules is None:
            self.rules = TokenRules(self.params, self.eos_token_ids)
        if self.bad_words is None and self.rules.restricted:
            self.bad_words = BadWords(self.rules)
        self._free = not (self.penalized or self.params.logit_bias or self.bad_words)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending - self.num_prompt_tokens

    @property
    def plain(self) -> bool:
        """Whether the logits are used unchanged."""
        return self._free and self.grammar is None and self.num_output_tokens >= self.params.min_tokens

    @property
    def penalized(self) -> bool:
        """Whether repetition, presence or frequency penalties apply."""
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @property
    def adjusted(self) -> bool:
        """Whether a bias or `min_tokens` changes the logits."""
        return bool(self.params.logit_bias) or self.num_output_tokens < self.params.min_tokens

    @property
    def restricted(self) -> bool:
        """Whether tokens may be forbidden, so that possibly none is left."""
        return self.grammar is not None or self.bad_words is not None

    @property
    def synchronous(self) -> bool:
        """Whether the step that computes this row must finish before the next one is launched.

        A grammar and bad words need the value of the last token on the host. Log-probabilities are read by the host in the
        same step, so launching ahead would gain nothing.
        """
        return self.restricted or waits_for_tokens(self.params)

    @property
    def filtered(self) -> bool:
        """Whether top-k, top-p or min-p applies."""
        p = self.params
        return p.top_p < 1 or p.top_k > 0 or p.min_p > 0
