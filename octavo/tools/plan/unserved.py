"""Architectures that can be planned and are not served yet: a served model of text, under other paths, beside a vision tower.

It shrinks with each that lands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.distributed import TensorParallel
from octavo.kvcache import KVCacheSpec, Layout
from octavo.models import build_model
from octavo.tools.plan.model_source import Numbers
from octavo.tools.plan.towers import Places, qwen_tower
from octavo.weights.loader import places_of

__all__ = ["UNSERVED", "UnservedModel", "build_unserved"]


@dataclass
class UnservedModel:
    """What a plan asks of a model, as octavo.models.interface has it. paths: of the text model's, each with what it is here."""

    text: Any
    paths: Mapping[str, str]
    tower: Places

    @property
    def config(self) -> Any:
        return self.text.config

    @property
    def ignored(self) -> list[str]:
        return [self._here(pattern) for pattern in self.text.ignored]

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        places = [*((self._here(path), layer) for path, layer in places_of(self.text)), *self.tower]
        return iter((f"{path}.-" if getattr(layer, "reads_siblings", False) else path, layer) for path, layer in places)

    def workspace_bytes(self, tokens: int) -> int:
        found: int = self.text.workspace_bytes(tokens)
        return found

    def kv_specs(self, kv_cache_dtype: str, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout) -> list[KVCacheSpec]:
        found: list[KVCacheSpec] = self.text.kv_specs(kv_cache_dtype, dtype, fp8_dtype, layout)
        return found

    def _here(self, path: str) -> str:
        first, dot, rest = path.partition(".")
        return self.paths.get(first, first) + dot + rest


def _qwen_vl(c: Numbers, tp: TensorParallel) -> UnservedModel:
    served = {"model_type": "qwen3_moe" if c.values["model_type"] == "qwen3_vl_moe" else "qwen3"}
    tied = {"tie_word_embeddings": bool(c.values.get("tie_word_embeddings"))}
    text = build_model({**c.part("text_config").values, **served, **tied}, tp, 1)
    return UnservedModel(text, {"model": "model.language_model"}, qwen_tower(c.part("vision_config"), tp))


UNSERVED: dict[str, Callable[[Numbers, TensorParallel], UnservedModel]] = {
    "qwen3_vl": _qwen_vl,
    "qwen3_vl_moe": _qwen_vl,
}


def build_unserved(config: Mapping[str, Any], tp: TensorParallel) -> UnservedModel:
    """Raises OctavoError for a field that is missing or wrong, and for heads that do not split."""
    return UNSERVED[config["model_type"]](Numbers(config), tp)
