"""Steps of an engine whose layers are split over pipeline stages, as one rank sees them.

Every rank schedules the same steps. A stage takes the state of each from the stage before, runs its layers and hands the state
on. The last stage samples and sends the tokens to all others, which wait for them where the engine takes a step's tokens.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.engine.place import Pulse
from octavo.engine.prompt_logprobs import wants_prompt_logprobs
from octavo.engine.sampling_row import SamplingRow
from octavo.engine.sequence import ScheduledRequest
from octavo.engine.step_tokens import StepTokens
from octavo.errors import OctavoError
from octavo.models.interface import Model, StageState

__all__ = ["Pipeline", "check_pipeline"]


def check_pipeline(model: Model, tp: TensorParallel, skipped: Sequence[str]) -> None:
    """Raises OctavoError for what several stages do not serve. skipped: of --kv-cache-dtype-skip-layers."""
    if tp.stages.count == 1:
        return
    if getattr(model, "has_tower", False):
        raise OctavoError(
            "--pipeline-parallel-size serves text alone: images are not passed between stages; add --language-model-only, or "
            "use --tensor-parallel-size instead."
        )
    if skipped:
        raise OctavoError(
            "--kv-cache-dtype-skip-layers is not served with --pipeline-parallel-size, whose stages would differ in their "
            "caches; leave one of them out."
        )


class Pipeline:
    """This rank's part of each step of a pipeline. Nothing is sent where one stage has all layers."""

    def __init__(self, model: Model, tp: TensorParallel, pulse: Pulse):
        self.model, self.rank, self.stages, self.pulse = model, tp.rank, tp.stages, pulse

    def forward(self, batch: ForwardBatch) -> Tensor | None:
        """Hidden states [T, hidden] of the last stage; None of the others, which hand the state on."""
        stages = self.stages
        self.pulse.enter(stages.number, stages.count)
        if stages.first:
            out = self.model(batch, self.model.embed(batch.input_ids))
        else:
            x, residual, *extras = stages.receive(self.rank, stages.number - 1)
            out = self.model(batch, StageState(x, residual, tuple(extras)))
        if isinstance(out, Tensor):
            return out
        stages.send([out.x, out.residual, *out.extras], self.rank, stages.number + 1)
        self.pulse.pass_on()
        return None

    def tell(self, out: StepTokens, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow]) -> None:
        """Sends a step's tokens to the other stages, and to rank 0, which answers requests, what it said of probabilities."""
        if self.stages.count == 1:
            return
        tokens = torch.tensor(out.to_host(), dtype=torch.int64)
        for stage in range(self.stages.count - 1):
            if told := self._told(stage, items, rows):
                message = [tokens]
                if told > 1:
                    said = pickle.dumps((out.logprobs, out.prompt_logprobs))  # read by a process of this engine
                    message.append(torch.frombuffer(bytearray(said), dtype=torch.uint8))
                self.stages.send(message, self.rank, stage)

    def expected(self, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow]) -> StepTokens:
        """The output of a step whose tokens the last stage sends."""
        return _Expected(pipeline=self) if self._told(self.stages.number, items, rows) else StepTokens()

    def _told(self, stage: int, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow]) -> int:
        """How much the last stage sends to a stage's rank like this one: nothing, tokens, or also probabilities."""
        said = any(item.samples and row.params.logprobs is not None for item, row in zip(items, rows, strict=True))
        if stage == self.rank == 0 and (said or any(map(wants_prompt_logprobs, items, rows))):
            return 2
        return int(any(item.samples for item in items))


@dataclass
class _Expected(StepTokens):
    """Tokens that the last stage samples: `to_host` waits for them."""

    pipeline: Pipeline | None = None

    def to_host(self) -> list[int]:
        if self._host is None:
            assert self.pipeline is not None
            stages = self.pipeline.stages
            self._host, *said = stages.receive(self.pipeline.rank, stages.count - 1)
            for data in said:
                self.logprobs, self.prompt_logprobs = pickle.loads(bytes(data.tolist()))
        return self._host.tolist()
