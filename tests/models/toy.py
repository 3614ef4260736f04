"""An architecture that no served one resembles, to hold the engine to its contract: nothing here is under `model.`, a layer has
two attentions with a cache each, the MLP has no gate, and the head is tied to an embedding at a path of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.kvcache import KVCacheSpec, Layout, Views, spec_for
from octavo.layers.attention import PagedAttention
from octavo.layers.embedding import Embedding
from octavo.layers.linear import ColumnParallelLinear, LMHead, QKVLinear, RowParallelLinear
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import RotaryEmbedding
from octavo.models.interface import Limits, ModelInput

VOCAB, HIDDEN, INNER, LAYERS, HEADS, DIM, WINDOW, EPS, POSITIONS = 96, 32, 40, 2, 2, 16, 3, 1e-5, 128
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Config:
    vocab_size: int
    longest_context: int = POSITIONS

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> Config:
        return cls(config["vocab_size"])


class TwoFold(nn.Module):
    def __init__(self, rotary: RotaryEmbedding, tp: TensorParallel, window: int | None):
        super().__init__()
        self.qkv = QKVLinear(HIDDEN, HEADS, HEADS, DIM, bias=False, tp=tp)
        self.attn = PagedAttention(tp.part(HEADS), tp.part(HEADS), DIM, DIM**-0.5, rotary, window)
        self.out = RowParallelLinear("out", HEADS * DIM, HIDDEN, bias=False, tp=tp)

    def forward(self, x: Any, batch: ForwardBatch) -> Tensor:
        return self.out(self.attn(x, self.qkv, batch))


class Layer(nn.Module):
    def __init__(self, rotary: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        self.first, self.second = RMSNorm(HIDDEN, EPS), RMSNorm(HIDDEN, EPS)
        self.near, self.far = TwoFold(rotary, tp, WINDOW), TwoFold(rotary, tp, None)
        self.up = ColumnParallelLinear(["up"], HIDDEN, [INNER], bias=False, tp=tp)
        self.down = RowParallelLinear("down", INNER, HIDDEN, bias=False, tp=tp)

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        normed = self.first(x)[0]
        x = x + ops.finished(self.near(normed, batch)) + ops.finished(self.far(normed, batch))
        return x + ops.finished(self.down(F.relu(self.up(self.second(x)[0])).square()))


class Model(nn.Module):
    ignored: Sequence[str] = ()
    other_stages: Sequence[str] = ()

    def __init__(self, c: Config, tp: TensorParallel, max_len: int, layers: range | None = None):
        super().__init__()
        rotary = RotaryEmbedding(DIM, ROPE, POSITIONS, max_len)
        self.max_len, self.rotary = max_len, rotary
        self.language_model = nn.Module()
        self.language_model.tokens = Embedding(VOCAB, HIDDEN, tp)
        self.language_model.blocks = nn.ModuleList(Layer(rotary, tp) for _ in range(LAYERS))
        self.language_model.end = RMSNorm(HIDDEN, EPS)
        self.out = LMHead(VOCAB, HIDDEN, tp, tied="language_model.tokens")

    def limits(self) -> Limits:
        return Limits(self.max_len, VOCAB, None)

    def workspace_bytes(self, tokens: int) -> int:
        return tokens * 4 * (4 * INNER + 8 * HIDDEN)

    def kv_specs(self, kv_cache_dtype: str, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout) -> list[KVCacheSpec]:
        """What is near is kept as the model computes it, what is far as the user wants it."""
        own, asked = (spec_for(name, HEADS, DIM, dtype, fp8_dtype, layout) for name in ("auto", kv_cache_dtype))
        return [own, asked] * LAYERS

    def cache_names(self) -> list[frozenset[str]]:
        return [frozenset((str(layer),)) for layer in range(LAYERS) for _ in ("near", "far")]

    def bind_cache(self, views: Sequence[Views]) -> None:
        for block, (near, far) in zip(self.language_model.blocks, zip(views[::2], views[1::2], strict=True), strict=True):
            block.near.attn.bind_cache(near)
            block.far.attn.bind_cache(far)

    def embed(self, ids: Tensor, features: Tensor | None = None) -> ModelInput:
        return ModelInput(self.language_model.tokens(ids))

    def forward(self, batch: ForwardBatch, state: ModelInput) -> Tensor:
        x = state.x
        for block in self.language_model.blocks:
            x = block(x, batch)
        return self.language_model.end(x)[0].values()

    @property
    def head(self) -> LMHead:
        return self.out

    def logits(self, hidden: Tensor) -> Tensor:
        return self.out(hidden)


def write(directory: Path, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of random weights; they are returned."""
    g = torch.Generator().manual_seed(seed)
    weights = {"language_model.tokens.weight": torch.randn(VOCAB, HIDDEN, generator=g)}
    weights["language_model.end.weight"] = 1 + 0.3 * torch.randn(HIDDEN, generator=g)
    for i in range(LAYERS):
        at = f"language_model.blocks.{i}"
        for name in ("first", "second"):
            weights[f"{at}.{name}.weight"] = 1 + 0.3 * torch.randn(HIDDEN, generator=g)
        shapes = {f"{kind}.{p}_proj": (HEADS * DIM, HIDDEN) for kind in ("near", "far") for p in "qkv"}
        shapes |= {"near.out": (HIDDEN, HEADS * DIM), "far.out": (HIDDEN, HEADS * DIM)}
        shapes |= {"up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
        for name, shape in shapes.items():
            weights[f"{at}.{name}.weight"] = torch.randn(shape, generator=g) / math.sqrt(shape[1])
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "toy", "vocab_size": VOCAB}))
    return weights


def logits_in_float64(weights: dict[str, Tensor], ids: Sequence[int]) -> Tensor:
    """[tokens, VOCAB] without a cache, in plain torch."""
    w = {name.removeprefix("language_model.").removesuffix(".weight"): value.double() for name, value in weights.items()}
    place = torch.arange(len(ids), dtype=torch.float64)
    angle = torch.outer(place, 10000.0 ** -(torch.arange(0, DIM, 2).double() / DIM))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(x: Tensor, at: str, window: int) -> Tensor:
        q, k, v = ((x @ w[f"{at}.{p}_proj"].T).view(-1, HEADS, DIM) for p in "qkv")
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) * DIM**-0.5
        apart = place[:, None] - place
        scores = scores.masked_fill((apart < 0) | (apart >= window), -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ w[f"{at}.out"].T

    x = w["tokens"][torch.tensor(ids)]
    for i in range(LAYERS):
        at = f"blocks.{i}"
        normed = norm(x, w[f"{at}.first"])
        x = x + attend(normed, f"{at}.near", WINDOW) + attend(normed, f"{at}.far", POSITIONS)
        x = x + F.relu(norm(x, w[f"{at}.second"]) @ w[f"{at}.up"].T).square() @ w[f"{at}.down"].T
    return norm(x, w["end"]) @ w["tokens"].T
