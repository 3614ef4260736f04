"""Tokens that a request forbids: all but `allowed_token_ids`, and those that would complete one of its `bad_words`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.batch import to_device

__all__ = ["TokenBans"]


class TokenBans:
    """What one request forbids. `bad_words` are sequences of token ids, of which the last one is not to follow the others."""

    def __init__(self, allowed: Sequence[int] | None, bad_words: Sequence[Sequence[int]]):
        self._allowed = allowed
        self._always = [word[0] for word in bad_words if len(word) == 1]
        # by the last token before the forbidden one, so that a step looks at few of many words
        self._after: defaultdict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for word in bad_words:
            if len(word) > 1:
                self._after[word[-2]].append((list(word[:-1]), word[-1]))
        self._mask: Tensor | None = None  # what is forbidden at every step, on the device

    def apply(self, logits: Tensor, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Forbids the tokens in place, in logits [vocab]. A bad word that began in the prompt is none, as in vLLM."""
        if self._mask is None:
            self._mask = self._forbidden_always(logits)
        logits.masked_fill_(self._mask, float("-inf"))
        room = len(token_ids) - num_prompt_tokens
        last = token_ids[-1] if room else -1
        completing = [
            token
            for before, token in self._after.get(last, ())
            if len(before) <= room and list(token_ids[len(token_ids) - len(before) :]) == before
        ]
        if completing:
            logits.index_fill_(0, to_device(completing, torch.int64, logits.device), float("-inf"))

    def _forbidden_always(self, logits: Tensor) -> Tensor:
        device = logits.device
        mask = torch.zeros(len(logits), dtype=torch.bool, device=device)
        if self._allowed is not None:
            mask.fill_(True)
            mask.index_fill_(0, to_device(list(self._allowed), torch.int64, device), False)
        if self._always:
            mask.index_fill_(0, to_device(self._always, torch.int64, device), True)
        return mask
