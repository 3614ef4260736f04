"""Qwen3-VL (arXiv:2511.21631): Qwen3 beside a vision tower, some of whose features are added behind the first text layers.

config.json has the text model's fields within `text_config`, checkpoints its layers below `model.language_model.`. A token has
three positions, in time, rows and columns; in text they are one, so text alone is rotated as Qwen3 is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.layers.norm import LayerNorm
from octavo.layers.vision import (
    AxialAngles,
    Grid,
    ImageInput,
    PatchEmbedding,
    VisionAttention,
    VisionMLP,
    axial_angles,
    layer_norm,
    positions_of,
    resampled,
    splice,
)
from octavo.models import qwen3
from octavo.models.common import Decoder, LayerStack
from octavo.models.config import check_fields, part_of
from octavo.models.dense import DenseDecoder
from octavo.models.interface import ModelInput, StageState
from octavo.weights import Loader

__all__ = ["Config", "Deepstack", "ImageFields", "Model", "WithTower", "positions", "text_of"]

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

    def forward(self, x: Tensor, segments: Sequence[int], angles: AxialAngles) -> Tensor:
        x = x + self.attn(layer_norm(x, self.norm1.norm), segments, angles)
        y: Tensor = x + self.mlp(layer_norm(x, self.norm2.norm))
        return y


class PatchMerger(VisionMLP):
    """One token of each square of adjacent patches; `after`: they are normed when they are joined, not each by itself."""

    def __init__(self, c: VisionConfig, tp: TensorParallel, *, after: bool):
        joined = c.hidden_size * c.spatial_merge_size**2
        super().__init__("linear_fc1", "linear_fc2", (joined, joined, c.out_hidden_size), "none", tp)
        self.joined = joined
        self.norm = LayerNorm(joined if after else c.hidden_size, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[P / merged, out_hidden_size] of x [P, hidden]."""
        normed = layer_norm(x.reshape(-1, self.norm.size), self.norm.norm)
        return super().forward(normed.view(-1, self.joined))


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

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features [P / merged, (1 + deepstack) * out_hidden_size] of patches [P, values] in the order of `positions_of`."""
        c = self.config
        places = positions_of(grids, c.spatial_merge_size, patches.device)
        angles = axial_angles(places, c.hidden_size // c.num_heads, THETA)
        x = self.patch_embed.proj(patches)
        tables = [resampled(self.pos_embed.weight, grid, "bilinear", align_corners=True) for grid in grids]
        own = places.split([grid.patches for grid in grids])
        learned = [table[at[:, 0], at[:, 1]] for table, at in zip(tables, own, strict=True)]
        x = x + torch.cat(learned).to(x.dtype)
        segments = [grid.rows * grid.columns for grid in grids for _ in range(grid.frames)]
        deep = []
        for number, block in enumerate(self.blocks):
            x = block(x, segments, angles)
            if number in c.deepstack_visual_indexes:
                deep.append(self.deepstack_merger_list[c.deepstack_visual_indexes.index(number)](x))
        return torch.cat([self.merger(x), *deep], 1)


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


def positions(ids: Sequence[int], grids: Sequence[Grid], c: Any) -> tuple[Tensor, int]:
    """int64 [3, T], a token's positions in time, rows and columns, and what later tokens' positions are more than their places.

    grids: of the images in the order in which their tokens stand; each frame of a clip is an image of its own.
    """
    merge, found, start, at = c.vision.spatial_merge_size, [], 0, 0
    left = iter(grids)
    while at < len(ids):
        if ids[at] not in (c.image_token_id, c.video_token_id):
            found.append(torch.full((3, 1), start))
            at, start = at + 1, start + 1
            continue
        grid = next(left)
        rows, columns = grid.rows // merge, grid.columns // merge
        row, column = positions_of([Grid(1, rows, columns)], 1, torch.device("cpu")).unbind(1)
        found.append(torch.stack([torch.zeros_like(row), row, column]) + start)
        at, start = at + rows * columns, start + max(rows, columns)
    return torch.cat(found, 1), start - len(ids)


def with_images(model: Any, x: Tensor, ids: Tensor, given: ImageInput) -> ModelInput:
    """Embeddings, features in the places of image tokens; beside them rows of cosines and sines, and what text layers add."""
    c = model.config
    at = (ids == c.image_token_id) | (ids == c.video_token_id)
    first, *deep = given.features.split(c.vision.out_hidden_size, 1)
    x = splice(x, at, first)
    added = [splice(torch.zeros_like(x), at, one) for one in deep]
    table = model.attention_layers()[0].rotary.cos_sin
    pair = torch.arange(table.shape[1], device=ids.device) % (table.shape[1] // 2)
    axis = torch.zeros_like(pair)
    for number in (1, 2):
        axis[(pair % 3 == number) & (pair < 3 * c.sections[number])] = number
    rows = table[given.positions.to(ids.device)[axis].T, torch.arange(table.shape[1], device=ids.device)]
    return ModelInput(x, (rows, *added))


def rotated(batch: ForwardBatch, state: ModelInput | StageState) -> ForwardBatch:
    """The batch whose tokens have the rows that images brought."""
    if not state.extras:
        return batch
    return replace(batch, rotary_table=state.extras[0], rotary_rows=torch.arange(batch.num_tokens, device=state.x.device))


class WithTower:
    """A text model's class is made one of images by this one before it. `vision`: with the tower, which else is not loaded."""

    stored_at: ClassVar[Mapping[str, str]] = {"model": "model.language_model", "visual": "model.visual"}

    def __init__(self, c: Any, tp: TensorParallel, max_len: int, layers: range | None = None, *, vision: bool = False):
        super().__init__(c, tp, max_len, layers)  # type: ignore[call-arg]
        if vision:
            self.visual = Tower(c.vision, tp)

    @property
    def ignored(self) -> tuple[str, ...]:
        found: tuple[str, ...] = super().ignored  # type: ignore[misc]
        return found if hasattr(self, "visual") else (*found, "model.visual.*")

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features of images, as `Tower` gives them."""
        found: Tensor = self.visual(patches, grids)
        return found

    def embed(self, ids: Tensor, features: Any = None) -> ModelInput:
        found: ModelInput = super().embed(ids)  # type: ignore[misc]
        return found if features is None else with_images(self, found.x, ids, features)

    def forward(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState:
        out: Tensor | StageState = super().forward(rotated(batch, state), state)  # type: ignore[misc]
        return out


class Model(WithTower, qwen3.Model):
    config: Config

    def make_decoder(self, layers: LayerStack) -> Decoder:
        return DenseDeepstack(self.config, self.tp, layers)
