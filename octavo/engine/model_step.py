"""The part of a step that graphs record: hidden states, logits and their argmax; of a pipeline stage, its layers.

It is a class of its own, not a method of the runner. The runner holds the graphs and a graph holds what it records, so a
runner's method would form a reference cycle, and an unused engine would keep its memory until Python collects cycles.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import cast

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.engine.pipeline import Pipeline
from octavo.engine.vocabulary import Vocabulary
from octavo.layers.vision import ImageInput
from octavo.models.interface import FusedModel, Model, StageState

__all__ = ["ModelStep"]


class ModelStep:
    """The computation of `model`, whose logits are this rank's part of `vocabulary`. pipeline: if it is a stage of one."""

    def __init__(self, model: Model, vocabulary: Vocabulary, pipeline: Pipeline | None = None):
        self.model, self.vocabulary, self.pipeline = model, vocabulary, pipeline
        self._inputs: StageState | None = None  # where graphs of a stage behind another read what it handed on

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

    def make_inputs(self, tokens: int) -> None:
        """Makes room for what the stage before hands on in a step of a graph, of up to so many tokens."""
        if self.pipeline is not None and not self.pipeline.stages.first:
            self._inputs = self.model.stage_input(tokens)

    def arrived(self) -> None:
        """Waits for what the stage before hands on, if there is one, and puts it where graphs read it. Rows behind it stay."""
        state = None if self.pipeline is None else self.pipeline.arrived()
        if state is not None:
            assert self._inputs is not None
            for to, x in zip(self._inputs[:2], state[:2], strict=True):
                to[: len(x)].copy_(x)

    def decode(self, batch: ForwardBatch) -> tuple[Tensor, Tensor] | StageState:
        """This rank's logits of a decode step, and the argmax over all ranks, which greedy requests use; or the next stage's
        state."""
        return self._chosen(self._computed(batch))

    def prompt(self, batch: ForwardBatch, last: Tensor) -> tuple[Tensor, Tensor] | StageState:
        """As `decode`, for the last token of a prompt, at index `last`, int64 [1]."""
        out = self._computed(batch)
        return out if isinstance(out, StageState) else self._chosen(out[last])

    def graph_key(self, requests: int, longest: int) -> Hashable:
        """The model's graph key. A model without one gets a graph for each bound on the context length."""
        return cast("FusedModel", self.model).graph_key(requests, longest) if hasattr(self.model, "graph_key") else longest

    def rehearse(self, batch: ForwardBatch) -> Tensor | None:
        """Computes a batch from states of no request, for its kernels' sake. Hidden states [T, hidden] of the last stage."""
        first = self.pipeline is None or self.pipeline.stages.first
        state = self.model.embed(batch.input_ids) if first else self.model.stage_input(batch.num_tokens)
        out = self.model(batch, state)
        return None if isinstance(out, StageState) else out

    def _computed(self, batch: ForwardBatch) -> Tensor | StageState:
        given = self.model.embed(batch.input_ids) if self._inputs is None else self._inputs.part(batch.num_tokens)
        return self.model(batch, given)

    def _chosen(self, out: Tensor | StageState) -> tuple[Tensor, Tensor] | StageState:
        if isinstance(out, StageState):
            return out
        logits = self.model.logits(out)
        return logits, self.vocabulary.argmax(logits)
