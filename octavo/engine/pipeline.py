"""Steps of an engine whose layers are split over pipeline stages, as one rank sees them.

Every rank schedules the same steps. A stage takes the state of each from the stage before, runs its layers and hands the state
on. The last stage samples and sends the tokens to all others, which wait for them where the engine takes a step's tokens. On
accelerators tokens also go back to the first stage from device to device, so that it computes them before any host reads them.
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
    """This rank's part of each step of a pipeline. Nothing is sent where one stage has all layers.

    ahead: whether steps compute tokens that no host has read.
    """

    def __init__(self, model: Model, tp: TensorParallel, pulse: Pulse, ahead: bool = False):
        self.model, self.rank, self.stages, self.pulse, self.ahead = model, tp.rank, tp.stages, pulse, ahead

    def connect(self) -> None:
        """Sends one message on each line between devices, for which the library makes buffers, before the cache takes the rest
        of the memory. All ranks call it at the same place."""
        stages = self.stages
        if stages.count == 1 or stages.device.type == "cpu":
            return
        word = torch.zeros(1, dtype=torch.int64, device=stages.device)
        if not stages.first:
            stages.receive(self.rank, stages.number - 1)
        if not stages.last:
            stages.send([word], self.rank, stages.number + 1)
        if stages.last:
            made = torch.Event(stages.device)
            made.record()
            stages.send_back(word, self.rank, made)
        elif stages.first:
            stages.receive_back(1, self.rank)

    def forward(self, batch: ForwardBatch) -> Tensor | None:
        """Hidden states [T, hidden] of the last stage; None of the others, which hand the state on."""
        state = self.arrived()
        out = self.model(batch, self.model.embed(batch.input_ids) if state is None else state)
        if isinstance(out, Tensor):
            return out
        self.hand_on(out)
        return None

    def arrived(self) -> StageState | None:
        """A step's state, for which this waits; None for the first stage, where a step begins."""
        stages = self.stages
        if stages.count > 1:
            self.pulse.enter(stages.number, stages.count)
        if stages.first:
            return None
        (x, residual), *extras = stages.receive(self.rank, stages.number - 1)
        return StageState(x, residual, tuple(extras))

    def hand_on(self, state: StageState) -> None:
        """Sends a step's state to the next stage. The next replay of a graph may overwrite `state`: what is sent is a copy."""
        self.stages.send([torch.stack(state[:2]), *(x.clone() for x in state.extras)], self.rank, self.stages.number + 1)
        self.pulse.pass_on()

    def sampled(self, out: StepTokens, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow]) -> StepTokens:
        """The output of a step whose tokens this stage has sampled, as `out`. The host does not wait for them here."""
        if self.stages.count == 1:
            return out
        told = [self._told(stage, items, rows) for stage in range(self.stages.count - 1)]
        if not self.ahead:
            self.tell(out, told)
            return out
        return _Sampled(**vars(out), pipeline=self, told=told)

    def tell(self, out: StepTokens, told: Sequence[int]) -> None:
        """Sends a step's tokens to the other stages, as much as `_told` says of each: rank 0, which answers requests, has what
        it said of probabilities, too."""
        tokens = torch.tensor(StepTokens.to_host(out), dtype=torch.int64)
        for stage, much in enumerate(told):
            if much:
                self.stages.send_numbers(tokens, self.rank, stage)
            if much > 1:
                said = pickle.dumps((out.logprobs, out.prompt_logprobs))  # read by a process of this engine
                self.stages.send([torch.frombuffer(bytearray(said), dtype=torch.uint8)], self.rank, stage)

    def expected(self, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow]) -> StepTokens:
        """The output of a step whose tokens the last stage sends."""
        if not (told := self._told(self.stages.number, items, rows)):
            return StepTokens()
        ids = [item.request.request_id for item in items if item.samples]
        return _Expected(rows={request_id: row for row, request_id in enumerate(ids)}, pipeline=self, told=told)

    def _told(self, stage: int, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow]) -> int:
        """How much the last stage sends to a stage's rank like this one: nothing, tokens, or also probabilities."""
        said = any(item.samples and row.params.logprobs is not None for item, row in zip(items, rows, strict=True))
        if stage == self.rank == 0 and (said or any(map(wants_prompt_logprobs, items, rows))):
            return 2
        return int(any(item.samples for item in items))


@dataclass
class _Expected(StepTokens):
    """Tokens that the last stage samples: `to_host` waits for them, and the first stage's device in `hand_back`."""

    pipeline: Pipeline | None = None
    told: int = 0

    def hand_back(self) -> None:
        assert self.pipeline is not None
        if self.tokens is None and self.pipeline.stages.first:
            self.tokens = self.pipeline.stages.receive_back(len(self.rows), self.pipeline.rank)

    def to_host(self) -> list[int]:
        if self._host is None:
            assert self.pipeline is not None
            stages = self.pipeline.stages
            last = self.pipeline.rank, stages.count - 1
            self._host = stages.receive_numbers(len(self.rows), *last)
            if self.told > 1:
                (data,) = stages.receive(*last)
                self.logprobs, self.prompt_logprobs = pickle.loads(bytes(data.tolist()))
        return self._host.tolist()


@dataclass
class _Sampled(StepTokens):
    """The output of a step of the last stage: `hand_back` sends the tokens that it has sampled on its device to the first
    stage's, and `to_host`, when this host has them, to all hosts.

    A step that samples nothing waits, too, since hosts take what they are told in the order of steps.
    """

    pipeline: Pipeline | None = None
    told: Sequence[int] = ()
    _went_back: bool = False
    _has_told: bool = False

    def hand_back(self) -> None:
        if not self._went_back:
            assert self.pipeline is not None
            assert self.tokens is not None
            self.pipeline.stages.send_back(self.tokens, self.pipeline.rank, self._copied)
            self._went_back = True

    def tell_early(self) -> bool:
        if not self._has_told and (self.tokens is None or (self._copied is not None and self._copied.query())):
            self.to_host()
        return self._has_told

    def to_host(self) -> list[int]:
        if not self._has_told:
            assert self.pipeline is not None
            self.pipeline.tell(self, self.told)
            self._has_told = True
        return super().to_host()
