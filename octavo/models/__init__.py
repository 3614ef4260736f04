"""Architectures: one file each, named by config.json's `model_type`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.files import check_directory, read_json
from octavo.version import __version__

if TYPE_CHECKING:
    from octavo.distributed import TensorParallel
    from octavo.models.interface import Model

__all__ = ["MODEL_TYPES", "architecture", "build_model", "check_length", "number_of_layers", "read_config", "same_architecture"]

MODEL_TYPES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "glm4_moe", "minimax_m2",
    "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm_moe_dsa",
)  # fmt: skip


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory. Raises OctavoError if the directory is not one."""
    check_directory(directory)
    config = read_json(directory / "config.json")
    assert config is not None, "check_directory has seen it"
    return config


def architecture(config: Mapping[str, Any]) -> Any:
    """The module of octavo.models for a config.json, with `Config.from_json` and `Model`. Raises OctavoError without one."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise OctavoError("config.json has no model_type, so the architecture cannot be known.")
    if model_type not in MODEL_TYPES:
        near = difflib.get_close_matches(model_type, MODEL_TYPES, n=1, cutoff=0.8)
        hint = f"did you mean '{near[0]}'? " if near else ""
        served = ", ".join(MODEL_TYPES)
        raise OctavoError(f"octavo {__version__} does not serve model_type '{model_type}' yet; {hint}it serves {served}.")
    return importlib.import_module(f"octavo.models.{model_type}")


def number_of_layers(config: Mapping[str, Any]) -> int:
    """How many layers the model of a config.json has. Raises OctavoError as `build_model`."""
    count: int = architecture(config).Config.from_json(config).num_hidden_layers
    return count


def check_length(max_model_len: int | None, limit: int) -> None:
    """Raises OctavoError for contexts longer than the `limit` positions that a model was made for."""
    if max_model_len is not None and max_model_len > limit:
        raise OctavoError(
            f"--max-model-len {max_model_len} is over the {limit} positions that the model was made for; use at most {limit}."
        )


def build_model(
    config: Mapping[str, Any],
    tp: TensorParallel,
    max_model_len: int | None,
    layers: range | None = None,
    *,
    vision: bool = False,
) -> Model:
    """The unloaded model of a config.json, for contexts of `max_model_len` tokens (None: the longest that it was made for).

    vision: with the vision tower, if the architecture has one.
    Raises OctavoError for an unsupported architecture or value, and for a context that is too long.
    """
    arch = architecture(config)
    c = arch.Config.from_json(config)
    limit: int = c.longest_context
    check_length(max_model_len, limit)
    towers = {"vision": True} if vision and hasattr(arch.Model, "encode") else {}
    model: Model = arch.Model(c, tp, max_model_len or limit, layers, **towers)
    return model


def same_architecture(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two config.json files describe the same model, apart from its weights."""
    one, other = architecture(a), architecture(b)
    return one is other and bool(one.Config.from_json(a) == other.Config.from_json(b))
