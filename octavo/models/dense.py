"""Decoders some of whose decode steps are fused, and the dense ones (norm, attention, add, norm, gated MLP, add)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.layers.attention import PagedAttention
from octavo.models.common import CausalLM, Decoder, LayerStack
from octavo.models.interface import ModelInput, StageState
from octavo.ops import DecoderParts, DenseParts, FusedDecoder, LayerParts, MixtureParts, PackedWeight
from octavo.platform import Platform

__all__ = ["BIASED", "DenseDecoder", "DenseLM", "FusedLM"]

BIASED = "a bias of attention's output or of an MLP"  # why a model's steps are not fused, for the table of ops


class DenseDecoder(Decoder):
    """A decoder that computes some decode steps with a fused kernel instead of op by op."""

    fused: FusedDecoder | None = None

    def run_layers(self, batch: ForwardBatch, state: ModelInput | StageState) -> tuple[ops.Product, Tensor | None]:
        fused, lens = self.fused, batch.query_lens
        if fused is None or state.extras or max(lens) > 1 or not fused.takes(len(lens), max(batch.context_lens)):
            return super().run_layers(batch, state)
        return fused(state.x + state.residual if isinstance(state, StageState) else state.x, batch), None


class FusedLM(CausalLM):
    """A decoder and its head. Also implements octavo.models.interface.FusedModel."""

    model: DenseDecoder

    def make_decoder(self, layers: LayerStack) -> Decoder:
        return DenseDecoder(self.config, self.tp, layers)

    def fuse(self, platform: Platform) -> None:
        self.model.fused = ops.fuse(self.parts(), platform)

    def unfuse(self) -> None:
        self.model.fused = None

    def graph_key(self, requests: int, longest: int) -> Hashable:
        key, fused = super().graph_key(requests, longest), self.model.fused
        if fused is None or not fused.takes(requests, longest):
            return key
        return fused.variant(requests, longest), key

    def parts(self) -> DenseParts | MixtureParts | str:
        """The layers for a megakernel that computes all of them, or the reason why its types cannot express them."""
        raise NotImplementedError


class DenseLM(FusedLM):
    """A dense decoder and its head."""

    def parts(self) -> DenseParts | str:
        found: list[LayerParts[PackedWeight]] = []
        layers: list[Any] = list(self.model.layers)  # of any architecture; the attributes have Hugging Face's names
        for layer in layers:
            a, mlp = layer.self_attn, layer.mlp
            if any(linear.bias is not None for linear in (a.o_proj, mlp.gate_up_proj, mlp.down_proj)):
                return BIASED
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
            attn.scale, c.rms_norm_eps, self.tp.size,
        )  # fmt: skip
