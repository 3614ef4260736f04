"""Weight formats that a config.json announces, for checkpoints without weight files: the counterpart of quant.formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.quant.checks import EXCLUDING, quantization_configs
from octavo.quant.qtensor import scale_shape
from octavo.quant.rules import QuantRules
from octavo.quant.scheme import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Scheme

__all__ = ["StoredFormat", "left_out", "stored_format_of"]


ALL_BUT_TEXT = "re:(?!.*language_model).*"  # the text model's path in checkpoints of multimodal models


@dataclass(frozen=True)
class StoredFormat:
    """What `quantization_config` says of the weights: their FP8 scheme or INT4 in groups of so many; modules left out.

    others: modules that are stored otherwise, by name or re:, and how. weight_only: activations of FP8 weights stay.
    """

    scheme: Scheme | None
    group: int
    ignore: tuple[str, ...]
    others: tuple[tuple[tuple[str, ...], StoredFormat], ...] = ()
    weight_only: bool = False

    def of(self, module: str) -> StoredFormat:
        """What is said of the weights of this module."""
        return next((own for names, own in self.others if QuantRules(ignore=names).ignored(module)), self)

    def leaves_out(self, module: str) -> bool:
        """Whether the checkpoint's own ignore list excludes the module: by its name, a parent's name, or re:."""
        return any(module.startswith(f"{pattern}.") for pattern in self.ignore) or QuantRules(ignore=self.ignore).ignored(
            module
        )

    def tensors(self, n: int, k: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """The tensors of a matrix [n, k] in the checkpoint: the last part of each name, its dtype and its shape."""
        if self.scheme is None:
            return [("weight_packed", "I32", (n, -(-k // 8))), ("weight_scale", "BF16", (n, -(-k // self.group)))]
        shape = () if self.scheme is FP8_PER_TENSOR else scale_shape((n, k), self.scheme.weight)
        return [("weight", "F8_E4M3", (n, k)), ("weight_scale", "F32", shape)]


def left_out(config: Mapping[str, Any], module: str) -> bool:
    """Whether a config.json of a quantized checkpoint excludes the module by its own list."""
    try:
        listed = [pattern for entry in quantization_configs(config) for pattern in _listed(entry)]
    except (OctavoError, TypeError, AttributeError):
        return False  # check_format says it
    return StoredFormat(None, 0, tuple(listed)).leaves_out(module)


def _listed(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that an entry excludes, by name, glob or re:."""
    return tuple(pattern for key in EXCLUDING for pattern in entry.get(key) or () if _compiles(pattern))


def stored_format_of(config: Mapping[str, Any], directory: Path | None = None) -> StoredFormat | None:
    """The format that `quantization_config` announces, which must be a readable one; None for a BF16 checkpoint."""
    found: Mapping[str, Any] = next(iter(quantization_configs(config, directory)), {})
    ignore = _listed(found)
    if found and not quantization_configs({**config, "text_config": None}, directory):
        ignore += (ALL_BUT_TEXT,)  # said within text_config, of the text model alone
    method = found.get("quant_method")
    if method == "compressed-tensors" or "config_groups" in found:
        groups = [group for group in (found.get("config_groups") or {}).values() if isinstance(group, dict)]
        of_class = next((group for group in groups if "Linear" in (group.get("targets") or ())), *groups[:1] or ({},))
        others = (group for group in groups if group is not of_class)
        named = tuple((tuple(filter(_compiles, group.get("targets") or ())), _of_group(group, ignore)) for group in others)
        return replace(_of_group(of_class, ignore), others=named)
    if method == "quark":
        weight = (found.get("global_quant_config") or {}).get("weight") or {}
        weight = weight[0] if isinstance(weight, list) else weight
        return StoredFormat(_by_strategy(str(weight.get("qscheme", "per_tensor"))), 0, ignore)
    if method == "fp8" and found.get("weight_block_size"):
        return StoredFormat(FP8_BLOCK, 0, ignore)
    if method == "modelopt":
        algorithm = str(found.get("quant_algo") or "").upper()
        scheme = FP8_BLOCK if "_PB_" in algorithm else _by_strategy(algorithm.lower())
        return StoredFormat(scheme, 0, ignore) if algorithm else None
    return StoredFormat(FP8_PER_CHANNEL if method == "fbgemm_fp8" else FP8_PER_TENSOR, 0, ignore) if found else None


def _of_group(group: Mapping[str, Any], ignore: tuple[str, ...]) -> StoredFormat:
    """Of one of compressed-tensors' groups."""
    weights = group.get("weights") or {}
    if weights.get("type") == "int":
        return StoredFormat(None, int(weights.get("group_size") or 32), ignore)
    weight_only = bool(weights) and group.get("input_activations") is None
    return StoredFormat(_by_strategy(str(weights.get("strategy", "tensor"))), 0, ignore, weight_only=weight_only)


def _by_strategy(strategy: str) -> Scheme:
    by_channel = "channel" in strategy or "_pc_" in strategy  # ModelOpt's FP8_PC_PT
    return FP8_BLOCK if "block" in strategy else FP8_PER_CHANNEL if by_channel else FP8_PER_TENSOR


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error:
        return False
    return True
