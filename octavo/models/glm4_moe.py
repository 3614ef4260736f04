"""GLM-4.5 and 4.6: partial rotary embedding; experts chosen by sigmoid with a correction, after the first dense layers.

Multi-token-prediction layers, after the last, are not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.layers.attention import PagedAttention
from octavo.layers.linear import QKVLinear, RowParallelLinear
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.models.common import CausalLM
from octavo.models.mixture import MixtureConfig, mlp_of
from octavo.ops import Activation, Product

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(MixtureConfig):
    use_qk_norm: bool = False
    rms_norm_eps: float = 1e-5

    partial_rotary: ClassVar[float] = 0.5


class Attention(nn.Module):
    def __init__(self, c: Config, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.qkv_proj = QKVLinear(c.hidden_size, heads, kv_heads, c.head_dim, bias=c.attention_bias, tp=tp)
        norms = None
        if c.use_qk_norm:
            norms = self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)
        self.rotary_emb = rotary
        self.attn = PagedAttention(tp.part(heads), tp.part(kv_heads), c.head_dim, c.head_dim**-0.5, rotary, norms=norms)
        self.o_proj = RowParallelLinear("o_proj", heads * c.head_dim, c.hidden_size, bias=False, tp=tp)

    def forward(self, x: Activation, batch: ForwardBatch) -> Product:
        y: Product = self.o_proj(self.attn(x, self.qkv_proj, batch))
        return y


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, layer: int, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, rotary, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = mlp_of(c, layer, tp)

    def forward(self, x: Product, residual: Tensor | None, batch: ForwardBatch) -> tuple[Product, Tensor]:
        x, residual = self.input_layernorm(x, residual, self.self_attn.qkv_proj.weight)
        x = self.self_attn(x, batch)
        x, residual = self.post_attention_layernorm(x, residual, *self.mlp.readers)
        return self.mlp(x, batch), residual


class Model(CausalLM):
    config: Config

    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        rotary = RotaryEmbedding(c.rotated, c.rope, c.max_position_embeddings, max_len)
        super().__init__(c, tp, max_len, layers, lambda i: DecoderLayer(c, i, rotary, tp))

    @property
    def ignored(self) -> tuple[str, ...]:
        return *super().ignored, *map(self.path, self.config.unread_layers)
