"""The parts that all decoders share, and their implementation of the engine's contract (octavo.models.interface)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.kvcache import KVCacheSpec, Layout, Views, spec_for
from octavo.layers.attention import PagedAttention
from octavo.layers.embedding import Embedding
from octavo.layers.linear import LMHead
from octavo.layers.norm import RMSNorm
from octavo.layers.vision import ImageInput
from octavo.models.config import ConfigBase
from octavo.models.interface import Head, Limits, ModelInput, StageState
from octavo.platform import FP8_MAX

__all__ = ["CausalLM", "Decoder", "DecoderLM", "LayerStack"]


class LayerStack(nn.Module):
    """The layers of a pipeline stage, under their numbers in the whole model."""

    def __init__(self, stage: range, make: Callable[[int], nn.Module]):
        super().__init__()
        self.stage = stage
        for number in stage:
            self.add_module(str(number), make(number))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.children())

    def __len__(self) -> int:
        return len(self.stage)

    def __getitem__(self, number: int) -> nn.Module:
        return self.get_submodule(str(number if number >= 0 else self.stage.stop + number))


class Decoder(nn.Module):
    """Embedding, layers, final norm. In a pipeline only the first stage has the embedding, and only the last the norm."""

    def __init__(self, config: ConfigBase, tp: TensorParallel, layers: LayerStack):
        super().__init__()
        self.first, self.last = layers.stage.start == 0, layers.stage.stop == config.num_hidden_layers
        if self.first:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, tp)
        self.layers = layers
        if self.last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState:
        x, residual = self.run_layers(batch, state)
        if not self.last:
            x = ops.finished(x)
            return StageState(x, torch.zeros_like(x) if residual is None else residual, state.extras)
        hidden: Tensor = self.norm(x, residual)[0].values()
        return hidden

    def run_layers(self, batch: ForwardBatch, state: ModelInput | StageState) -> tuple[ops.Product, Tensor | None]:
        """The last layer's output, and the residual to add to it; None if it has been added."""
        x: ops.Product = state.x
        residual = state.residual if isinstance(state, StageState) else None
        for number, layer in zip(self.layers.stage, self.layers, strict=True):
            x, residual = layer(x, residual, batch)
            residual = self.after_layer(number, residual, state)
        return x, residual

    def after_layer(self, number: int, residual: Tensor | None, state: ModelInput | StageState) -> Tensor | None:
        """The residual behind layer `number`, to which a model may add what `state.extras` has for that place."""
        return residual


class DecoderLM(nn.Module):
    """A decoder, at `model` in the checkpoint, and its head, at `lm_head`. Implements octavo.models.interface.Model, except for
    the limits and caches, which depend on the attention.

    Checkpoints of multimodal models store the decoder elsewhere: stored_at maps a module's path to the checkpoint's.
    """

    stored_at: ClassVar[Mapping[str, str]] = {}  # a child's name -> its path in checkpoints, if that differs

    def __init__(
        self, config: ConfigBase, tp: TensorParallel, max_len: int, layers: range | None, make: Callable[[int], nn.Module]
    ):
        super().__init__()
        stage = layers or range(config.num_hidden_layers)
        self.config, self.tp, self.max_len = config, tp, max_len
        self.model = self.make_decoder(LayerStack(stage, make))
        tied = config.tie_word_embeddings
        if self.model.last:
            if tied and not self.model.first:  # the first and the last stage both load the matrix
                self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size, tp)
            embedding = self.path("model.embed_tokens")
            self.lm_head = LMHead(config.vocab_size, config.hidden_size, tp, tied=embedding if tied else None)

    def path(self, module_path: str) -> str:
        """The path in checkpoints of the path `module_path` in this module, or of a glob of paths."""
        child, dot, rest = module_path.partition(".")
        return self.stored_at.get(child, child) + dot + rest

    def make_decoder(self, layers: LayerStack) -> Decoder:
        return Decoder(self.config, self.tp, layers)

    @property
    def other_stages(self) -> tuple[str, ...]:
        stage = self.model.layers.stage
        others = [f"model.layers.{n}.*" for n in range(self.config.num_hidden_layers) if n not in stage]
        if not self.model.first and not hasattr(self.model, "embed_tokens"):
            others.append("model.embed_tokens.*")
        if not self.model.last:
            others += ["model.norm.*", "lm_head.*"]
        return tuple(map(self.path, others))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Globs of tensors in checkpoints that this stage does not need."""
        return ("*.rotary_emb.*", *self.other_stages)  # rotary tables follow from config.json

    def workspace_bytes(self, tokens: int) -> int:
        """Bytes of the MLP's activations and the residual, in FP32."""
        return tokens * (self.config.mlp_activations + 8 * self.config.hidden_size) * 4

    def embed(self, ids: Tensor, images: ImageInput | None = None) -> ModelInput:
        assert images is None, "a text model reads no images"
        return ModelInput(self.model.embed_tokens(ids))

    def forward(self, batch: ForwardBatch, state: ModelInput | StageState) -> Tensor | StageState:
        out: Tensor | StageState = self.model(batch, state)
        return out

    def stage_input(self, tokens: int) -> StageState:
        like = next(module for module in self.model.layers.modules() if isinstance(module, RMSNorm)).weight
        x, residual = (like.new_zeros(tokens, self.config.hidden_size) for _ in range(2))
        return StageState(x, residual)

    @property
    def head(self) -> Head:
        return self.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def packed_weights(self) -> list[ops.PackedWeight | ops.PackedStack]:
        held = (value for module in self.modules() for value in vars(module).values())
        return [value for value in held if isinstance(value, (ops.PackedWeight, ops.PackedStack))]


