"""Compiles the kernels of a start ahead of it and without a device, for an image.

A `Rehearsal` is a runner whose tensors have no memory. It takes the steps that a start takes before it captures graphs, so the
same wrappers choose the same kernels with the same arguments; what they would compile becomes a list of jobs. Forked processes
do them, since Triton holds Python's lock for a part of each compilation, and keep the results in the user's caches, where the
start finds them: by the same keys, because these are made of the source, the arguments' types and the options alone.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import cast

from torch import nn

from octavo.config import EngineConfig
from octavo.distributed import TensorParallel, Unheard
from octavo.engine.loading import make_loader, open_source, rules_of
from octavo.engine.runner import ModelRunner
from octavo.ops import ahead
from octavo.ops.ahead import Job, Jobs
from octavo.ops.triton.launch import describe_device
from octavo.platform import Described
from octavo.quant.stored_format import stored_format_of
from octavo.weights import SafetensorsSource, load
from octavo.weights.meta import MetaSource

__all__ = ["Rehearsal", "compile_in_processes", "rehearsing"]

WORD = 4  # bytes of a job's number


class Rehearsal(ModelRunner):
    """A runner on a device that is described, as rank 0 of its engine."""

    def __init__(self, config: EngineConfig, device: Described):
        size, self.described = config.tensor_parallel_size, device
        alone = TensorParallel() if size == 1 else TensorParallel(0, size, Unheard(), config.enable_expert_parallel)
        ranks = replace(alone, whole_towers=config.mm_encoder_tp_mode == "data")
        super().__init__(
            replace(config, threads=1), found=(device, ranks)
        )  # a process with several threads is not to be forked

    def load_weights(self) -> None:
        config = self.config
        source = open_source(config, self.directory)
        if isinstance(source, SafetensorsSource):
            described = stored_format_of(self.json_config, self.directory)
            announced = MetaSource(source.checkpoint.tensors, described=described)
            source.close()
        else:
            announced = MetaSource({}, source.stored_format, has_any=True)
        loader = make_loader(announced, rules_of(config), config, self.platform, self.dtype, self.tp)
        load(cast("nn.Module", self.model), loader, self.model.ignored, None, elsewhere=self.model.other_stages)
        self.report = loader.report
        self.platform = replace(self.described, free=self.described.free - self.report.total("held"))

    def _set_kv_scales(self) -> None: ...

    def _check_first_logits(self) -> None: ...


@contextmanager
def rehearsing(device: Described) -> Iterator[Jobs]:
    """The context of rehearsals on `device`, and the jobs that they collect. A process has one such device."""
    with ahead.collecting() as jobs:
        ahead.collect("utilities", describe_device(device))
        yield jobs


def compile_in_processes(jobs: Sequence[Job], count: int) -> int:
    """Does the jobs in `count` forked processes. Returns how many failed; stderr says why."""
    read, write = os.pipe()
    children = []
    for _ in range(min(count, len(jobs))):
        if not (child := os.fork()):
            os.close(write)  # whoever reads the pipe's end has nothing more to do
            os._exit(min(255, _work(read, jobs)))
        children.append(child)
    os.close(read)
    with (
        os.fdopen(write, "wb", buffering=0) as numbers,
        suppress(BrokenPipeError),
    ):  # where no process is left, exit codes say so
        for number in range(len(jobs)):  # the pipe holds so many, and the rest waits for readers
            numbers.write(number.to_bytes(WORD, "big"))
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _work(numbers: int, jobs: Sequence[Job]) -> int:
    failed = 0
    while word := os.read(numbers, WORD):
        try:
            jobs[int.from_bytes(word, "big")]()
        except Exception:
            traceback.print_exc()
            failed += 1
    return failed
