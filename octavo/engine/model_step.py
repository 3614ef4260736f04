"""The part of a step that graphs record: hidden states, logits and their argmax.

It is a class of its own, not a method of the runner. The runner holds the graphs and a graph holds what it records, so a
runner's method would form a reference cycle, and an unused engine would keep its memory until Python collects cycles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.engine.pipeline import Pipeline
from octavo.engine.vocabulary import Vocabulary
from octavo.layers.vision import ImageInput
from octavo.models.interface import Model

__all__ = ["ModelStep"]


class ModelStep:
    """The computation of `model`, whose logits are this rank's part of `vocabulary`. pipeline: if it is a stage of one."""

    def __init__(self, model: Model, vocabulary: Vocabulary, pipeline: Pipeline | None = None):
        self.model, self.vocabulary, self.pipeline = model, vocabulary, pipeline

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, images: ImageInput | None = None) -> Tensor | None:
        """Hidden states [T, hidden]; None where a later stage has them. `images`: what images bring to the step."""
        if self.pipeline is None or self.pipeline.stages.count == 1:
            return self.hidden(batch, images)
        return self.pipeline.forward(batch)

    def hidden(self, batch: ForwardBatch, images: ImageInput | None = None) -> Tensor:
        """As `forward`, where one stage has all layers."""
        hidden = self.model(batch, self.model.embed(batch.input_ids, images))
        assert isinstance(hidden, Tensor), "one stage computes all layers"
        return hidden

    def decode(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """This rank's logits of a decode step, and the argmax over all ranks, which greedy requests use."""
        return self._chosen(self.hidden(batch))

    def prompt(self, batch: ForwardBatch, last: Tensor) -> tuple[Tensor, Tensor]:
        """As `decode`, for the last token of a prompt, at index `last`, int64 [1]."""
        return self._chosen(self.hidden(batch)[last])

    def _chosen(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(hidden)
        return logits, self.vocabulary.argmax(logits)
