"""One request's row of logits, as far as choosing its next token needs to know the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.engine.grammar import Grammar
from octavo.engine.token_rules import BadWords, TokenRules
from octavo.messages import SamplingParams

__all__ = ["SamplingRow"]


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
    rules: TokenRules | None = None  # those of `params`, if nobody has made them
    bad_words: BadWords | None = None

    def __post_init__(self) -> None:
        if self.rules is None:
            self.rules = TokenRules(self.params, self.eos_token_ids)
        if self.bad_words is None and self.rules.restricted:
            self.bad_words = BadWords(self.rules)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending - self.num_prompt_tokens

    @property
    def plain(self) -> bool:
        """Whether the logits are used as they are."""
        return not self.penalized and not self.adjusted

    @property
    def penalized(self) -> bool:
        """Whether the logits of tokens that came before are changed."""
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @property
    def adjusted(self) -> bool:
        """Whether logits of other tokens are."""
        return bool(self.params.logit_bias) or self.num_output_tokens < self.params.min_tokens or self.restricted

    @property
    def restricted(self) -> bool:
        """Whether some tokens are forbidden, so that none may be left."""
        return self.grammar is not None or self.bad_words is not None

    @property
    def synchronous(self) -> bool:
        """Whether the step that computes this row must be over before the next one is launched.

        What forbids tokens must know its token's value, or its log-probabilities are read at once and there is nothing to gain.
        """
        return self.restricted or self.params.logprobs is not None or self.params.prompt_logprobs is not None

    @property
    def filtered(self) -> bool:
        """Whether only the likeliest tokens are drawn from."""
        p = self.params
        return p.top_p < 1 or p.top_k > 0 or p.min_p > 0
