"""Runs the vision tower, and keeps its outputs for the steps that compute the image's tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import cast

import torch
from torch import Tensor

from octavo import ops
from octavo.batch import to_device
from octavo.config import EngineConfig
from octavo.engine.graphs.tower import LARGEST as LARGEST_GRAPH
from octavo.engine.graphs.tower import TowerGraphs
from octavo.engine.scheduler import IMAGE_TOKENS, IMAGE_TOKENS_ON_CPU
from octavo.engine.sequence import EncoderPart, RequestImage, ScheduledRequest
from octavo.images import Grid, ImagePatches, PlacedImage
from octavo.layers.vision import ImageInput, finish, patch_values
from octavo.models.interface import Model, VisionModel
from octavo.platform import Platform

__all__ = ["Encoder", "make_encoder"]

LARGEST = 16_384  # tokens of an image that is read, where a request may be so long: 16 million pixels of Qwen3-VL
GRAPH_TOKENS = LARGEST_GRAPH // 4  # image tokens are squares of 2 x 2 patches


class Encoder:
    """The features of images on the device, by the keys of the scheduler's EncoderCache, which says what to keep."""

    def __init__(self, model: VisionModel, platform: Platform):
        self.model, self.platform = model, platform
        self.features: dict[bytes, Tensor] = {}
        self.largest = self.capacity = 0  # image tokens: of one image, and of those whose features are kept
        self.graphs: TowerGraphs | None = None
        self._begun: dict[bytes, Generator[None, None, Tensor]] = {}  # images of which some layers are computed

    def plan(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> int:
        """Sets `largest` and `capacity`, at least one image's, and returns the bytes that images take at most: features that
        are kept, the tower's activations, those in graphs too, and features of a step, as they are and in the places of tokens.
        """
        cpu, token = self.platform.is_cpu, self.model.feature_width * dtype.itemsize
        self.largest = min(LARGEST, max_model_len)
        self.capacity = max(config.encoder_cache_bytes(cpu) // token, self.largest)
        encoded = self.model.encoder_workspace_bytes(max(self.largest, IMAGE_TOKENS), dtype)
        captured = self.model.encoder_workspace_bytes(GRAPH_TOKENS, dtype) if not (cpu or config.enforce_eager) else 0
        return (self.capacity + 2 * config.step_tokens_on(cpu)) * token + encoded + captured

    @property
    def step_tokens(self) -> int:
        """Image tokens that a step encodes."""
        return IMAGE_TOKENS_ON_CPU if self.platform.is_cpu else IMAGE_TOKENS

    @torch.inference_mode()
    def run(self, parts: Sequence[EncoderPart], evicted: Sequence[bytes]) -> None:
        """Drops the features of `evicted` and encodes `parts`; whole images in one pass of the tower."""
        for key in evicted:
            self.features.pop(key, None)
            self._begun.pop(key, None)
        for part in parts:
            if part.parts > 1:
                self._run_part(part)
        if not (images := [part.image for part in parts if part.parts == 1]):
            return
        patches = torch.cat([self._patches(found.image) for found in images])
        encoded = self.encode(patches, [found.image.grid for found in images])
        for found, features in zip(images, encoded.split([found.image.tokens for found in images]), strict=True):
            self.features[found.key] = features.clone()  # a view would keep those of all images

    def _run_part(self, part: EncoderPart) -> None:
        """Runs as many of the tower's layers as a part has. What is between them waits in the generator's frame."""
        (key, image), depth = (part.image.key, part.image.image), self.model.encoder_depth
        if part.part == 0:
            self._begun[key] = self.model.encoder_steps(self.model.encoder_input(self._patches(image), [image.grid]))
        for _ in range(depth * part.part // part.parts, depth * (part.part + 1) // part.parts):
            next(self._begun[key])
        if part.part + 1 == part.parts:
            self.features[key] = self.model.encoder_output(finish(self._begun.pop(key)), [image.grid]).clone()

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """`model.encode`, its layers from a graph where there is one; valid until the next call."""
        given = self.model.encoder_input(patches, grids)
        found = None if self.graphs is None else self.graphs.run(given)
        return self.model.encoder_output(self.model.encoder_layers(given) if found is None else found, grids)

    def _patches(self, image: ImagePatches) -> Tensor:
        pixels, values = (_to(torch.from_numpy(array), self.platform) for array in (image.pixels, image.values))
        return patch_values(pixels, values, image.frames)

    def input(self, items: Sequence[ScheduledRequest]) -> ImageInput | None:
        """What images bring to the step of `items`; None where no item is before or within an image of its request.

        The tokens behind a request's last image need nothing: their rotary rows follow from its rotary_delta.
        """
        if not any(_has_images(item) for item in items):
            return None
        features: list[Tensor] = []
        places: list[int] = []
        positions: list[Tensor] = []
        at = 0
        for item in items:
            start, stop = item.start, item.start + item.num_tokens
            for found in item.request.images_within(start, stop):
                low, high = max(start, found.start), min(stop, found.stop)
                features.append(self.features[found.key][low - found.start : high - found.start])
                places.extend(range(at + low - start, at + high - start))
            placed = self.model.image_positions(_grids(item.request.images), start, stop)
            if placed is not None:
                positions.append(placed)
            at += item.num_tokens
        device = self.platform.device
        none = torch.empty(0, self.model.feature_width, device=device)
        return ImageInput(
            torch.cat(features) if features else none,
            to_device(places, torch.int64, device),
            _to(torch.cat(positions, 1), self.platform) if positions else None,
        )

    def rotary_delta(self, images: Sequence[PlacedImage]) -> int:
        """Rotary row minus index of the tokens behind a request's images, one at least."""
        stop = images[-1].stop
        found = self.model.image_positions(_grids(images), stop, stop + 1)
        return 0 if found is None else int(found[0, 0]) - stop

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures graphs, where they can be."""
        patches, grid = self.model.warm_up_image()
        given = self.model.encoder_input(patches.to(self.platform.device), [grid])
        if ops.captures_segments(given.x.dtype, given.rotation.cos_sin.shape[1]):
            self.graphs = TowerGraphs(self.model, given)

    def forget(self) -> None:
        """Frees features, also of images of which some layers are computed."""
        self.features.clear()
        self._begun.clear()

    def drop(self) -> None:
        """Frees features and graphs."""
        self.forget()
        self.graphs = None

    def warm_up(self) -> None:
        """Launches every kernel of the tower."""
        patches, grid = self.model.warm_up_image()
        self.model.encode(patches.to(self.platform.device), [grid])


def make_encoder(model: Model, platform: Platform) -> Encoder | None:
    """The encoder of a model that has a vision tower."""
    return Encoder(cast("VisionModel", model), platform) if getattr(model, "has_tower", False) else None


def _has_images(item: ScheduledRequest) -> bool:
    images = item.request.images
    return bool(images) and item.start < images[-1].stop


def _grids(images: Sequence[RequestImage | PlacedImage]) -> list[tuple[int, Grid]]:
    return [(found.start, found.image.grid) for found in images]


def _to(tensor: Tensor, platform: Platform) -> Tensor:
    return tensor if platform.is_cpu else tensor.pin_memory().to(platform.device, non_blocking=True)
