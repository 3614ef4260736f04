"""Qwen3-VL with a mixture of experts: its text model, which is Qwen3-MoE; see models/qwen3_vl.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from octavo.models import qwen3_moe
from octavo.models.qwen3_vl import LAYERS, TOWER, text_of

__all__ = ["Config", "Model"]


class Config(qwen3_moe.Config):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        return super().from_json({"norm_topk_prob": True, **text_of(config)})


class Model(qwen3_moe.Model):
    stored_at: ClassVar[Mapping[str, str]] = LAYERS

    @property
    def ignored(self) -> tuple[str, ...]:
        return *super().ignored, TOWER
