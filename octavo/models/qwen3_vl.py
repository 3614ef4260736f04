"""Qwen3-VL: its text model, which is Qwen3. Its vision tower is not supported yet.

config.json has the text model's fields in `text_config`, and checkpoints store its layers below `model.language_model.`. For
text, MRoPE's sections all use the same row of cosines and sines, so text alone is rotated as in Qwen3.
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
    """The text model's fields, and `tie_word_embeddings` from the top level. Raises OctavoError without text_config."""
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
