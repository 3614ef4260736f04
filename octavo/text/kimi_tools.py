"""Tools as Kimi's own tokenizer hands them to its chat template: the keys of their JSON in order.

Kimi's checkpoints have a program for that (deep_sort_dict of tokenization_kimi.py), which is not run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["as_kimi_has_them", "is_kimis_template"]


def is_kimis_template(template: str) -> bool:
    """By a token that no other family has."""
    return "<|im_middle|>" in template


def as_kimi_has_them(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The same tools; of each object in them the keys in the order of their characters."""
    return [_in_order(tool) for tool in tools]


def _in_order(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(entry) for entry in value] if isinstance(value, list) else value
