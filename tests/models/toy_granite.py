"""Granite as the contract wants it (`Model`), and with mistakes that only other paths than op by op would show: layers that do
more than megakernels are told (`Untold`), and logits scaled behind the head (`ScaledBehind`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.layers.linear import LMHead
from octavo.layers.rope import RotaryEmbedding
from octavo.models import llama
from octavo.models.dense import DenseLM
from octavo.ops import DenseParts, Product


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


class DecoderLayer(llama.DecoderLayer):
    def __init__(self, c: Config, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__(c, rotary, tp)
        self.factor = c.residual_multiplier

    def forward(self, x: Product, residual: Tensor | None, batch: ForwardBatch) -> tuple[Product, Tensor]:
        x, residual = self.input_layernorm(x, residual, self.self_attn.qkv_proj.weight)
        x = ops.finished(self.self_attn(x, batch)) * self.factor
        x, residual = self.post_attention_layernorm(x, residual, self.mlp.gate_up_proj.weight)
        return ops.finished(self.mlp(x)) * self.factor, residual


class ScaledHead(LMHead):
    divisor: float

    def forward(self, x: ops.Operand) -> Tensor:
        return super().forward(x) / self.divisor


class Untold(DenseLM):
    config: Config

    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        rotary = RotaryEmbedding(c.head_dim, c.rope, c.max_position_embeddings, max_len)
        super().__init__(c, tp, max_len, layers, lambda _: DecoderLayer(c, rotary, tp))
        self.lm_head = ScaledHead(c.vocab_size, c.hidden_size, tp, tied=None)
        self.lm_head.divisor = c.logits_scaling


class Model(Untold):
    def parts(self) -> DenseParts | str:
        return "a factor of what each layer adds"


class ScaledBehind(Model):
    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        super().__init__(c, tp, max_len, layers)
        self.lm_head.divisor = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden) / self.config.logits_scaling
