"""What models of text and images have in common: a vision tower beside a text model's class."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from octavo.distributed import TensorParallel
from octavo.images import Grid
from octavo.layers.vision import EncoderInput, ImageInput, finish, splice
from octavo.models.interface import ModelInput

__all__ = ["WithImages"]

WARM_UP = Grid(1, 32, 32)


class WithImages:
    """A base that comes before a text model's class. `vision`: with the tower; without, the checkpoint's is not loaded."""

    tower_names: ClassVar[tuple[str, ...]]  # of the modules beside the text model

    def __init__(self, c: Any, tp: TensorParallel, max_len: int, layers: range | None = None, *, vision: bool = False):
        super().__init__(c, tp, max_len, layers)  # type: ignore[call-arg]
        self.has_tower = vision
        if vision:
            for name, module in zip(self.tower_names, self.make_tower(c, tp.of_towers), strict=True):
                setattr(self, name, module)

    @staticmethod
    def make_tower(c: Any, tp: TensorParallel) -> Sequence[nn.Module]:
        """The modules of `tower_names`."""
        raise NotImplementedError

    @property
    def tower(self) -> Any:
        return getattr(self, self.tower_names[0])

    def encoder_input(self, patches: Tensor, grids: Sequence[Grid]) -> EncoderInput:
        found: EncoderInput = self.tower.embed(patches, grids)
        return found

    def encoder_steps(self, given: EncoderInput) -> Generator[None, None, Tensor]:
        found: Generator[None, None, Tensor] = self.tower.steps(given)
        return found

    def encoder_layers(self, given: EncoderInput) -> Tensor:
        return finish(self.encoder_steps(given))

    @property
    def encoder_depth(self) -> int:
        return sum(1 for _ in self.tower.layers)

    def encoder_output(self, found: Tensor, grids: Sequence[Grid]) -> Tensor:
        raise NotImplementedError

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self.encoder_output(self.encoder_layers(self.encoder_input(patches, grids)), grids)

    @property
    def ignored(self) -> tuple[str, ...]:
        found: tuple[str, ...] = super().ignored  # type: ignore[misc]
        left_out = [f"{name}.*" for name in self.tower_names if not hasattr(self, name)]
        return (*found, *map(self.path, left_out))  # type: ignore[attr-defined]

    def embed(self, ids: Tensor, images: ImageInput | None = None) -> ModelInput:
        found: ModelInput = super().embed(ids)  # type: ignore[misc]
        return found if images is None else self.with_features(found.x, images)

    def with_features(self, x: Tensor, images: ImageInput) -> ModelInput:
        """Embeddings x [T, hidden] with the tower's features in the places of image tokens."""
        return ModelInput(splice(x, images.places, images.features))

    @property
    def feature_width(self) -> int:
        return int(self.config.hidden_size)  # type: ignore[attr-defined]

    @property
    def patch_size_values(self) -> int:
        """Values of a patch, as the tower reads it."""
        c = self.config.vision  # type: ignore[attr-defined]
        return int(3 * getattr(c, "temporal_patch_size", 1) * c.patch_size**2)

    def encoder_workspace_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Of a patch: its values, which are FP32; in the last layer's MLP both sides of the GELU, and in the hidden size the
        embedding, the layer's input and its residual, what attention gave, its residual and its norm; the features."""
        c = self.config.vision  # type: ignore[attr-defined]
        merged = getattr(c, "spatial_merge_size", 0) or c.merge_kernel_size[0]
        layer = merged**2 * (6 * c.hidden_size + 2 * c.intermediate_size)
        return int(tokens * (4 * merged**2 * self.patch_size_values + dtype.itemsize * (layer + self.feature_width)))

    def image_positions(self, images: Sequence[tuple[int, Grid]], start: int, stop: int) -> Tensor | None:
        return None

    def warm_up_image(self) -> tuple[Tensor, Grid]:
        return torch.rand(WARM_UP.patches, self.patch_size_values), WARM_UP
