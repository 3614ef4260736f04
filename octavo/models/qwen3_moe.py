"""Qwen3 with a mixture of experts in most layers: top-k of a softmax over all experts, no shared ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.layers.linear import GatedMLP
from octavo.layers.moe import Experts, Gate, MixtureOfExperts
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.models import qwen3
from octavo.models.config import check_experts, expert_activations
from octavo.models.dense import BIASED, FusedLM
from octavo.ops import DecoderParts, ExpertLayerParts, MixtureParts, Product, Router

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(qwen3.Config):
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: Sequence[int] = ()

    also_called: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}

    def check(self) -> None:
        super().check()
        check_experts(self.num_experts, self.num_experts_per_tok)
        if not (isinstance(self.mlp_only_layers, list | tuple) and all(type(n) is int for n in self.mlp_only_layers)):
            raise OctavoError(f"config.json: mlp_only_layers must list numbers of layers, not {self.mlp_only_layers!r}.")

    def has_experts(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def mlp_activations(self) -> int:
        experts = expert_activations(self.num_experts_per_tok, self.moe_intermediate_size, self.hidden_size)
        return max(super().mlp_activations, experts)


def mixture(c: Config, tp: TensorParallel) -> MixtureOfExperts:
    router = Router(c.num_experts_per_tok, normalize=c.norm_topk_prob)
    experts = Experts(c.hidden_size, c.moe_intermediate_size, c.num_experts, c.num_experts_per_tok, tp)
    return MixtureOfExperts(Gate(c.hidden_size, c.num_experts, router), experts, tp)


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, layer: int, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = qwen3.Attention(c, layer, rotary, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = mixture(c, tp) if c.has_experts(layer) else GatedMLP(c.hidden_size, c.intermediate_size, bias=False, tp=tp)

    def forward(self, x: Product, residual: Tensor | None, batch: ForwardBatch) -> tuple[Product, Tensor]:
        x, residual = self.input_layernorm(x, residual, self.self_attn.qkv_proj.weight)
        x = self.self_attn(x, batch)
        x, residual = self.post_attention_layernorm(x, residual, *self.mlp.readers)
        return self.mlp(x, batch), residual


class Model(FusedLM):
    config: Config

    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        rotary = RotaryEmbedding(c.head_dim, c.rope, c.max_position_embeddings, max_len)
        super().__init__(c, tp, max_len, layers, lambda i: DecoderLayer(c, i, rotary, tp))

    def parts(self) -> MixtureParts | str:
        found: list[ExpertLayerParts] = []
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            a, mlp = layer.self_attn, layer.mlp
            if not isinstance(mlp, MixtureOfExperts):
                return "layers without experts between those that have them"
            if a.o_proj.bias is not None:
                return BIASED
            part = ExpertLayerParts(
                qkv=a.qkv_proj.weight, o=a.o_proj.weight, gate=mlp.gate.weight, correction=mlp.gate.bias,
                router=mlp.gate.router, gate_up=mlp.experts.gate_up, down=mlp.experts.down,
                input_norm=layer.input_layernorm.weight, post_norm=layer.post_attention_layernorm.weight,
                norms=a.attn.norms, qkv_bias=a.qkv_proj.bias, cache=a.attn.cache, window=a.attn.window,
            )  # fmt: skip
            found.append(part)
        c, attn = self.config, a.attn
        return DecoderParts(
            found, attn.rotary.cos_sin, c.hidden_size, c.moe_intermediate_size, attn.heads, attn.kv_heads, attn.head_dim,
            attn.scale, c.rms_norm_eps, self.tp.size,
        )  # fmt: skip
