"""Mistral: every layer attends to a sliding window, if the config has one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.layers.attention import PagedAttention
from octavo.layers.linear import GatedMLP, QKVLinear, RowParallelLinear
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.models.config import ConfigBase
from octavo.models.dense import DenseLM
from octavo.ops import Activation, Product

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(ConfigBase):
    sliding_window: int | None = None


class Attention(nn.Module):
    def __init__(self, c: Config, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.qkv_proj = QKVLinear(c.hidden_size, heads, kv_heads, c.head_dim, bias=False, tp=tp)
        self.rotary_emb = rotary
        self.attn = PagedAttention(tp.part(heads), tp.part(kv_heads), c.head_dim, c.head_dim**-0.5, rotary, c.sliding_window)
        self.o_proj = RowParallelLinear("o_proj", heads * c.head_dim, c.hidden_size, bias=False, tp=tp)

    def forward(self, x: Activation, batch: ForwardBatch) -> Product:
        y: Product = self.o_proj(self.attn(x, self.qkv_proj, batch))
        return y


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, rotary, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, bias=False, tp=tp)

    def forward(self, x: Product, residual: Tensor | None, batch: ForwardBatch) -> tuple[Product, Tensor]:
        x, residual = self.input_layernorm(x, residual, self.self_attn.qkv_proj.weight)
        x = self.self_attn(x, batch)
        x, residual = self.post_attention_layernorm(x, residual, self.mlp.gate_up_proj.weight)
        return self.mlp(x), residual


class Model(DenseLM):
    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        rotary = RotaryEmbedding(c.head_dim, c.rope, c.max_position_embeddings, max_len)
        super().__init__(c, tp, max_len, layers, lambda _: DecoderLayer(c, rotary, tp))
