"""The contract between engine and model. The engine knows nothing else: no architecture, no layer, no array of a cache.

A model is `Model(config, tp, max_len, layers)`: its config, this tensor-parallel rank, the longest context, and its range of
layers (a pipeline stage; all by default). Loading fills it (octavo.weights.load) from the checkpoint paths of its modules, or
from the paths that its method `path` maps them to.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.images import Grid
from octavo.kvcache import KVCacheSpec, Layout, Views
from octavo.layers.vision import EncoderInput, ImageInput
from octavo.platform import Platform

__all__ = ["CalibratedModel", "FusedModel", "Head", "Limits", "Model", "ModelInput", "StageState", "VisionModel"]


class Limits(NamedTuple):
    """positions: the longest context. vocab_size: token ids are below it. eager: why decode steps cannot be captured, or None.

    warmup_lengths: of prompts. Together they launch every prefill kernel: few tokens, more, enough for other tiles.
    """

    positions: int
    vocab_size: int
    eager: str | None
    warmup_lengths: tuple[int, ...] = (16, 40, 600)


class ModelInput(NamedTuple):
    """Input of the first stage: x [T, hidden], and further tensors that a model's `embed` passes to its `forward`."""

    x: Tensor
    extras: tuple[Tensor, ...] = ()


class StageState(NamedTuple):
    """State between pipeline stages: the last layer's output and the residual, each [T, hidden], and the model's extras."""

    x: Tensor
    residual: Tensor
    extras: tuple[Tensor, ...] = ()

    def part(self, tokens: int) -> StageState:
        """That of the first `tokens` tokens."""
        return StageState(self.x[:tokens], self.residual[:tokens], tuple(extra[:tokens] for extra in self.extras))


class Head(Protocol):
    """Computes logits, and holds no other weights of the model. shape: of the whole matrix, [vocab, hidden]."""

    shape: tuple[int, int]

    def __call__(self, hidden: Tensor) -> Tensor: ...


class Model(Protocol):
    """The methods that every model has."""

    @property
    def ignored(self) -> Sequence[str]:
        """Globs of tensors in checkpoints that the model does not need."""

    @property
    def other_stages(self) -> Sequence[str]:
        """Those of `ignored` that other pipeline stages load."""

    def limits(self) -> Limits: ...

    def workspace_bytes(self, tokens: int) -> int:
        """An upper bound in bytes on the activations of a step of `tokens`, beside weights, cache and logits."""

    def kv_specs(self, kv_cache_dtype: str, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout) -> list[KVCacheSpec]:
        """The model's caches, any number of them. One block table indexes all.

        `kv_cache_dtype`: canonical, as in EngineConfig. dtype: the model's. fp8_dtype: the device's.
        """

    def cache_names(self) -> list[frozenset[str]]:
        """For each cache of `kv_specs`, the words by which --kv-cache-dtype-skip-layers means it: its layer's number, and
        sliding_window where attention has a window."""

    def bind_cache(self, views: Sequence[Views]) -> None:
        """Binds the caches, in the order of `kv_specs`."""

    def embed(self, ids: Tensor, images: ImageInput | None = None) -> ModelInput:
        """The input of token ids int64 [T]. `images`: what images bring to the step; a VisionModel's alone."""

    def forward(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState:
        """Hidden states [T, hidden] after the final norm; from a stage that is not the last, the next one's input."""

    def stage_input(self, tokens: int) -> StageState:
        """Zeros in the place of what the pipeline stage before gives for so many tokens, without extras."""

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the logits, [rows, part], in the model's dtype; -inf past the end of the vocabulary."""

    @property
    def head(self) -> Head:
        """The layer that computes `logits`."""

    def __call__(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState: ...


class CalibratedModel(Protocol):
    """A model whose FP8 cache has scales that are calibrated or come with the checkpoint."""

    def calibrate(self, run: Callable[[], object]) -> None:
        """Calls `run`, which puts a text through the model, and sets the scales from the largest values seen."""

    def kv_scales(self) -> tuple[list[Tensor], int]:
        """Two scales a layer, and the number of layers that have theirs from the checkpoint."""

    def set_key_rounding(self, read: Callable[[range], Sequence[tuple[Tensor, Tensor]]], *, check_only: bool) -> None:
        """Has FP8 caches that are bound from now on round keys by what `read` gives of layers by their numbers: influence and
        order, as in KeyRounding, of all KV heads. Where keys are rounded so already, these take the place of those before.

        check_only: changes nothing. Raises OctavoError where shapes are not the model's.
        """


class VisionModel(Model, Protocol):
    """A model of text and images. An image's tokens stand in the prompt; what the tower makes of it takes their places."""

    has_tower: bool  # whether it was made with its tower; without, it serves text alone

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features [F, W] in the model's dtype of the patches of images, FP32 [P, values], one behind the other.

        It is encoder_output(encoder_layers(encoder_input(patches, grids)), grids).
        """

    def encoder_input(self, patches: Tensor, grids: Sequence[Grid]) -> EncoderInput: ...

    def encoder_layers(self, given: EncoderInput) -> Tensor:
        """The tower's layers, whose launches depend on the numbers of patches and segments alone. The rows of further patches
        are behind those of the images'."""

    def encoder_steps(self, given: EncoderInput) -> Generator[None, None, Tensor]:
        """`encoder_layers`, which pauses behind each of `encoder_depth` layers."""

    @property
    def encoder_depth(self) -> int: ...

    def encoder_output(self, found: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features of what the layers gave, with or without the rows of further patches."""

    @property
    def feature_width(self) -> int:
        """W of `encode`: values of one image token."""

    def encoder_workspace_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """An upper bound in bytes on patches and activations of `encode` for images of so many tokens, on an accelerator."""

    def image_positions(self, images: Sequence[tuple[int, Grid]], start: int, stop: int) -> Tensor | None:
        """int64 [3, stop - start], on the host: positions in time, rows and columns of the tokens [start, stop) of a request.

        `images`: index of the first token, and grid, of each of the request's images in order. None: a token has one position,
        its index.
        """

    def warm_up_image(self) -> tuple[Tensor, Grid]:
        """Patches and grid of an image with which every kernel of the tower is launched."""


class FusedModel(Protocol):
    """A model that can compute some decode steps with fused kernels."""

    def fuse(self, platform: Platform) -> None:
        """Makes the fused decoder, if there is one. Called once, after the caches are bound and their scales set."""

    def unfuse(self) -> None:
        """Drops what `fuse` made, which holds references to weights and caches."""

    def graph_key(self, requests: int, longest: int) -> Hashable:
        """Key of a decode step with contexts up to `longest`. Steps with equal keys have equal launches."""
