"""Plans without a terminal, and checkpoints that are headers only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.cli import engine_config, make_parser
from octavo.tools.plan import plan as tool
from octavo.tools.plan.variants import Plan

SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4, "I64": 8}
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def plan_of(*words: str) -> Plan:
    """The plan of a command line."""
    args = make_parser("plan", tool.add_arguments).parse_args(words)
    config = engine_config(args, downloads=False)
    given = {name: value for name, value in vars(args).items() if value is not None}
    return tool.make_plan(args, config, given)


def answer(*words: str) -> dict[str, Any]:
    """What --json says."""
    plan = plan_of(*words)
    found: dict[str, Any] = json.loads(json.dumps(tool.as_json(plan, "")))
    return found


def llama_tensors(scheme: str = "bf16", config: Mapping[str, Any] = TINY_LLAMA) -> Tensors:
    """Every tensor of a llama checkpoint: bf16, fp8 (a scalar scale), channel, block or int4 (groups of 32)."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    shapes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    out: Tensors = {f"{name}.weight": ("BF16", (vocab, hidden)) for name in ("model.embed_tokens", "lm_head")}
    out["model.norm.weight"] = ("BF16", (hidden,))
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        out |= {f"{at}.{name}.weight": ("BF16", (hidden,)) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, shape in shapes.items():
            out |= _matrix(f"{at}.{name}", shape, scheme)
    return out


def _matrix(name: str, shape: tuple[int, int], scheme: str) -> Tensors:
    n, k = shape
    if scheme == "bf16":
        return {f"{name}.weight": ("BF16", shape)}
    if scheme == "int4":
        packed = {f"{name}.weight_packed": ("I32", (n, k // 8)), f"{name}.weight_scale": ("BF16", (n, k // 32))}
        return {**packed, f"{name}.weight_shape": ("I64", (2,))}
    scale = {"fp8": (), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}[scheme]
    spelled = "weight_scale_inv" if scheme == "block" else "weight_scale"
    return {f"{name}.weight": ("F8_E4M3", shape), f"{name}.{spelled}": ("F32", scale)}


def write_headers(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """A safetensors file of the right length whose weights are a hole in the file."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def checkpoint(directory: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], **config: Any) -> str:
    """A checkpoint directory of one file; its path."""
    (directory / "config.json").write_text(json.dumps(TINY_LLAMA | config))
    write_headers(directory / "model.safetensors", tensors)
    return str(directory)
