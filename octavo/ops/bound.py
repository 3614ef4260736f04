"""The implementation of each op that `octavo.ops.bind` has chosen for this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octavo.errors import OctavoError

__all__ = ["bound", "bound_for", "check_device"]

bound: dict[str, Callable[..., Any]] = {}  # by the op's name
_device = ""  # the kind of device that `bound` is for, as torch names it


def bound_for(device: torch.device) -> None:
    """`bound` is from now on for this kind of device."""
    global _device
    _device = device.type


def check_device(device: torch.device) -> None:
    """Raises OctavoError where `bound` is for another kind of device, whose kernels would be given this one's addresses."""
    if device.type != _device:
        raise OctavoError(
            f"another model was started on {_device} in this process after this one on {device.type}; the two need processes "
            "of their own."
        )
