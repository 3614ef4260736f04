"""DeepSeek-V3.2: DeepSeek-V3 with sparse attention to 2,048 tokens that an indexer selects (arXiv:2512.02556)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from octavo.errors import OctavoError
from octavo.layers.indexer import Indexer, IndexerShape, SharedIndexer, TopkIndices
from octavo.layers.rope import RotaryEmbedding
from octavo.models import deepseek_v3

__all__ = ["Config", "Model", "make_indexer"]


@dataclass(frozen=True, kw_only=True)
class Config(deepseek_v3.Config):
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_rope_interleave: bool = False

    def check(self) -> None:
        super().check()
        if self.q_lora_rank is None:
            raise OctavoError("config.json has no q_lora_rank, which this architecture needs.")
        dim = self.index_head_dim
        if dim & (dim - 1) or dim < self.qk_rope_head_dim:
            raise OctavoError(
                f"config.json: index_head_dim must be a power of two of at least qk_rope_head_dim {self.qk_rope_head_dim}, "
                f"since keys go through a Hadamard transform, not {dim}."
            )


class Model(deepseek_v3.Model):
    config: Config

    def indexers(self, c: Any, rotary: RotaryEmbedding) -> Callable[[int], Indexer | SharedIndexer | None]:
        return lambda layer: make_indexer(c, rotary)


def make_indexer(c: Config, rotary: RotaryEmbedding, topk: TopkIndices | None = None) -> Indexer:
    assert c.q_lora_rank is not None
    shape = IndexerShape(c.index_n_heads, c.index_head_dim, c.index_topk)
    return Indexer(c.hidden_size, c.q_lora_rank, shape, rotary, topk, interleaved=c.indexer_rope_interleave)
