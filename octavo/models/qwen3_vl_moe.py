"""Qwen3-VL with a mixture of experts: Qwen3-MoE beside the tower of models/qwen3_vl.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from octavo.models import qwen3_moe
from octavo.models.common import Decoder, LayerStack
from octavo.models.qwen3_vl import DenseDeepstack, ImageFields, WithTower, text_of

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(ImageFields, qwen3_moe.Config):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        return super().from_json({"norm_topk_prob": True, **text_of(config)})


class Model(WithTower, qwen3_moe.Model):
    config: Config

    def make_decoder(self, layers: LayerStack) -> Decoder:
        return DenseDeepstack(self.config, self.tp, layers)
