"""Runs the vision tower, and keeps its outputs for the steps that compute the image's tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import cast

import torch
from torch import Tensor

from octavo import ops
from octavo.batch import reads_pinned, to_device
from octavo.config import EngineConfig
from octavo.distributed import TensorParallel
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
ALONE = TensorParallel()
GRAPH_TOKENS = LARGEST_GRAPH // 4  # image tokens are squares of 2 x 2 patches


class Encoder:
    """The features of images on the device, by the keys of the scheduler's EncoderCache, which says what to keep."""

    def __init__(self, model: VisionModel, platform: Platform, tp: TensorParallel = ALONE):
        self.model, self.platform, self.tp = model, platform, tp
        self.shares = tp.whole_towers and tp.size > 1  # images out: each is encoded by one rank, for all
        self.features: dict[bytes, Tensor] = {}
        self.dtype = torch.bfloat16  # the model's
        self.largest = self.capacity = 0  # image tokens: of one image, and of those whose features are kept
        self.graphs: TowerGraphs | None = None
        self._begun: dict[bytes, Generator[None, None, Tensor]] = {}  # images of which some layers are computed
        self._owners: dict[bytes, int] = {}  # of those, the ranks that compute them, where ranks share images out
        self._loads = [0] * tp.size  # image tokens that each rank was given

    def plan(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> int:
        """Sets `dtype`, `largest`, `capacity` (at least one image's). Returns the bytes that images take at most: features that
        are kept, the tower's activations, those in graphs too, and features of a step, as they are and in the places of tokens.
        """
        self.dtype = dtype
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
        """Drops the features of `evicted` and encodes `parts`; whole images in one pass of the tower.

        Every rank calls it with the same arguments, and has all features then.
        """
        for key in evicted:
            self.features.pop(key, None)
            self._begun.pop(key, None)
            self._owners.pop(key, None)
        for part in parts:
            if part.parts > 1:
                self._run_part(part)
        if not (images := [part.image for part in parts if part.parts == 1]):
            return
        owners = self._shared_out([found.image.tokens for found in images])
        own = [found.image for found, owner in zip(images, owners, strict=True) if owner == self.tp.rank]
        encoded = None
        if own:
            encoded = self.encode(torch.cat([self._patches(image) for image in own]), [image.grid for image in own])
        if self.shares:
            encoded = self._gathered(encoded, [found.image.tokens for found in images], owners)
        assert encoded is not None
        for found, features in zip(images, encoded.split([found.image.tokens for found in images]), strict=True):
            self.features[found.key] = features.clone()  # a view would keep those of all images

    def _shared_out(self, tokens: Sequence[int]) -> list[int]:
        """A rank for each image of so many tokens, this one where ranks do not share them out: the largest image first, each to
        the rank that has the least to do in this step, then to the one that had the least before."""
        found, now = [self.tp.rank] * len(tokens), [0] * self.tp.size
        for at in sorted(range(len(tokens)), key=lambda at: -tokens[at]) if self.shares else ():
            rank = min(range(self.tp.size), key=lambda rank: (now[rank], self._loads[rank]))
            found[at], now[rank] = rank, now[rank] + tokens[at]
            self._loads[rank] += tokens[at]
        return found

    def _gathered(self, own: Tensor | None, tokens: Sequence[int], owners: Sequence[int]) -> Tensor:
        """The features of images of so many `tokens` one behind the other, of which this rank has its `own`."""
        device, dtype = self.platform.device, self.dtype
        whole = torch.zeros(sum(tokens), self.model.feature_width, dtype=dtype, device=device)
        at = 0
        for rows, owner in zip(whole.split(list(tokens)), owners, strict=True):
            if own is not None and owner == self.tp.rank:
                rows.copy_(own[at : at + len(rows)])
                at += len(rows)
        return self.tp.all_reduce(whole)  # of all but one rank zeros, so that the sums are exact

    def _run_part(self, part: EncoderPart) -> None:
        """As `_compute_part`, by one rank for all where they share images out."""
        if not self.shares:
            self._compute_part(part)
            return
        key, tokens = part.image.key, part.image.image.tokens
        if part.part == 0:
            (self._owners[key],) = self._shared_out([tokens])
        if self._owners[key] == self.tp.rank:
            self._compute_part(part)
        if part.part + 1 == part.parts:
            owner = self._owners.pop(key)
            self.features[key] = self._gathered(self.features.get(key), [tokens], [owner])

    def _compute_part(self, part: EncoderPart) -> None:
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
        if self.platform.is_described:
            return
        patches, grid = self.model.warm_up_image()
        given = self.model.encoder_input(patches.to(self.platform.device), [grid])
        if ops.captures_segments(given.x.dtype, given.rotation.cos_sin.shape[1]):
            self.graphs = TowerGraphs(self.model, given)

    def forget(self) -> None:
        """Frees features, also of images of which some layers are computed."""
        self.features.clear()
        self._begun.clear()
        self._owners.clear()

    def drop(self) -> None:
        """Frees features and graphs."""
        self.forget()
        self.graphs = None

    def warm_up(self) -> None:
        """Launches every kernel of the tower."""
        patches, grid = self.model.warm_up_image()
        self.model.encode(patches.to(self.platform.device), [grid])


def make_encoder(model: Model, platform: Platform, tp: TensorParallel = ALONE) -> Encoder | None:
    """The encoder of a model that has a vision tower, on this rank."""
    return Encoder(cast("VisionModel", model), platform, tp) if getattr(model, "has_tower", False) else None


def _has_images(item: ScheduledRequest) -> bool:
    images = item.request.images
    return bool(images) and item.start < images[-1].stop


def _grids(images: Sequence[RequestImage | PlacedImage]) -> list[tuple[int, Grid]]:
    return [(found.start, found.image.grid) for found in images]


def _to(tensor: Tensor, platform: Platform) -> Tensor:
    if not reads_pinned(platform.device):
        return tensor.to(platform.device)
    return tensor.pin_memory().to(platform.device, non_blocking=True)
