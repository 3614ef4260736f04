"""Qwen3-VL: the text of it, which is Qwen3, beside a vision tower that is not served yet.

config.json has the text model's fields within `text_config`, checkpoints its layers below `model.language_model.`. MRoPE gives
text the same row of cosines and sines in all of its sections, so text alone is rotated as Qwen3 is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from octavo.models import qwen3
from octavo.models.config import text_config

__all__ = ["LAYERS", "TOWER", "Config", "Model", "text_of"]

LAYERS = {"model": "model.language_model"}
TOWER = "model.visual.*"


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's fields; whether its head is its embedding is said beside them. Raises OctavoError without them."""
    return {**text_config(config), "tie_word_embeddings": config.get("tie_word_embeddings")}


class Config(qwen3.Config):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        return super().from_json(text_of(config))


class Model(qwen3.Model):
    stored_at: ClassVar[Mapping[str, str]] = LAYERS

    @property
    def ignored(self) -> tuple[str, ...]:
        return *super().ignored, TOWER
