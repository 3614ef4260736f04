"""DeepSeek-V3, R1 and models of their architecture: MLA; experts chosen from groups, after the first dense layers.

Multi-token-prediction layers, after the last, are not loaded. Sources: arXiv:2412.19437; arXiv:2405.04434 for MLA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.kvcache import KVCacheSpec, Layout, Views, index_spec, latent_spec
from octavo.layers.indexer import Indexer, SharedIndexer
from octavo.layers.linear import ColumnParallelLinear, RowParallelLinear
from octavo.layers.mla import LatentAttention, LatentShape
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding, stretch
from octavo.models.common import DecoderLM
from octavo.models.interface import Limits
from octavo.models.mixture import MixtureConfig, mlp_of
from octavo.ops import Activation, Product

__all__ = ["Config", "Model"]

LATENT_EPS = 1e-6  # of the latents' norms; config.json's rms_norm_eps is for the other norms


@dataclass(frozen=True, kw_only=True)
class Config(MixtureConfig):
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    rope_interleave: bool = True

    rotated_name: ClassVar[str] = "qk_rope_head_dim"

    def check(self) -> None:
        super().check()
        for name, served in (("moe_layer_freq", 1), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
            if (found := getattr(self, name)) != served:
                raise OctavoError(f"config.json: {name} is {found!r}; this architecture is served with {served!r}.")
        if self.kv_lora_rank % 4:
            raise OctavoError(f"config.json: kv_lora_rank must be a multiple of 4, not {self.kv_lora_rank}.")

    @property
    def rotated(self) -> int:
        return self.qk_rope_head_dim

    @property
    def rotated_of(self) -> int:
        return self.qk_rope_head_dim

    @property
    def latent(self) -> LatentShape:
        return LatentShape(
            self.num_attention_heads, self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        )

    @property
    def softmax_scale(self) -> float:
        """1/sqrt of the query width. It includes YaRN's magnitude squared, which the cosines and sines omit here."""
        p, scale = self.rope, float((self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5)
        factor = stretch(p, self.max_position_embeddings)
        if p["rope_type"] == "default" or not p.get("mscale_all_dim") or factor <= 1:
            return scale
        return scale * float(0.1 * p["mscale_all_dim"] * math.log(factor) + 1.0) ** 2


class Attention(nn.Module):
    def __init__(self, c: Config, rotary: RotaryEmbedding, tp: TensorParallel, indexer: Indexer | SharedIndexer | None = None):
        super().__init__()
        s, whole = c.latent, TensorParallel()
        self.sizes, width = [s.rank + s.rope], s.heads * (s.nope + s.rope)
        names, rows = ["kv_a_proj_with_mqa"], c.hidden_size
        if c.q_lora_rank is not None:
            self.sizes, names, rows = [c.q_lora_rank, *self.sizes], ["q_a_proj", *names], c.q_lora_rank
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_EPS)
        self.has_q_latent = c.q_lora_rank is not None
        self.a_proj = ColumnParallelLinear(names, c.hidden_size, self.sizes, bias=c.attention_bias, tp=whole)
        query = "q_b_proj" if self.has_q_latent else "q_proj"
        self.q_proj = ColumnParallelLinear([query], rows, [width], bias=False, tp=tp, heads=[s.heads])
        self.kv_a_layernorm = RMSNorm(s.rank, LATENT_EPS)
        self.indexer = indexer
        self.rotary_emb = rotary
        self.attn = LatentAttention(s, c.softmax_scale, rotary, self.kv_a_layernorm, tp, interleaved=c.rope_interleave)
        self.o_proj = RowParallelLinear("o_proj", s.heads * s.v, c.hidden_size, bias=c.attention_bias, tp=tp)

    @property
    def readers(self) -> tuple[ops.Reader, ...]:
        """Readers of this layer's input."""
        readers = self.a_proj.weight, *(() if self.has_q_latent else (self.q_proj.weight,))
        return readers if self.indexer is None else (*readers, *self.indexer.input_readers)

    def forward(self, x: Activation, batch: ForwardBatch) -> Product:
        *latents, kv = self.a_proj(x).split(self.sizes, 1)
        q: Activation = x
        chosen = None
        if self.has_q_latent:
            readers = (self.q_proj.weight, *(() if self.indexer is None else self.indexer.latent_readers))
            q, _ = self.q_a_layernorm(latents[0].contiguous(), None, *readers)
        if self.indexer is not None:
            chosen = self.indexer(x, q, batch)
        heads = self.q_proj(q).unflatten(1, (self.attn.heads, -1))
        y: Product = self.o_proj(self.attn(heads, kv, batch, chosen))
        return y


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, layer: int, attention: Attention, tp: TensorParallel):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = mlp_of(c, layer, tp)

    def forward(self, x: Product, residual: Tensor | None, batch: ForwardBatch) -> tuple[Product, Tensor]:
        x, residual = self.input_layernorm(x, residual, *self.self_attn.readers)
        x = self.self_attn(x, batch)
        x, residual = self.post_attention_layernorm(x, residual, *self.mlp.readers)
        return self.mlp(x, batch), residual


