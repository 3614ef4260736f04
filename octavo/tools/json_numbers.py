"""Numbers for JSON, which has neither NaN nor infinity."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["finite", "json_text"]


def finite(value: Any) -> Any:
    """`value` with every NaN or infinite number in it, at any depth, replaced by None."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any) -> str:
    """Indented JSON, with null for NaN or infinite numbers."""
    return json.dumps(finite(value), indent=2, allow_nan=False)
