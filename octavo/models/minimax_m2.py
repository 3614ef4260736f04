"""MiniMax-M2: queries and keys are normed over all heads; experts in every layer, chosen by sigmoid with a correction.

Multi-token-prediction layers, after the last, are not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.layers.attention import PagedAttention
from octavo.layers.linear import QKVLinear, RowParallelLinear
from octavo.layers.moe import Experts, Gate, MixtureOfExperts
from octavo.layers.norm import AllHeadsNorm, RMSNorm, norm_all_heads
from octavo.layers.rope import RotaryEmbedding
from octavo.models.common import CausalLM
from octavo.models.config import ConfigBase, check_experts, expert_activations
from octavo.ops import Activation, Product, Router

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(ConfigBase):
    num_local_experts: int
    num_experts_per_tok: int
    rotary_dim: int | None = None
    num_mtp_modules: int = 0
    shared_intermediate_size: int = 0
    use_qk_norm: bool = True
    qk_norm_type: str = "per_layer"
    scoring_func: str = "sigmoid"
    use_routing_bias: bool = True
    attn_type_list: Sequence[int] = ()

    also_called: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"num_mtp_modules", "shared_intermediate_size"})
    default_theta: ClassVar[float] = 5e6

    def check(self) -> None:
        super().check()
        check_experts(self.num_local_experts, self.num_experts_per_tok)
        served = {
            "use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "use_routing_bias": True,
            "shared_intermediate_size": 0,
        }  # fmt: skip
        for name, value in served.items():
            if (asked := getattr(self, name)) != value:
                raise OctavoError(f"config.json asks for {name} {asked!r}; this architecture is served with {value!r}.")
        if any(kind != 1 for kind in self.attn_type_list):
            raise OctavoError("config.json: attn_type_list names layers of linear attention, which this architecture has not.")

    @property
    def rotated(self) -> int:
        return super().rotated if self.rope.get("partial_rotary_factor") else self.rotary_dim or self.head_dim

    @property
    def mlp_activations(self) -> int:
        return expert_activations(self.num_experts_per_tok, self.intermediate_size, self.hidden_size)


class Attention(nn.Module):
    def __init__(self, c: Config, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.tp = tp
        self.qkv_proj = QKVLinear(c.hidden_size, heads, kv_heads, c.head_dim, bias=False, tp=tp)
        self.q_norm = AllHeadsNorm(heads, c.head_dim, c.rms_norm_eps, tp)
        self.k_norm = AllHeadsNorm(kv_heads, c.head_dim, c.rms_norm_eps, tp)
        self.rotary_emb = rotary
        self.attn = PagedAttention(tp.part(heads), tp.part(kv_heads), c.head_dim, c.head_dim**-0.5, rotary)
        self.o_proj = RowParallelLinear("o_proj", heads * c.head_dim, c.hidden_size, bias=False, tp=tp)

    def forward(self, x: Activation, batch: ForwardBatch) -> Product:
        q, k, v = self.qkv_proj(x)
        q, k = norm_all_heads([q, k], [self.q_norm, self.k_norm], self.tp)
        y: Product = self.o_proj(self.attn.attend(q, k, v, batch))
        return y


def mixture(c: Config, tp: TensorParallel) -> MixtureOfExperts:
    count, active = c.num_local_experts, c.num_experts_per_tok
    gate = Gate(c.hidden_size, count, Router(active, sigmoid=True), bias="e_score_correction_bias")
    experts = Experts(c.hidden_size, c.intermediate_size, count, active, tp, names=("w1", "w3", "w2"))
    return MixtureOfExperts(gate, experts, tp)


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, rotary, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.block_sparse_moe = mixture(c, tp)

    def forward(self, x: Product, residual: Tensor | None, batch: ForwardBatch) -> tuple[Product, Tensor]:
        x, residual = self.input_layernorm(x, residual, self.self_attn.qkv_proj.weight)
        x = self.self_attn(x, batch)
        x, residual = self.post_attention_layernorm(x, residual, *self.block_sparse_moe.readers)
        return self.block_sparse_moe(x, batch), residual


class Model(CausalLM):
    config: Config

    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        rotary = RotaryEmbedding(c.rotated, c.rope, c.max_position_embeddings, max_len)
        super().__init__(c, tp, max_len, layers, lambda _: DecoderLayer(c, rotary, tp))

    @property
    def ignored(self) -> tuple[str, ...]:
        last = self.config.num_hidden_layers
        return *super().ignored, *(f"model.layers.{last + i}.*" for i in range(self.config.num_mtp_modules))
