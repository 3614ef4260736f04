"""What the engine asks of a model, and nothing else: it knows no architecture, no layer and no array of a cache.

A model is `Model(config, tp, max_len, layers)`: its config, this rank among those that split it, the longest context, and the
range of layers that it has (a stage of a pipeline; all by default). Loading fills it (octavo.weights.load), from the paths that
its modules have or, where checkpoints have them elsewhere, from what its method `path` makes of those.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import KVCacheSpec, Layout, Views
from octavo.platform import Platform

__all__ = ["CalibratedModel", "FusedModel", "Head", "Limits", "Model", "ModelInput", "StageState"]


class Limits(NamedTuple):
    """positions: the longest context. vocab_size: ids are under it. eager: why decode steps may not be captured, or None.

    prompts: lengths of prompts that launch all that prompts do, few tokens, more, and enough for other tiles.
    """

    positions: int
    vocab_size: int
    eager: str | None
    prompts: tuple[int, ...] = (16, 40, 600)


class ModelInput(NamedTuple):
    """What the first stage of a step begins with: x [T, hidden], and what else a model's `embed` hands to its `forward`."""

    x: Tensor
    extras: tuple[Tensor, ...] = ()


class StageState(NamedTuple):
    """What a stage of a pipeline hands to the next: the last layer's output and the residual, each [T, hidden]."""

    x: Tensor
    residual: Tensor
    extras: tuple[Tensor, ...] = ()


class Head(Protocol):
    """What computes logits; it holds no other weights of the model. shape: the whole matrix's, [vocab, hidden]."""

    shape: tuple[int, int]

    def __call__(self, hidden: Tensor) -> Tensor: ...


class Model(Protocol):
    """What every model does."""

    @property
    def ignored(self) -> Sequence[str]:
        """Globs of tensors that checkpoints hold and the model does not need."""

    def limits(self) -> Limits: ...

    def workspace_bytes(self, tokens: int) -> int:
        """A bound on the bytes of activations that a step of so many tokens takes, beside weights, cache and logits."""

    def kv_specs(self, kv_cache_dtype: str, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout) -> list[KVCacheSpec]:
        """The caches that the model wants, as many as it likes; all are indexed by one block table.

        `kv_cache_dtype`: canonical, as EngineConfig has it. dtype: the model's. fp8_dtype: the device's.
        """

    def bind_cache(self, views: Sequence[Views]) -> None:
        """Takes the caches, in the order of `kv_specs`."""

    def embed(self, ids: Tensor, features: Tensor | None = None) -> ModelInput:
        """The input of token ids int64 [T]; `features` are the encoder's, for the places in the prompt that hold them."""

    def forward(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState:
        """Hidden states [T, hidden] after the last norm; from a stage that is not the last, what the next one begins with."""

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the vocabulary, [rows, part], in the model's dtype; behind the vocabulary's end it is -inf."""

    @property
    def head(self) -> Head:
        """What computes `logits`."""

    def __call__(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState: ...


class CalibratedModel(Protocol):
    """A model whose FP8 cache has scales that are measured, or come with the checkpoint."""

    def calibrate(self, run: Callable[[], object]) -> None:
        """Calls `run`, which puts a text through the model, and keeps the scales of the largest values that it saw."""

    def kv_scales(self) -> tuple[list[Tensor], bool]:
        """The scales, and whether all of them are the checkpoint's."""


class FusedModel(Protocol):
    """A model that may compute some decode steps in fewer launches than op by op."""

    def fuse(self, platform: Platform) -> None:
        """Makes what does. Called once, when the caches are bound and their scales settled."""

    def unfuse(self) -> None:
        """Forgets what `fuse` made, which holds weights and caches."""

    def graph_key(self, requests: int, longest: int) -> Hashable:
        """Of steps of single tokens with contexts up to `longest`: where it is equal, they launch the same."""
