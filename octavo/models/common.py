"""What every decoder has around its layers, and how a config.json becomes a typed Config."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.errors import OctavoError
from octavo.layers.attention import PagedAttention
from octavo.layers.embedding import Embedding
from octavo.layers.linear import LMHead
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import rope_parameters
from octavo.ops import DecoderParts, FusedDecoder, LayerParts, PackedWeight

__all__ = ["CausalLM", "ConfigBase", "Decoder"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigBase:
    """The fields that every dense decoder's config.json has, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Raises OctavoError, naming the field, for one that is missing, of a wrong type or not supported."""
        values = {
            f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None and f.name != "rope"
        }
        try:
            values.setdefault("num_key_value_heads", config["num_attention_heads"])
            values.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        except (KeyError, TypeError, ZeroDivisionError):
            pass  # said below
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if field.name not in values:
                if required:
                    raise OctavoError(f"config.json has no {field.name}, which this architecture needs.")
                continue
            value, kind = values[field.name], _plain(hints[field.name])
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                values[field.name] = float(value)
            elif kind is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
                raise OctavoError(f"config.json: {field.name} must be of type {kind.__name__}, not {value!r}.")
            elif kind is int and value < (0 if field.name == "max_window_layers" else 1):  # every layer may slide
                raise OctavoError(f"config.json: {field.name} must be positive, not {value}.")
        made = cls(**values, rope=rope_parameters(config))
        if made.hidden_act != "silu":
            raise OctavoError(f"config.json asks for hidden_act '{made.hidden_act}'; this architecture is served with 'silu'.")
        if made.head_dim % 2:
            raise OctavoError(
                f"config.json: head_dim must be even, since pairs of dimensions are rotated, not {made.head_dim}."
            )
        kinds = values.get("layer_types")
        if kinds and not (isinstance(kinds, list) and len(kinds) == made.num_hidden_layers):
            raise OctavoError(f"config.json: layer_types must list one type for each of the {made.num_hidden_layers} layers.")
        if made.num_attention_heads % made.num_key_value_heads:
            raise OctavoError("config.json: num_attention_heads must be a multiple of num_key_value_heads.")
        return made


def _plain(hint: Any) -> type | None:
    """The class that a value of the annotation must have, None where it is not a single one."""
    if isinstance(hint, types.UnionType):
        kinds = [k for k in typing.get_args(hint) if k is not types.NoneType]
        hint = kinds[0] if len(kinds) == 1 else None
    return hint if hint in (int, float, bool, str) else None


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
        hidden: Tensor = self.norm(x, residual)[0]
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
                norms=a.attn.norms, qkv_bias=a.qkv_proj.bias, views=a.attn.views,
                k_scale=a.attn.k_scale, v_scale=a.attn.v_scale, window=a.attn.window,
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
