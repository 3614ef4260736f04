"""GLM-5: DeepSeek-V3.2, with layers that share the selection of an earlier layer's indexer (arXiv:2603.12201)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.errors import OctavoError
from octavo.layers.indexer import Indexer, SharedIndexer, TopkIndices
from octavo.layers.rope import RotaryEmbedding
from octavo.models import deepseek_v32
from octavo.models.deepseek_v32 import make_indexer
from octavo.models.interface import Limits, ModelInput, StageState

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(deepseek_v32.Config):
    rms_norm_eps: float = 1e-5
    routed_scaling_factor: float = 2.5
    indexer_rope_interleave: bool = True
    indexer_types: list[str] | None = None
    index_topk_pattern: str | list[str] | None = None  # the same as a list, or as letters F and S
    index_topk_freq: int = 1  # without either: every index_topk_freq-th layer has an indexer, counted from
    index_skip_topk_offset: int = 2  # layer index_skip_topk_offset - 1; all layers before that one have an indexer
    mlp_layer_types: list[str] | None = None

    may_be_zero = deepseek_v32.Config.may_be_zero | {"index_topk_freq", "index_skip_topk_offset"}

    def check(self) -> None:
        super().check()
        for name, served, kinds in (
            ("indexer_types", ("full", "shared"), self.kinds_of_indexers),
            ("mlp_layer_types", ("dense", "sparse"), self.mlp_layer_types),
        ):
            if kinds is not None and not (
                isinstance(kinds, list) and len(kinds) == self.num_hidden_layers and all(kind in served for kind in kinds)
            ):
                raise OctavoError(
                    f"config.json: {name} must list '{served[0]}' or '{served[1]}' for each of the {self.num_hidden_layers} "
                    f"layers, not {kinds!r}."
                )
        if self.kinds_of_indexers[0] != "full":
            raise OctavoError(
                "config.json: indexer_types begins with 'shared', but no layer before it has an indexer to share."
            )

    @property
    def kinds_of_indexers(self) -> list[str]:
        """For each layer "full", with an indexer of its own, or "shared"."""
        if self.indexer_types is not None:
            return self.indexer_types
        if isinstance(self.index_topk_pattern, str):
            return [{"F": "full", "S": "shared"}.get(letter, letter) for letter in self.index_topk_pattern]
        if self.index_topk_pattern is not None:
            return self.index_topk_pattern
        every, first = max(self.index_topk_freq, 1), self.index_skip_topk_offset - 1
        return ["shared" if max(layer - first, 0) % every else "full" for layer in range(self.num_hidden_layers)]

    def is_dense(self, layer: int) -> bool:
        return super().is_dense(layer) if self.mlp_layer_types is None else self.mlp_layer_types[layer] == "dense"


class Model(deepseek_v32.Model):
    config: Config

    def indexers(self, c: Any, rotary: RotaryEmbedding) -> Callable[[int], Indexer | SharedIndexer | None]:
        kinds, topk = c.kinds_of_indexers, TopkIndices()
        return lambda layer: make_indexer(c, rotary, topk) if kinds[layer] == "full" else SharedIndexer(topk)

    def limits(self) -> Limits:
        """A stage whose first layer shares a selection with the stage before is not captured: sparse steps alone bring one."""
        found, first = super().limits(), self.model.layers.stage.start
        shares = first and self.config.kinds_of_indexers[first] == "shared"
        return found._replace(eager="its first layer shares the selection of the stage before") if shares else found

    def forward(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState:
        """Between pipeline stages, a selection that the next stage's first layer shares is passed on, in sparse steps."""
        layers: list[Any] = list(self.model.layers)
        topk: TopkIndices = layers[0].self_attn.indexer.topk
        topk.indices = state.extras[0] if state.extras else None
        out = super().forward(batch, state)
        chosen, topk.indices = topk.indices, None
        if not isinstance(out, StageState):
            return out
        wanted = self.config.kinds_of_indexers[self.model.layers.stage.stop] == "shared"
        return out._replace(extras=(chosen,) if wanted and chosen is not None else ())
