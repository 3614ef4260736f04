"""What every decoder has around its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.layers.attention import PagedAttention
from octavo.layers.embedding import Embedding
from octavo.layers.linear import LMHead
from octavo.layers.norm import RMSNorm
from octavo.models.config import ConfigBase
from octavo.ops import DecoderParts, FusedDecoder, LayerParts, PackedWeight

__all__ = ["CausalLM", "Decoder"]


class Decoder(nn.Module):
    """Embedding, layers, norm: hidden states [T, hidden] of a batch."""

    def __init__(self, config: ConfigBase, layers: list[nn.Module]):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fused: list[FusedDecoder] = []  # of those that take a step the first computes it

    def fused_for(self, requests: int, longest: int) -> FusedDecoder | None:
        """What computes a step of so many single tokens, with contexts up to `longest`; None: the layers, one by one."""
        return next((fused for fused in self.fused if fused.takes(requests, longest)), None)

    def forward(self, batch: ForwardBatch) -> Tensor:
        x, residual = self.embed_tokens(batch.input_ids), None
        single = self.fused and max(batch.query_lens) == 1
        if single and (fused := self.fused_for(len(batch.query_lens), max(batch.context_lens))):
            x = fused(x, batch)
        else:
            for layer in self.layers:
                x, residual = layer(x, residual, batch)
        hidden: Tensor = self.norm(x, residual)[0].values()
        return hidden


class CausalLM(nn.Module):
    """A decoder and its head. `ignored` are globs of tensors that checkpoints hold and the model does not need."""

    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)

    def __init__(self, config: ConfigBase, layers: list[nn.Module]):
        super().__init__()
        self.config = config
        self.model = Decoder(config, layers)
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, tied=config.tie_word_embeddings)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] after the last norm."""
        hidden: Tensor = self.model(batch)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """FP32 [rows, vocab]."""
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    def parts(self) -> DecoderParts | None:
        """The layers for a kernel that computes all of them; None where they have what `LayerParts` does not."""
        found: list[LayerParts] = []
        layers: list[Any] = list(self.model.layers)  # of whatever architecture, with Hugging Face's names
        for layer in layers:
            a, mlp = layer.self_attn, layer.mlp
            biases = [linear.bias for linear in (a.o_proj, mlp.gate_up_proj, mlp.down_proj)]
            if a.o_proj.tp.size > 1 or any(bias is not None for bias in biases):
                return None
            part = LayerParts(
                qkv=a.qkv_proj.weight, o=a.o_proj.weight, gate_up=mlp.gate_up_proj.weight, down=mlp.down_proj.weight,
                input_norm=layer.input_layernorm.weight, post_norm=layer.post_attention_layernorm.weight,
                norms=a.attn.norms, qkv_bias=a.qkv_proj.bias, cache=a.attn.cache, window=a.attn.window,
            )  # fmt: skip
            found.append(part)
        attn: PagedAttention = layers[0].self_attn.attn
        c = self.config
        return DecoderParts(
            found, attn.rotary.cos_sin, c.hidden_size, c.intermediate_size, attn.heads, attn.kv_heads, attn.head_dim,
            attn.scale, c.rms_norm_eps,
        )  # fmt: skip

    def packed_weights(self) -> list[PackedWeight]:
        weights = (getattr(module, "weight", None) for module in self.modules())
        return [weight for weight in weights if isinstance(weight, PackedWeight)]

    def attention_layers(self) -> list[PagedAttention]:
        return [module for module in self.modules() if isinstance(module, PagedAttention)]