class CausalLM(DecoderLM):
    """A DecoderLM whose layers attend to keys and values (PagedAttention)."""

    def limits(self) -> Limits:
        """`eager` depends on head sizes and on how weights are packed, so it is final once they are loaded."""
        dims = {a.head_dim for a in self.attention_layers()}
        captured = all(ops.captures(dim, self.packed_weights()) for dim in dims)
        return Limits(self.max_len, self.config.vocab_size, None if captured else "an op of it looks at values on the host")

    def kv_specs(self, kv_cache_dtype: str, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout) -> list[KVCacheSpec]:
        return [spec_for(kv_cache_dtype, a.kv_heads, a.head_dim, dtype, fp8_dtype, layout) for a in self.attention_layers()]

    def cache_names(self) -> list[frozenset[str]]:
        windows = [a.window is not None for a in self.attention_layers()]
        numbered = zip(self.model.layers.stage, windows, strict=True)
        return [frozenset((str(number), "sliding_window") if windowed else (str(number),)) for number, windowed in numbered]

    def bind_cache(self, views: Sequence[Views]) -> None:
        for layer, layer_views in zip(self.attention_layers(), views, strict=True):
            layer.bind_cache(layer_views)

    def _scaled_layers(self) -> list[PagedAttention]:
        """The layers whose cache has FP8 codes; all of them where none has."""
        layers = self.attention_layers()
        return [layer for layer in layers if layer.cache.views["k"].dtype in FP8_MAX] or layers

    def calibrate(self, run: Callable[[], object]) -> None:
        layers = self._scaled_layers()
        for layer in layers:
            layer.observe = True
        try:
            run()
        finally:
            for layer in layers:
                layer.observe = False

    def kv_scales(self) -> tuple[list[Tensor], int]:
        layers = self._scaled_layers()
        scales = [scale for layer in layers for scale in (layer.k_scale, layer.v_scale)]
        return scales, sum(layer.scales_from_checkpoint for layer in layers)

    def set_key_rounding(self, read: Callable[[range], Sequence[tuple[Tensor, Tensor]]], *, check_only: bool) -> None:
        layers = self.attention_layers()
        own = [layer.own_rounding(*found) for layer, found in zip(layers, read(self.model.layers.stage), strict=True)]
        if not check_only:
            for layer, rounding in zip(layers, own, strict=True):
                layer.set_key_rounding(rounding)

    def graph_key(self, requests: int, longest: int) -> Hashable:
        kinds = {(a.kv_heads, a.head_dim * a.cache.views["k"].element_size()) for a in self.attention_layers()}
        return tuple(ops.decode_variant(requests, *kind, longest) for kind in sorted(kinds))

    def attention_layers(self) -> list[PagedAttention]:
        return [module for module in self.modules() if isinstance(module, PagedAttention)]
