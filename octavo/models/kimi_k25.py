"""Kimi-K2.5: its text model, which has DeepSeek-V3's architecture. Its vision tower is not supported yet.

config.json has the text model's fields in `text_config`, and checkpoints store its tensors below `language_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from octavo.models import deepseek_v3
from octavo.models.config import text_config

__all__ = ["Config", "Model"]


class Config(deepseek_v3.Config):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        return super().from_json(text_config(config))


class Model(deepseek_v3.Model):
    stored_at: ClassVar[Mapping[str, str]] = {"model": "language_model.model", "lm_head": "language_model.lm_head"}

    @property
    def ignored(self) -> tuple[str, ...]:
        return *super().ignored, "vision_tower.*", "mm_projector.*"
