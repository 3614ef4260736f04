"""The weights of the two vision towers, from their part of config.json."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from octavo.tools.plan.sizes import VECTOR, Weight

if TYPE_CHECKING:
    from octavo.tools.plan.shapes import Numbers

__all__ = ["KEPT", "kimi_vision", "qwen_vision"]

KEPT = "the vision tower is BF16 by default: few bytes, and the published FP8 checkpoints leave it so"


def _linear(name: str, rows: int, columns: int, split: str) -> list[Weight]:
    bias = Weight("vision", (f"{name}.bias",), ((rows,),), "rows" if split == "rows" else "whole", kept=VECTOR)
    return [Weight("vision", (name,), ((rows, columns),), split, kept=KEPT), bias]


def _norm(name: str, size: int) -> list[Weight]:
    return [Weight("vision", (f"{name}.{part}",), ((size,),), kept=VECTOR) for part in ("weight", "bias")]


def _table(name: str, *shape: int) -> Weight:
    """A convolution or an embedding of positions: whole on every rank."""
    return Weight("vision", (name,), (shape,), active=0, kept=KEPT)


def qwen_vision(c: Numbers) -> list[Weight]:
    """Qwen3-VL's: blocks, a merger after the last, and one after each layer whose features go into the text model."""
    hidden, inner, out, at = c["hidden_size"], c["intermediate_size"], c["out_hidden_size"], "model.visual"
    patch = (c.get("in_channels", 3), c["temporal_patch_size"], c["patch_size"], c["patch_size"])
    merged = hidden * c["spatial_merge_size"] ** 2
    weights = [_table(f"{at}.patch_embed.proj", hidden, *patch), *_norm(f"{at}.patch_embed.proj", hidden)[1:]]
    weights.append(_table(f"{at}.pos_embed", c["num_position_embeddings"], hidden))
    for i in range(c["depth"]):
        block = f"{at}.blocks.{i}"
        weights += _norm(f"{block}.norm1", hidden) + _norm(f"{block}.norm2", hidden)
        weights += _linear(f"{block}.attn.qkv", 3 * hidden, hidden, "rows")
        weights += _linear(f"{block}.attn.proj", hidden, hidden, "columns")
        weights += _linear(f"{block}.mlp.linear_fc1", inner, hidden, "rows")
        weights += _linear(f"{block}.mlp.linear_fc2", hidden, inner, "columns")
    deep = [f"{at}.deepstack_merger_list.{i}" for i in range(len(c.values.get("deepstack_visual_indexes") or ()))]
    for merger in (f"{at}.merger", *deep):
        weights += _norm(f"{merger}.norm", hidden if merger.endswith(".merger") else merged)
        weights += _linear(f"{merger}.linear_fc1", merged, merged, "rows")
        weights += _linear(f"{merger}.linear_fc2", out, merged, "columns")
    return weights


def kimi_vision(c: Numbers, text_hidden: int) -> list[Weight]:
    """MoonViT and its projector. The hub's config prefixes its fields with vt_, transformers' does not."""

    def either(name: str, hub: str) -> int:
        return c.get(hub, c.get(name, 0, least=0), least=1) or c[name]

    hidden, inner = either("hidden_size", "vt_hidden_size"), either("intermediate_size", "vt_intermediate_size")
    layers, patch = either("num_hidden_layers", "vt_num_hidden_layers"), c["patch_size"]
    height, width = either("pos_emb_height", "init_pos_emb_height"), either("pos_emb_width", "init_pos_emb_width")
    kernel = c.values.get("merge_kernel_size") or (2, 2)
    merged, at = hidden * prod(kernel), "vision_tower"
    weights = [_table(f"{at}.patch_embed.proj", hidden, 3, patch, patch), *_norm(f"{at}.patch_embed.proj", hidden)[1:]]
    weights.append(_table(f"{at}.patch_embed.pos_emb", height, width, hidden))
    for i in range(layers):
        block = f"{at}.encoder.blocks.{i}"
        weights += _norm(f"{block}.norm0", hidden) + _norm(f"{block}.norm1", hidden)
        weights += _linear(f"{block}.wqkv", 3 * hidden, hidden, "rows") + _linear(f"{block}.wo", hidden, hidden, "columns")
        weights += _linear(f"{block}.mlp.fc0", inner, hidden, "rows") + _linear(f"{block}.mlp.fc1", hidden, inner, "columns")
    weights += _norm(f"{at}.encoder.final_layernorm", hidden) + _norm("mm_projector.pre_norm", hidden)
    weights += _linear("mm_projector.proj.0", merged, merged, "rows")
    return weights + _linear("mm_projector.proj.2", text_hidden, merged, "columns")
