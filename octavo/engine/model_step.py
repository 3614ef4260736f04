"""The part of a step that graphs record: hidden states, logits and their argmax.

It is a class of its own, not a method of the runner. The runner holds the graphs and a graph holds what it records, so a
runner's method would form a reference cycle, and an unused engine would keep its memory until Python collects cycles.
"""

from __future__ import annotations

from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.engine.vocabulary import Vocabulary
from octavo.layers.vision import ImageInput
from octavo.models.interface import Model

__all__ = ["ModelStep"]


class ModelStep:
    """The computation of `model`, whose logits are this rank's part of `vocabulary`."""

    def __init__(self, model: Model, vocabulary: Vocabulary):
        self.model, self.vocabulary = model, vocabulary

    def hidden(self, batch: ForwardBatch, images: ImageInput | None = None) -> Tensor:
        """Hidden states [T, hidden]. `images`: what images bring to the step."""
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