class Model(DecoderLM):
    """MLA's caches: each layer's latents, followed by the keys of its indexer if it has one."""

    config: Config

    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        rotary = RotaryEmbedding(c.qk_rope_head_dim, c.rope, c.max_position_embeddings, max_len)
        indexer = self.indexers(c, rotary)

        def make(layer: int) -> DecoderLayer:
            return DecoderLayer(c, layer, Attention(c, rotary, tp, indexer(layer)), tp)

        super().__init__(c, tp, max_len, layers, make)

    def indexers(self, c: Any, rotary: RotaryEmbedding) -> Callable[[int], Indexer | SharedIndexer | None]:
        """Returns a function that makes the indexer of a layer; None for layers without one."""
        return lambda layer: None

    @property
    def ignored(self) -> tuple[str, ...]:
        return *super().ignored, *map(self.path, self.config.unread_layers)

    def _caches(self) -> list[LatentAttention | Indexer]:
        return [module for module in self.modules() if isinstance(module, (LatentAttention, Indexer))]

    def limits(self) -> Limits:
        captured = ops.captures(self.config.kv_lora_rank + self.config.qk_rope_head_dim, self.packed_weights(), latent=True)
        eager = None if captured else "an op of it looks at values on the host"
        limits = Limits(self.max_len, self.config.vocab_size, eager)
        sparse = tuple(one.shape.top_k + limits.warmup_lengths[-1] for one in self._caches() if isinstance(one, Indexer))[:1]
        return limits._replace(warmup_lengths=(*limits.warmup_lengths, *sparse))

    def workspace_bytes(self, tokens: int) -> int:
        """Bytes in FP32 of attention, the indexer or the MLP, whichever needs most, plus latents, indexer selections and the
        residual; plus the scratch memory of ops on latents and index keys."""
        c, s = self.config, self.config.latent
        # per head: queries projected and rotated; absorbed queries before and after joining their parts; attended latents;
        # outputs in parts, joined and quantized
        head = 2 * (s.nope + s.rope) + 2 * (s.rank + s.rope) + s.rank + 3 * s.v
        indexers = [one.shape for one in self._caches() if isinstance(one, Indexer)]
        chosen = 2 * max((i.top_k for i in indexers), default=0)  # the previous selection and the one in progress
        indexed = max((4 * i.heads * (i.dim + 1) for i in indexers), default=0)
        latents = 3 * ((c.q_lora_rank or 0) + s.rank + s.rope)
        most = max(self.tp.part(s.heads) * head, indexed, c.mlp_activations)
        return tokens * (most + chosen + latents + 8 * c.hidden_size) * 4 + ops.LATENT_SCRATCH

    def kv_specs(self, kv_cache_dtype: str, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout) -> list[KVCacheSpec]:
        """`auto` is fp8_ds_mla for sparse attention in BF16. Index keys are FP8, except where latents are FP32."""
        c, caches = self.config, self._caches()
        if kv_cache_dtype == "auto" and dtype is torch.bfloat16 and any(isinstance(one, Indexer) for one in caches):
            kv_cache_dtype = "fp8_ds_mla"
        wide = kv_cache_dtype == "auto" and dtype is torch.float32
        latent = latent_spec(kv_cache_dtype, c.kv_lora_rank, c.qk_rope_head_dim, dtype, fp8_dtype)
        return [index_spec(one.shape.dim, fp8_dtype, wide=wide) if isinstance(one, Indexer) else latent for one in caches]

    def cache_names(self) -> list[frozenset[str]]:
        """An indexer's keys have no names: their format is not the latents'."""
        numbers = map(str, self.model.layers.stage)
        return [frozenset() if isinstance(one, Indexer) else frozenset((next(numbers),)) for one in self._caches()]

    def bind_cache(self, views: Sequence[Views]) -> None:
        for one, cache_views in zip(self._caches(), views, strict=True):
            one.bind_cache(cache_views)

    def graph_key(self, requests: int, longest: int) -> Hashable:
        """The number of context splits, and whether attention is sparse, depend on the bound."""
        return longest
