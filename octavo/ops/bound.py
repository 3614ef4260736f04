"""The implementation of each op that `octavo.ops.bind` has chosen for this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["bound"]

bound: dict[str, Callable[..., Any]] = {}  # by the op's name
