"""Kimi-K2.5: DeepSeek-V3's architecture for text, beside MoonViT, a vision tower whose tokens see all frames of a clip.

config.json has the text model's fields within `text_config`, checkpoints its tensors below `language_model.`. The hub's
config.json prefixes fields of the tower with `vt_` and others with `init_`; transformers' does not. Queries' and keys' rows are
in the order of complex numbers, so that pairs of neighbours are rotated. Source of the tower: arXiv:2504.07491.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.layers.norm import LayerNorm
from octavo.layers.vision import (
    EncoderInput,
    Grid,
    PatchEmbedding,
    VisionAttention,
    VisionMLP,
    axial_angles,
    positions_of,
    resampled,
    segments_of,
)
from octavo.models import deepseek_v3
from octavo.models.config import check_fields, part_of
from octavo.models.with_images import WithImages
from octavo.weights import Loader

__all__ = ["Config", "Model", "VisionConfig"]

NORM_EPS = 1e-5  # of the tower's norms and, where config.json does not say it, the projector's
THETA = 10000.0  # of the rotation, and of the sines that tell frames apart


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    pos_emb_height: int
    pos_emb_width: int
    pos_emb_time: int = 4
    merge_kernel_size: Sequence[int] = (2, 2)
    projector_ln_eps: float = NORM_EPS

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Of config.json's `vision_config`. Raises OctavoError, naming the field, for one that is missing or wrong."""
        spelled = {f.name: f.name for f in fields(cls)}
        for name in spelled:
            for other in (f"vt_{name}", f"init_{name}", name):
                if config.get(other) is not None:
                    spelled[name] = other
        values = {name: config[other] for name, other in spelled.items() if config.get(other) is not None}
        check_fields(cls, values, spelled=lambda name: f"vision_config.{spelled[name]}")
        made = cls(**values)
        merge = made.merge_kernel_size
        if not (isinstance(merge, list | tuple) and len(merge) == 2 and merge[0] == merge[1] and type(merge[0]) is int):
            raise OctavoError(f"config.json: vision_config.merge_kernel_size must be two equal integers, not {merge!r}.")
        if made.hidden_size % (4 * made.num_attention_heads):
            raise OctavoError("config.json: the heads of vision_config must have dimensions that are a multiple of 4.")
        return made


class Block(VisionAttention):
    """Its attention's products are the block's own in checkpoints."""

    def __init__(self, c: VisionConfig, tp: TensorParallel):
        super().__init__("wqkv", "wo", c.hidden_size, c.num_attention_heads, tp)
        self.norm0, self.norm1 = LayerNorm(c.hidden_size, NORM_EPS), LayerNorm(c.hidden_size, NORM_EPS)
        self.mlp = VisionMLP("fc0", "fc1", (c.hidden_size, c.intermediate_size, c.hidden_size), "tanh", tp)

    def layer(
        self, x: Tensor, residual: Tensor | None, segments: ops.Segments, rotation: ops.Rotation
    ) -> tuple[Tensor, Tensor]:
        """The output, to which the residual, the second result, is still to be added."""
        normed, residual = ops.layer_norm(x, self.norm0.norm, residual, self.readers)
        x = self(normed, segments, rotation)
        normed, residual = ops.layer_norm(x, self.norm1.norm, residual, self.mlp.readers)
        return self.mlp(normed), residual


