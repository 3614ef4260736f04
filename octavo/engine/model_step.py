"""What graphs record of a step: its hidden states, its logits and the tokens chosen from them.

It knows the model and not the runner. The runner holds the graphs, and a graph what it records: were that a method of the
runner, they would hold each other, and an engine that nobody uses would keep its memory until Python looks for such cycles.
"""

from __future__ import annotations

from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.engine.vocabulary import Vocabulary
from octavo.models.interface import Model

__all__ = ["ModelStep"]


class ModelStep:
    """The computation of `model`, whose logits are of this rank's part of `vocabulary`."""

    def __init__(self, model: Model, vocabulary: Vocabulary):
        self.model, self.vocabulary = model, vocabulary

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, hidden]."""
        hidden = self.model(batch, self.model.embed(batch.input_ids))
        assert isinstance(hidden, Tensor), "one stage computes all layers"
        return hidden

    def decode(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """This rank's logits of single tokens, and the argmax over all ranks, which few steps do not want."""
        return self._chosen(self.hidden(batch))

    def prompt(self, batch: ForwardBatch, last: Tensor) -> tuple[Tensor, Tensor]:
        """As `decode`, of a prompt's last token, whose place is `last`, int64 [1]."""
        return self._chosen(self.hidden(batch)[last])

    def _chosen(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(hidden)
        return logits, self.vocabulary.argmax(logits)
