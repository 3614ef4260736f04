"""Qwen3-VL (arXiv:2511.21631): Qwen3 beside a vision tower, some of whose features are added behind the first text layers.

config.json has the text model's fields within `text_config`, checkpoints its layers below `model.language_model.`. A token has
three positions, in time, rows and columns; in text they are one, so text alone is rotated as Qwen3 is.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.layers.mrope import image_positions, rotary_rows
from octavo.layers.norm import LayerNorm
from octavo.layers.vision import (
    EncoderInput,
    Grid,
    ImageInput,
    PatchEmbedding,
    VisionAttention,
    VisionMLP,
    axial_angles,
    positions_of,
    resampled,
    segments_of,
    splice,
)
from octavo.models import qwen3
from octavo.models.common import Decoder, LayerStack
from octavo.models.config import check_fields, part_of
from octavo.models.dense import DenseDecoder
from octavo.models.interface import ModelInput, StageState
from octavo.models.with_images import WithImages
from octavo.weights import Loader

__all__ = ["Config", "Deepstack", "ImageFields", "Model", "WithTower", "text_of"]

NORM_EPS = 1e-6  # of the tower's norms, which config.json does not say
THETA = 10000.0  # of the tower's rotation, likewise
IMAGE, VIDEO = 151655, 151656  # the tokens in whose places features go, where config.json does not say them
SECTIONS = (24, 20, 20)  # of a head's pairs: how many are rotated by time, rows and columns


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    in_channels: int = 3
    deepstack_visual_indexes: Sequence[int] = ()

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Of config.json's `vision_config`. Raises OctavoError, naming the field, for one that is missing or wrong."""
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        check_fields(cls, values, spelled="vision_config.{}".format)
        made = cls(**values)
        indexes, side = made.deepstack_visual_indexes, math.isqrt(made.num_position_embeddings)
        if not (isinstance(indexes, list | tuple) and all(type(i) is int and 0 <= i < made.depth for i in indexes)):
            raise OctavoError(f"config.json: vision_config.deepstack_visual_indexes must list layers, not {indexes!r}.")
        if made.hidden_size % (4 * made.num_heads):
            raise OctavoError("config.json: vision_config.hidden_size must be a multiple of 4 times its num_heads.")
        if side**2 != made.num_position_embeddings:
            raise OctavoError("config.json: vision_config.num_position_embeddings must be a square number.")
        return made

    @property
    def side(self) -> int:
        """Of the square of learned positions."""
        return math.isqrt(self.num_position_embeddings)


class Block(nn.Module):
    def __init__(self, c: VisionConfig, tp: TensorParallel):
        super().__init__()
        sizes = c.hidden_size, c.intermediate_size, c.hidden_size
        self.norm1, self.norm2 = LayerNorm(c.hidden_size, NORM_EPS), LayerNorm(c.hidden_size, NORM_EPS)
        self.attn = VisionAttention("qkv", "proj", c.hidden_size, c.num_heads, tp)
        self.mlp = VisionMLP("linear_fc1", "linear_fc2", sizes, "tanh", tp)

    def forward(
        self, x: Tensor, residual: Tensor | None, segments: ops.Segments, rotation: ops.Rotation
    ) -> tuple[Tensor, Tensor]:
        """The output, to which the residual, the second result, is still to be added."""
        normed, residual = ops.layer_norm(x, self.norm1.norm, residual, self.attn.readers)
        x = self.attn(normed, segments, rotation)
        normed, residual = ops.layer_norm(x, self.norm2.norm, residual, self.mlp.readers)
        return self.mlp(normed), residual


