"""Weights of another checkpoint in the place of a loaded model's, and no weights at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from octavo.config import EngineConfig
from octavo.distributed import TensorParallel, Unheard
from octavo.engine.loading import load_model
from octavo.errors import OctavoError, shortage
from octavo.messages import Progress
from octavo.models import read_config, same_architecture
from octavo.models.interface import Model
from octavo.platform import Platform
from octavo.quant.checks import check_format
from octavo.weights import LoadReport
from octavo.weights.in_place import held, overwrite, rehearse

__all__ = ["check_reload", "drop", "reload_model", "restore"]

ALONE = TensorParallel()


def check_reload(
    model: Model,
    config: EngineConfig,
    loaded: Mapping[str, Any],
    platform: Platform,
    dtype: torch.dtype,
    progress: Progress | None = None,
    tp: TensorParallel = ALONE,
) -> None:
    """Reads the whole checkpoint of `config` as `reload_model` will, and writes no weight. `loaded`: the model's config.json.

    Raises OctavoError, the same on every rank, where config.json, shapes or schemes differ or something cannot be read. Each
    rank reads alone: one that fails in the middle would leave the others waiting in a collective.
    """
    directory, fault = Path(config.model), ""
    try:
        json_config = read_config(directory)
        check_format(json_config, directory)
        if not same_architecture(json_config, loaded):
            raise OctavoError(f"{directory} has another config.json than the model that is loaded; start the model anew.")
        alone = tp if tp.engine.size == 1 else replace(tp, group=Unheard(), everyone=None)
        load_model(model, config, platform, dtype, progress, alone, put=rehearse)
    except OctavoError as error:
        fault = str(error)
    except Exception as error:  # a file that changes while it is read has no end of ways to fail
        fault = shortage(error) or f"{directory} cannot be read ({type(error).__name__}: {error}); write it anew."
    for rank, sentence in enumerate(tp.engine.sentences(fault)):
        if sentence:
            raise OctavoError(sentence if tp.engine.size == 1 or sentence == fault else f"Rank {rank}: {sentence}")


def reload_model(
    model: Model,
    config: EngineConfig,
    platform: Platform,
    dtype: torch.dtype,
    progress: Progress | None = None,
    tp: TensorParallel = ALONE,
) -> tuple[LoadReport, bool]:
    """Writes the weights of a checkpoint that `check_reload` has passed over those of `model`. False where not all could be
    written in place.

    RuntimeError where it cannot be read any more: the weights are then those of two models, or ranks wait for one another.
    """
    try:
        return load_model(model, config, platform, dtype, progress, tp, put=overwrite)
    except OctavoError as error:
        raise RuntimeError(f"{config.model} has changed while its weights were loaded: {error}") from error


def drop(model: Model) -> None:
    """Frees the weights of a loaded model."""
    for module in cast("nn.Module", model).modules():
        for name in held(module):
            delattr(module, name)


def restore(load: Callable[[EngineConfig], None], before: EngineConfig, refusal: OctavoError) -> None:
    """Loads the weights `before` a refused reload again. Raises RuntimeError, which ends the engine, where they cannot be had.

    A directory that was rewritten and is loaded again has no others to go back to.
    """
    try:
        load(before)
    except OctavoError:
        raise RuntimeError(f"{refusal} The weights before them are no longer in {before.model}.") from refusal
