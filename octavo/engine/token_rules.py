"""Logit changes for single tokens: `logit_bias`, `allowed_token_ids`, `bad_words`, `min_tokens`.

The n sequences of a request share one TokenRules, whose tensors are built once, so that a step never loops over client lists.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.batch import to_device
from octavo.messages import SamplingParams
from octavo.text.patterns import START, Patterns

__all__ = ["BadWords", "TokenRules"]


class TokenRules:
    """Rules of one request. `bad_words` are token id sequences; the last token of each is forbidden after the others."""

    def __init__(
        self, params: SamplingParams, eos_token_ids: frozenset[int] = frozenset(), bad_words: Sequence[Sequence[int]] = ()
    ):
        self._bias, self._allowed = params.logit_bias, params.allowed_token_ids
        self._end_tokens = sorted(eos_token_ids.union(params.stop_token_ids))
        self._single = [word[0] for word in bad_words if len(word) == 1]
        self._last: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # by prefix: the tokens that must not follow
        for word in bad_words:
            if len(word) > 1:
                self._last[tuple(word[:-1])].append(word[-1])
        self.automaton = Patterns(self._last)
        self.biased, self.restricted = bool(params.logit_bias), self._allowed is not None or bool(bad_words)
        self._tensors: dict[str | int, Tensor] = {}

    def bias(self, logits: Tensor) -> None:
        """Adds the biases in place to logits [vocab]."""
        if "bias" not in self._tensors:
            given = self._bias or {}
            row = torch.zeros(len(logits), dtype=torch.float32)
            row[torch.tensor(list(given), dtype=torch.int64)] = torch.tensor(list(given.values()), dtype=torch.float32)
            self._tensors["bias"] = row.to(logits.device)
        logits += self._tensors["bias"]

    def forbid_end(self, logits: Tensor) -> None:
        """Forbids in place the tokens that would end the request (EOS and stop tokens)."""
        if "end" not in self._tensors:
            self._tensors["end"] = to_device(_known(self._end_tokens, logits), torch.int64, logits.device)
        logits.index_fill_(0, self._tensors["end"], float("-inf"))

    def forbid(self, logits: Tensor, state: int) -> None:
        """Forbids in place the tokens that are never allowed, and those that would complete a bad word from `state`."""
        if "never" not in self._tensors:
            self._tensors["never"] = self._never(logits)
        logits.masked_fill_(self._tensors["never"], float("-inf"))
        if end := self.automaton.end(state):
            if end not in self._tensors:
                completing = [token for tokens in self.automaton.all_ended(end) for token in self._last[tuple(tokens)]]
                self._tensors[end] = to_device(_known(completing, logits), torch.int64, logits.device)
            logits.index_fill_(0, self._tensors[end], float("-inf"))

    def _never(self, logits: Tensor) -> Tensor:
        mask = torch.zeros(len(logits), dtype=torch.bool)
        if self._allowed is not None:
            mask.fill_(True)
            mask[torch.tensor(self._allowed, dtype=torch.int64)] = False
        mask[torch.tensor(_known(self._single, logits), dtype=torch.int64)] = True
        return mask.to(logits.device)


def _known(tokens: Sequence[int], logits: Tensor) -> list[int]:
    """Those of `tokens` that the model has: a tokenizer may have more, and a client may name any to stop at."""
    return [token for token in tokens if 0 <= token < len(logits)]


class BadWords:
    """The bad-words automaton state of one sequence. Prompt tokens do not start a bad word, as in vLLM."""

    def __init__(self, rules: TokenRules):
        self._rules, self._state, self._read = rules, START, 0

    def forbid(self, logits: Tensor, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Forbids tokens in place in logits [vocab], given `token_ids`. `token_ids` only grows between calls."""
        for at in range(num_prompt_tokens + self._read, len(token_ids)):
            self._state = self._rules.automaton.after(self._state, token_ids[at])
        self._read = len(token_ids) - num_prompt_tokens
        self._rules.forbid(logits, self._state)