class PatchMerger(VisionMLP):
    """One token of each square of adjacent patches; `after`: they are normed when they are joined, not each by itself."""

    def __init__(self, c: VisionConfig, tp: TensorParallel, *, after: bool):
        joined = c.hidden_size * c.spatial_merge_size**2
        super().__init__("linear_fc1", "linear_fc2", (joined, joined, c.out_hidden_size), "none", tp)
        self.joined, self.after = joined, after
        self.norm = LayerNorm(joined if after else c.hidden_size, NORM_EPS)

    def merge(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """[P / merged, out_hidden_size] of the sum of x and residual [P, hidden], and the sum."""
        readers = self.readers if self.after else ()  # codes of patches would have a scale each, not one for the joined row
        rows, added = (None if given is None else given.reshape(-1, self.norm.size) for given in (x, residual))
        assert rows is not None
        normed, total = ops.layer_norm(rows, self.norm.norm, added, readers)
        joined = normed if self.after else normed.values().view(-1, self.joined)
        return self(joined), total.view(x.shape)


class PositionTable(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.side, self.hidden = c.side, c.hidden_size

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", (self.side**2, self.hidden)).view(self.side, self.side, self.hidden)


class Embedding(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.proj = PatchEmbedding((c.hidden_size, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size))


class Tower(nn.Module):
    def __init__(self, c: VisionConfig, tp: TensorParallel):
        super().__init__()
        self.config = c
        self.patch_embed, self.pos_embed = Embedding(c), PositionTable(c)
        self.blocks = nn.ModuleList(Block(c, tp) for _ in range(c.depth))
        self.merger = PatchMerger(c, tp, after=False)
        self.deepstack_merger_list = nn.ModuleList(PatchMerger(c, tp, after=True) for _ in c.deepstack_visual_indexes)

    def embed(self, patches: Tensor, grids: Sequence[Grid]) -> EncoderInput:
        """Of patches [P, values] in the order of `positions_of`."""
        c = self.config
        places = positions_of(grids, c.spatial_merge_size, patches.device)
        rotation = axial_angles(places, c.hidden_size // c.num_heads, THETA)
        x: Tensor = self.patch_embed.proj(patches)
        tables = [resampled(self.pos_embed.weight, grid, "bilinear", align_corners=True) for grid in grids]
        own = places.split([grid.patches for grid in grids])
        learned = [table[at[:, 0], at[:, 1]] for table, at in zip(tables, own, strict=True)]
        x = x + torch.cat(learned).to(x.dtype)
        segments = [grid.rows * grid.columns for grid in grids for _ in range(grid.frames)]
        return EncoderInput(x, rotation, segments_of(segments, x.device))

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    def steps(self, given: EncoderInput) -> Generator[None, None, Tensor]:
        """Features [P / merged, (1 + deepstack) * out_hidden_size], of a generator that pauses behind each layer."""
        x, rotation, segments = given
        indexes = self.config.deepstack_visual_indexes
        residual: Tensor | None = None
        deep = []
        for number, block in enumerate(self.blocks):
            x, residual = block(x, residual, segments, rotation)
            if number in indexes:
                merger = self.deepstack_merger_list[indexes.index(number)]
                assert isinstance(merger, PatchMerger)
                (features, x), residual = merger.merge(x, residual), None
                deep.append(features)
            yield
        return torch.cat([self.merger.merge(x, residual)[0], *deep], 1)


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's fields and the tower's; whether its head is its embedding is said beside them. Raises OctavoError."""
    text, vision = part_of(config, "text_config"), part_of(config, "vision_config")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    sections = rope.get("mrope_section") if isinstance(rope, Mapping) else None
    return {
        **text, "tie_word_embeddings": config.get("tie_word_embeddings"), "vision": VisionConfig.from_json(vision),
        "image_token_id": config.get("image_token_id"), "video_token_id": config.get("video_token_id"), "sections": sections,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageFields:
    """What `text_of` adds to a text model's fields."""

    vision: VisionConfig
    image_token_id: int = IMAGE
    video_token_id: int = VIDEO
    sections: Sequence[int] = SECTIONS


@dataclass(frozen=True, kw_only=True)
class Config(ImageFields, qwen3.Config):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        return super().from_json(text_of(config))


class Deepstack(Decoder):
    """Adds features of the tower's layers behind the first text layers."""

    def after_layer(self, number: int, residual: Tensor | None, state: ModelInput | StageState) -> Tensor | None:
        deep = state.extras[1:]
        return residual + deep[number] if residual is not None and number < len(deep) else residual


class DenseDeepstack(Deepstack, DenseDecoder):
    pass


def rotated(batch: ForwardBatch, state: ModelInput | StageState) -> ForwardBatch:
    """The batch whose tokens have the rows that images brought."""
    if not state.extras:
        return batch
    return replace(batch, rotary_table=state.extras[0], rotary_rows=torch.arange(batch.num_tokens, device=state.x.device))


class WithTower(WithImages):
    """What Qwen3-VL's dense model and its mixture add to their text models."""

    stored_at: ClassVar[Mapping[str, str]] = {"model": "model.language_model", "visual": "model.visual"}
    tower_names = ("visual",)
    config: Any

    @staticmethod
    def make_tower(c: Any, tp: TensorParallel) -> Sequence[nn.Module]:
        return [Tower(c.vision, tp)]

    def encoder_output(self, found: Tensor, grids: Sequence[Grid]) -> Tensor:
        return found[: sum(grid.patches for grid in grids) // self.config.vision.spatial_merge_size**2]

    @property
    def feature_width(self) -> int:
        vision = self.config.vision
        return int((1 + len(vision.deepstack_visual_indexes)) * vision.out_hidden_size)

    def image_positions(self, images: Sequence[tuple[int, Grid]], start: int, stop: int) -> Tensor | None:
        return image_positions(images, self.config.vision.spatial_merge_size, start, stop)

    def with_features(self, x: Tensor, images: ImageInput) -> ModelInput:
        """Beside the embeddings: rows of cosines and sines, and for each of the first layers what is added behind it."""
        first, *deep = images.features.split(self.config.vision.out_hidden_size, 1)
        assert images.positions is not None
        table = self.attention_layers()[0].rotary.cos_sin  # type: ignore[attr-defined]
        rows = rotary_rows(table, images.positions, self.config.sections)
        added = [splice(torch.zeros_like(x), images.places, one) for one in deep]
        return ModelInput(splice(x, images.places, first), (rows, *added))

    def forward(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState:
        out: Tensor | StageState = super().forward(rotated(batch, state), state)  # type: ignore[misc]
        return out


class Model(WithTower, qwen3.Model):
    config: Config

    def make_decoder(self, layers: LayerStack) -> Decoder:
        return DenseDeepstack(self.config, self.tp, layers)
