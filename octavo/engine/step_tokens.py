"""The output of one step, for the next step and for the host."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from octavo.batch import Span
from octavo.engine.sequence import ScheduledRequest
from octavo.messages import Logprobs

__all__ = ["StepTokens", "latest", "sources", "span"]


@dataclass
class StepTokens:
    """The output of one step. Tokens stay on the device for the next step; `to_host` waits for their copy only."""

    tokens: Tensor | None = None  # int64, one per request that sampled, in schedule order
    rows: dict[str, int] = field(default_factory=dict)  # request id -> row of `tokens`
    logprobs: dict[str, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[Logprobs]] = field(default_factory=dict)  # of this step's prompt positions

    _host: Tensor | None = None
    _copied: torch.Event | None = None

    def put(self, tokens: Tensor, request_ids: Sequence[str]) -> None:
        """Stores the tokens and starts their copy to the host now. Later launches would delay it or overwrite a graph's
        output."""
        self.tokens = tokens
        self.rows = {request_id: row for row, request_id in enumerate(request_ids)}
        if tokens.device.type == "cpu":
            self._host = tokens.clone()
        else:
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._copied = torch.Event(tokens.device)
            self._copied.record()

    def to_host(self) -> list[int]:
        if self._copied is not None:
            self._copied.synchronize()
        return [] if self._host is None else self._host.tolist()

    def tell_early(self) -> bool:
        """Tells other hosts the tokens if this host has them, so that they need not wait until it takes them. Whether all of
        them know."""
        return True

    def hand_back(self) -> None:
        """Brings `tokens` from where they were sampled to where the next step embeds them. All ranks call it alike, before
        the first step that computes some of them."""


UNKNOWN = [0]  # the device fills in its value


def span(item: ScheduledRequest) -> Span:
    """The span of an item. A pending token is 0 until the device fills in its value."""
    request, start, num_tokens, _, pending = item
    token_ids = UNKNOWN if pending else request.token_ids[start : start + num_tokens]
    return Span(token_ids, start, request.block_ids, request.rotary_delta)


def latest(steps: Sequence[StepTokens], request_ids: Collection[str]) -> StepTokens | None:
    """The newest token of each of these requests, of the steps that sampled it, oldest first. None for no requests."""
    found: dict[str, StepTokens] = {}
    unfound = set(request_ids)
    for step in reversed(steps):
        found |= dict.fromkeys(here := step.rows.keys() & unfound, step)
        if not (unfound := unfound - here):
            break
    newest = set(map(id, found.values()))
    used = [step for step in steps if id(step) in newest]
    for step in used:
        step.hand_back()
    if len(used) < 2:
        return used[0] if used else None
    firsts = dict(zip(map(id, used), accumulate((len(step.rows) for step in used), initial=0), strict=False))
    rows = {request_id: firsts[id(step)] + step.rows[request_id] for request_id, step in found.items()}
    tokens = [step.tokens for step in used if step.tokens is not None]
    return StepTokens(torch.cat(tokens) if tokens else None, rows)


def sources(items: Sequence[ScheduledRequest], previous: StepTokens | None) -> list[int]:
    """For each item the row of its token in the previous step's tokens; -1 where the host knows the token."""
    if previous is None:
        return [-1] * len(items)
    rows = previous.rows
    return [rows[item.request.request_id] if item.pending else -1 for item in items]
