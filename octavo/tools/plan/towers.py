"""A vision tower, from its part of config.json: BF16, and split over ranks like text layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo.distributed import TensorParallel
from octavo.layers.linear import ColumnParallelLinear, RowParallelLinear
from octavo.quant import QuantRules
from octavo.tools.plan.model_source import Numbers
from octavo.tools.plan.walk import Walker

__all__ = ["VISION", "Kept", "Places", "Vectors", "qwen_tower"]

VISION = "the vision tower is BF16 by default: few bytes, and the published FP8 checkpoints leave it so"
Places = list[tuple[str, Any]]  # (path, layer): where in the checkpoint it reads


@dataclass
class Vectors:
    """Parameters of any shape that are never quantized, whole on every rank: name -> shape."""

    shapes: Mapping[str, tuple[int, ...]]

    def load(self, loader: Walker) -> None:
        for name, shape in self.shapes.items():
            loader.vector(name, shape)


@dataclass
class Kept:
    """A layer that is never quantized, and why."""

    layer: Any
    why: str

    def load(self, loader: Walker) -> None:
        self.layer.load(replace(loader, rules=QuantRules(), kept=self.why))


def _column(name: str, columns: int, rows: int, tp: TensorParallel) -> Kept:
    return Kept(ColumnParallelLinear([name], columns, [rows], bias=True, tp=tp), VISION)


def _row(name: str, columns: int, rows: int, tp: TensorParallel) -> Kept:
    return Kept(RowParallelLinear(name, columns, rows, bias=True, tp=tp), VISION)


def _norm(size: int) -> Vectors:
    return Vectors({"weight": (size,), "bias": (size,)})


def qwen_tower(v: Numbers, tp: TensorParallel) -> Places:
    """Qwen3-VL's: blocks, a merger after the last, and one after each layer whose features go into the text model."""
    at = "model.visual"
    hidden, inner, out = v["hidden_size"], v["intermediate_size"], v["out_hidden_size"]
    patch = (hidden, v.get("in_channels", 3), v["temporal_patch_size"], v["patch_size"], v["patch_size"])
    merged = hidden * v["spatial_merge_size"] ** 2
    places: Places = [(f"{at}.patch_embed.proj", Vectors({"weight": patch, "bias": (hidden,)})),
                     (f"{at}.pos_embed", Vectors({"weight": (v["num_position_embeddings"], hidden)}))]  # fmt: skip
    for i in range(v["depth"]):
        block = f"{at}.blocks.{i}"
        places += [(f"{block}.norm1", _norm(hidden)), (f"{block}.norm2", _norm(hidden)),
                         (f"{block}.attn", _column("qkv", hidden, 3 * hidden, tp)),
                         (f"{block}.attn", _row("proj", hidden, hidden, tp)),
                         (f"{block}.mlp", _column("linear_fc1", hidden, inner, tp)),
                         (f"{block}.mlp", _row("linear_fc2", inner, hidden, tp))]  # fmt: skip
    deep = [f"{at}.deepstack_merger_list.{i}" for i in range(len(v.values.get("deepstack_visual_indexes") or ()))]
    for merger in (f"{at}.merger", *deep):
        places += [(f"{merger}.norm", _norm(hidden if merger.endswith(".merger") else merged)),
                         (merger, _column("linear_fc1", merged, merged, tp)),
                         (merger, _row("linear_fc2", merged, out, tp))]  # fmt: skip
    return places
