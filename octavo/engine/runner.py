"""Runs the steps of one rank: its model over the step's requests, and the sampling of their next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from octavo import batch as batches
from octavo.engine.model_lifecycle import ModelLifecycle
from octavo.engine.prompt_logprobs import prompt_logprobs, wants_prompt_logprobs
from octavo.engine.sample_step import sample_into
from octavo.engine.sampling_row import SamplingRow
from octavo.engine.sequence import ScheduledRequest
from octavo.engine.step_tokens import StepTokens, sources, span
from octavo.layers.vision import ImageInput
from octavo.models.interface import StageState
from octavo.ops.bound import check_device

__all__ = ["ModelRunner"]

Items = Sequence[ScheduledRequest]


class ModelRunner(ModelLifecycle):
    """Launches steps of a runnable model."""

    @torch.inference_mode()
    def forward(self, batch: batches.ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] of a batch, where one stage has all layers. Writes its keys and values to the cache."""
        return self.step.hidden(batch)

    @torch.inference_mode()
    def run(self, items: Items, rows: Sequence[SamplingRow], previous: StepTokens | None = None) -> StepTokens:
        """Launches the step of `items`. `rows[i]` is the sampling state of items[i], used if the step samples its next token;
        `previous` has the pending tokens, which are copied from it on the device.
        """
        out = StepTokens()
        if not items:
            return out
        check_device(self.platform.device)
        if not self.tp.stages.first:  # which alone embeds tokens
            previous = None
        images = None if self.encoder is None else self.encoder.input(items)
        if images is None and (decoded := self._replay(items, rows, previous)) is not None:
            if isinstance(decoded, StageState):
                self.pipeline.hand_on(decoded)
                return self.pipeline.expected(items, rows)
            logits, tokens = decoded
            if len(sampling := [n for n, item in enumerate(items) if item.samples]) < len(items):
                at = self._indices(sampling)
                logits, tokens = logits[at], tokens[at]
            self._sample(logits, tokens, [items[n] for n in sampling], [rows[n] for n in sampling], out)
            return self.pipeline.sampled(out, items, rows)
        hidden, ends = self._hidden(items, previous, images), list(accumulate(item.num_tokens for item in items))
        if hidden is None:
            return self.pipeline.expected(items, rows)
        for item, row, end in zip(items, rows, ends, strict=True):
            if wants_prompt_logprobs(item, row):
                found = prompt_logprobs(self.model, self.vocabulary, hidden[end - item.num_tokens :], item, row)
                out.prompt_logprobs[item.request.request_id] = found
        if sampling := [n for n, item in enumerate(items) if item.samples]:
            every = len(sampling) == hidden.shape[0]
            last = hidden if every else hidden[self._indices([ends[n] - 1 for n in sampling])]
            self._sample(self.model.logits(last), None, [items[n] for n in sampling], [rows[n] for n in sampling], out)
        return self.pipeline.sampled(out, items, rows)

    def _replay(
        self, items: Items, rows: Sequence[SamplingRow], previous: StepTokens | None
    ) -> tuple[Tensor, Tensor] | StageState | None:
        """Logits and argmax of a decode step, or of a single prefill, or the next stage's state; None where no graph fits."""
        if self.graphs is None or any(map(wants_prompt_logprobs, items, rows)):
            return None
        if self.prompts is not None and len(items) == 1 and items[0].num_tokens > 1 and items[0].samples:
            return self.prompts.run(span(items[0]))
        if any(item.num_tokens > 1 for item in items):
            return None
        known = None if previous is None else previous.tokens
        return self.graphs.run([span(item) for item in items], known, sources(items, previous))

    def _hidden(self, items: Items, previous: StepTokens | None, images: ImageInput | None) -> Tensor | None:
        """Hidden states of all tokens of `items`; None where a later stage has them."""
        batch = self._batch([span(item) for item in items])
        last = [end - 1 for end in accumulate(item.num_tokens for item in items)]
        if pending := [pair for pair in zip(last, sources(items, previous), strict=True) if pair[1] >= 0]:
            assert previous is not None
            assert previous.tokens is not None
            at, source = (self._indices(part) for part in zip(*pending, strict=True))
            batch.input_ids[at] = previous.tokens[source]
        return self.step.forward(batch, images)

    def _indices(self, values: Sequence[int]) -> Tensor:
        return batches.to_device(values, torch.int64, self.platform.device)

    def _sample(
        self, logits: Tensor, greedy: Tensor | None, items: Items, rows: Sequence[SamplingRow], out: StepTokens
    ) -> None:
        ids = [item.request.request_id for item in items]
        if greedy is not None and self.tp.stages.count > 1:  # sent when the next replay may have overwritten it
            greedy = greedy.clone()
        sample_into(out, logits, greedy, ids, rows, self.vocabulary, self.histories)
