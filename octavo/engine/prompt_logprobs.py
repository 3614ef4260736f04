"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.engine.sampler import logprobs_of
from octavo.engine.sampling_row import SamplingRow
from octavo.engine.sequence import ScheduledRequest
from octavo.engine.vocabulary import Vocabulary
from octavo.messages import Logprobs
from octavo.models.interface import Model

__all__ = ["prompt_logprobs", "wants_prompt_logprobs"]

LOGIT_ROWS = 256  # prompt positions per chunk of logits, which bounds their memory


def wants_prompt_logprobs(item: ScheduledRequest, row: SamplingRow) -> bool:
    return row.params.prompt_logprobs is not None and not row.num_output_tokens and item.start + 1 < row.num_prompt_tokens


def prompt_logprobs(
    model: Model, vocabulary: Vocabulary, hidden: Tensor, item: ScheduledRequest, row: SamplingRow
) -> list[Logprobs]:
    """Log-probabilities of the prompt tokens that follow the positions of `hidden`, those that a step computes of `item`."""
    stop = min(item.start + item.num_tokens, row.num_prompt_tokens - 1)
    targets = torch.tensor(row.token_ids[item.start + 1 : stop + 1], device=hidden.device)
    found: list[Logprobs] = []
    for at in range(0, len(targets), LOGIT_ROWS):
        part = targets[at : at + LOGIT_ROWS]
        logits = vocabulary.whole(model.logits(hidden[at : at + len(part)])).float()
        found += logprobs_of(logits, part, [row.params.prompt_logprobs or 0] * len(part))
    return found
