"""GLM-4.5 and 4.6: part of each head is rotated; after the first dense layers, experts chosen by sigmoid and a correction.

The layers after the last, which predict further tokens, are not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.layers.attention import PagedAttention
from octavo.layers.linear import GatedMLP, QKVLinear, RowParallelLinear
from octavo.layers.moe import Experts, Gate, MixtureOfExperts
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.models.common import CausalLM
from octavo.models.config import ConfigBase, check_experts, expert_activations
from octavo.ops import Activation, Product, Router

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(ConfigBase):
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    attention_bias: bool = False
    use_qk_norm: bool = False
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-5

    also_called: ClassVar[Mapping[str, str]] = {
        "n_routed_experts": "num_local_experts",
        "num_nextn_predict_layers": "num_mtp_layers",
    }
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"})
    partial_rotary: ClassVar[float] = 0.5

    def check(self) -> None:
        super().check()
        check_experts(self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group)

    @property
    def mlp_activations(self) -> int:
        experts = expert_activations(self.num_experts_per_tok, self.moe_intermediate_size, self.hidden_size)
        shared = 4 * self.n_shared_experts * self.moe_intermediate_size + self.hidden_size
        return max(super().mlp_activations, experts + shared)


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


def mixture(c: Config, tp: TensorParallel) -> MixtureOfExperts:
    router = Router(
        c.num_experts_per_tok, sigmoid=True, normalize=c.norm_topk_prob, scale=c.routed_scaling_factor,
        groups=c.n_group, top_groups=c.topk_group,
    )  # fmt: skip
    gate = Gate(c.hidden_size, c.n_routed_experts, router, bias="gate.e_score_correction_bias")
    experts = Experts(c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok, tp)
    shared = None
    if c.n_shared_experts:
        inner = c.n_shared_experts * c.moe_intermediate_size
        shared = GatedMLP(c.hidden_size, inner, bias=False, tp=tp, partial=True)
    return MixtureOfExperts(gate, experts, tp, shared)


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, layer: int, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        dense = layer < c.first_k_dense_replace
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, rotary, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, bias=False, tp=tp) if dense else mixture(c, tp)

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
        last = self.config.num_hidden_layers
        return *super().ignored, *(f"model.layers.{last + i}.*" for i in range(self.config.num_nextn_predict_layers))
