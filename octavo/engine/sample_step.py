"""Samples what a step's requests ask for: tokens, and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.engine.sampler import logprobs_of, sample
from octavo.engine.sampling_row import SamplingRow
from octavo.engine.step_tokens import StepTokens
from octavo.engine.token_history import Histories
from octavo.engine.vocabulary import Vocabulary

__all__ = ["sample_into"]


def sample_into(
    out: StepTokens, logits: Tensor, greedy: Tensor | None, ids: Sequence[str], rows: Sequence[SamplingRow],
    vocabulary: Vocabulary, histories: Histories,
) -> None:  # fmt: skip
    """Samples the next tokens of the requests `ids` into `out`, from this rank's part of their logits [rows, part].

    greedy: the argmax of whole `logits`, int64 [rows], if it is computed already.
    """
    if all(row.params.greedy and row.params.logprobs is None and row.plain for row in rows):
        out.put(vocabulary.argmax(logits) if greedy is None else greedy, ids)
        return
    logits = vocabulary.whole(logits).float()
    asked = [n for n, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[asked].clone() if asked else None
    out.put(tokens := sample(logits, rows, histories, ids), ids)
    if raw is not None:
        found = logprobs_of(raw, tokens[asked], [rows[n].params.logprobs or 0 for n in asked])
        out.logprobs = {ids[n]: entry for n, entry in zip(asked, found, strict=True)}
