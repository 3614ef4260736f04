"""Mixtral: Mistral with a mixture of experts in every layer: top-k of a softmax, weights renormalized to sum to 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.layers.moe import Experts, Gate, MixtureOfExperts
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.models import mistral
from octavo.models.common import CausalLM
from octavo.models.config import check_experts, expert_activations
from octavo.ops import Product, Router

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(mistral.Config):
    num_local_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float = 1e-5

    also_called: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}
    default_theta: ClassVar[float] = 1e6

    def check(self) -> None:
        super().check()
        check_experts(self.num_local_experts, self.num_experts_per_tok)

    @property
    def mlp_activations(self) -> int:
        return expert_activations(self.num_experts_per_tok, self.intermediate_size, self.hidden_size)


def mixture(c: Config, tp: TensorParallel) -> MixtureOfExperts:
    count, active = c.num_local_experts, c.num_experts_per_tok
    experts = Experts(c.hidden_size, c.intermediate_size, count, active, tp, names=("w1", "w3", "w2"))
    return MixtureOfExperts(Gate(c.hidden_size, count, Router(active)), experts, tp)


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = mistral.Attention(c, rotary, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.block_sparse_moe = mixture(c, tp)

    def forward(self, x: Product, residual: Tensor | None, batch: ForwardBatch) -> tuple[Product, Tensor]:
        x, residual = self.input_layernorm(x, residual, self.self_attn.qkv_proj.weight)
        x = self.self_attn(x, batch)
        x, residual = self.post_attention_layernorm(x, residual, *self.block_sparse_moe.readers)
        return self.block_sparse_moe(x, batch), residual


class Model(CausalLM):
    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        rotary = RotaryEmbedding(c.head_dim, c.rope, c.max_position_embeddings, max_len)
        super().__init__(c, tp, max_len, layers, lambda _: DecoderLayer(c, rotary, tp))
