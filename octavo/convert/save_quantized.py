"""A quantized copy of a checkpoint, written once: what --save-quantized does.

It is written before the model is loaded, and the model is then loaded from it: the first start and those after it read the
same codes, no more memory is needed than for either, and a start that is broken off leaves files the next one continues with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from octavo.convert.cache_scales import scales_to_measure
from octavo.convert.calibration import LayerLosses, Stash, calibrate, stash_bytes
from octavo.convert.output_config import quantization_config
from octavo.convert.output_directory import OutputDirectory
from octavo.convert.quantize_plan import Plan
from octavo.convert.quantizer import job_of, output_files, remaining, write_files
from octavo.errors import OctavoError
from octavo.files import KEY_ROUNDING
from octavo.models.overrides import overridden
from octavo.platform import Platform
from octavo.quant import QuantRules
from octavo.weights.checkpoint import Checkpoint, RowReader, Scratch

__all__ = ["save_quantized"]

FLAG = "--save-quantized"


def save_quantized(
    model: Path,
    config: Mapping[str, Any],
    output: Path,
    rules: QuantRules,
    platform: Platform,
    threads: int,
    progress: Callable[[float], None] | None = None,
    windows: Sequence[Sequence[int]] = (),
    overrides: Mapping[str, Any] | None = None,
) -> str:
    """Makes `output` the checkpoint `model` (whose config.json holds `config`) quantized as `rules` say, and says what it did.

    windows: token ids to calibrate by, if any, on `platform`, as the model with `overrides` computes, which config.json does
    not get: who reads it is given them again. A head that is tied to the embeddings stays as it is there, and
    is quantized by the start that reads it. Writes nothing where an earlier start finished the same. Raises OctavoError for a
    directory that holds something else, for a checkpoint whose stored FP8 codes are of another scheme than is asked for, and
    for one that has nothing to calibrate.
    """
    here, platform = platform, replace(platform, fp8_dtype=torch.float8_e4m3fn)  # the dtype that checkpoints have
    with closing(Checkpoint(model)) as checkpoint:
        tied = rules.quantize_lm_head and config.get("tie_word_embeddings") is True
        own = replace(rules, used=set(), quantize_lm_head=rules.quantize_lm_head and not tied)
        computed = overridden(config, overrides) if windows else config
        scales = scales_to_measure(checkpoint, computed, None) if windows else None
        plan = Plan(checkpoint, RowReader(checkpoint, platform, Scratch()), dict(config), own, cache_scales=scales)
        if other := next((piece for piece in plan.pieces if piece.stored and not piece.is_kept), None):
            assert other.stored is not None
            raise OctavoError(
                f"{FLAG}: {model} stores {other.module} as {other.stored.name} already, whose codes a start keeps; "
                "leave the option out, or convert the checkpoint with octavo quantize."
            )
        if windows:
            plan.check_rounds("--calibrate", by_text=True)
        job, beside = job_of(own, False, windows=windows, overrides=overrides), stash_bytes(plan, computed, windows)
        directory = OutputDirectory(output, checkpoint, output_files(plan, output), job, FLAG, beside)
        if directory.is_complete():
            return f"weights taken from {output}, which an earlier start made of {model}"
        with directory:
            stash = Stash(directory.stash) if windows else None
            if stash is not None:
                calibrate(plan, computed, windows, here, stash, threads, _told_of_layers(progress))
            write_files(plan, directory, platform, False, threads, _Told(remaining(plan, directory), progress), stash)
            if stash is not None:
                stash.write_key_rounding(output / KEY_ROUNDING)
            by = "" if stash is None or scales is None else f", {stash.said_of(plan, windows)}; {stash.said_of_scales(scales)}"
            directory.finish(config, quantization_config(plan))
        kept = "; the embeddings, which are the head too, stay BF16 there and are quantized at each start" if tied else ""
        return f"quantized weights saved in {output}{by}, from where the next start takes them{kept}"


def _told_of_layers(progress: Callable[[float], None] | None) -> Callable[[int, int, LayerLosses], None]:
    """What calibrates tells of each layer, as the part that is done."""
    return lambda number, count, losses: progress((number + 1) / count) if progress else None


class _Told:
    """Tells a function the part that is done."""

    def __init__(self, total: int, progress: Callable[[float], None] | None):
        self.total, self.done, self.progress = total, 0, progress

    def start(self, name: str) -> None:
        if self.progress is not None and self.total:
            self.progress(self.done / self.total)

    def advance(self, nbytes: int) -> None:
        self.done += nbytes  # a lost update of two threads would show nothing a person could see