class PositionTable(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.shape = c.pos_emb_height, c.pos_emb_width, c.hidden_size

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("weight", self.shape)


class Embedding(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.proj = PatchEmbedding((c.hidden_size, 3, c.patch_size, c.patch_size))
        self.pos_emb, self.max_frames = PositionTable(c), c.pos_emb_time

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Patches of a clip's frames differ by sines of the frame's number; an image alone has none.

        Raises OctavoError for a clip of more frames than the tower has learned to tell apart (pos_emb_time).
        """
        if (longest := max(grid.frames for grid in grids)) > self.max_frames:
            raise OctavoError(f"A clip of {longest} frames is over the {self.max_frames} that this model reads at a time.")
        x: Tensor = self.proj(patches)
        inv_freq = THETA ** -(torch.arange(0, x.shape[1], 2, device=x.device).float() / x.shape[1])
        learned = []
        for grid in grids:
            frame = resampled(self.pos_emb.weight, grid, "bicubic", align_corners=False).flatten(0, 1)
            phases = torch.arange(grid.frames, device=x.device)[:, None] * inv_freq
            times = torch.cat([phases.sin(), phases.cos()], 1) if grid.frames > 1 else x.new_zeros(1, x.shape[1])
            learned.append((frame[None] + times[:, None]).flatten(0, 1))
        return x + torch.cat(learned).to(x.dtype)


class Encoder(nn.Module):
    def __init__(self, c: VisionConfig, tp: TensorParallel):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, tp) for _ in range(c.num_hidden_layers))
        self.final_layernorm = LayerNorm(c.hidden_size, NORM_EPS)


class Tower(nn.Module):
    def __init__(self, c: VisionConfig, tp: TensorParallel):
        super().__init__()
        self.config = c
        self.patch_embed, self.encoder = Embedding(c), Encoder(c, tp)

    def embed(self, patches: Tensor, grids: Sequence[Grid]) -> EncoderInput:
        """Of patches [P, values], frame by frame and row by row."""
        c = self.config
        rotation = axial_angles(
            positions_of(grids, 1, patches.device), c.hidden_size // c.num_attention_heads, THETA, interleaved=True
        )
        segments = segments_of([grid.patches for grid in grids], patches.device)
        return EncoderInput(self.patch_embed(patches, grids), rotation, segments)

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder.blocks

    def steps(self, given: EncoderInput) -> Generator[None, None, Tensor]:
        """[P, hidden], of a generator that pauses behind each layer."""
        x, rotation, segments = given
        residual = None
        for block in self.encoder.blocks:
            assert isinstance(block, Block)
            x, residual = block.layer(x, residual, segments, rotation)
            yield
        normed, _ = ops.layer_norm(x, self.encoder.final_layernorm.norm, residual)
        return normed.values()

    def merged(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[F, merged, hidden] of the layers' result [P, hidden]: a clip's frames are averaged."""
        merge, found, lengths = self.config.merge_kernel_size[0], [], [grid.patches for grid in grids]
        for part, grid in zip(x[: sum(lengths)].split(lengths), grids, strict=True):
            squares = part.view(grid.frames, grid.rows // merge, merge, grid.columns // merge, merge, -1)
            found.append(squares.mean(0).transpose(1, 2).flatten(0, 1).flatten(1, 2))
        return torch.cat(found)


class Projector(VisionMLP):
    def __init__(self, c: VisionConfig, text: int, tp: TensorParallel):
        joined = c.hidden_size * c.merge_kernel_size[0] ** 2
        super().__init__("proj.0", "proj.2", (joined, joined, text), "none", tp)
        self.pre_norm = LayerNorm(c.hidden_size, c.projector_ln_eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[F, text's hidden] of x [F, merged, hidden]."""
        normed, _ = ops.layer_norm(x, self.pre_norm.norm)
        return super().forward(normed.values().flatten(1))


@dataclass(frozen=True, kw_only=True)
class Config(deepseek_v3.Config):
    vision: VisionConfig
    media_placeholder_token_id: int = 163605

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        text, vision = part_of(config, "text_config"), part_of(config, "vision_config")
        token = config.get("media_placeholder_token_id", config.get("image_token_id"))
        own = {"vision": VisionConfig.from_json(vision), "media_placeholder_token_id": token}
        return super().from_json({**text, **own})


class Model(WithImages, deepseek_v3.Model):
    config: Config
    vision_tower: Tower
    mm_projector: Projector
    stored_at: ClassVar[Mapping[str, str]] = {"model": "language_model.model", "lm_head": "language_model.lm_head"}
    tower_names = ("vision_tower", "mm_projector")

    @staticmethod
    def make_tower(c: Any, tp: TensorParallel) -> Sequence[nn.Module]:
        return [Tower(c.vision, tp), Projector(c.vision, c.hidden_size, tp)]

    def encoder_output(self, found: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features [F, hidden], a token for each square of patches."""
        features: Tensor = self.mm_projector(self.vision_tower.merged(found, grids))
        return features
