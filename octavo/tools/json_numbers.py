"""Numbers as JSON spells them, which has neither NaN nor infinity."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["finite", "json_text"]


def finite(value: Any) -> Any:
    """`value` with None in the place of every number, however deep, that is none."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any) -> str:
    """JSON for a person and for every reader: indented, with null where a number is NaN or infinite."""
    return json.dumps(finite(value), indent=2, allow_nan=False)
