"""Overwrites a loaded model's weights with others of the same shapes and schemes, so that captured graphs and tensor maps,
which hold addresses, stay valid."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import OctavoError
from octavo.ops import PackedStack, PackedWeight
from octavo.ops.contract import has_storage
from octavo.quant import QTensor, Scheme

__all__ = ["held", "refill"]

_HOLDERS = (PackedStack, PackedWeight, QTensor)  # their attributes are tensors
_KINDS = (Scheme, Enum, torch.dtype)  # attributes that describe how values are stored


def held(module: nn.Module) -> dict[str, Any]:
    """The weights of a loaded module, by attribute."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (Tensor, *_HOLDERS))}


def refill(module: nn.Module, before: dict[str, Any]) -> bool:
    """Copies the weights that `module` has newly loaded into its weights `before`, and restores those.

    Returns whether all could be copied: a tensor in a library's opaque layout is replaced instead. Raises OctavoError where a
    shape, a dtype or a kind of weight differs.
    """
    complete = True
    for name, new in held(module).items():
        old = before.get(name)
        if old is None or old is new:
            continue
        if isinstance(new, Tensor) and not has_storage(new):
            complete = False
            continue
        complete = _move(new, old, type(module).__name__) and complete
        setattr(module, name, old)
    return complete


def _move(new: Any, old: Any, where: str) -> bool:
    if type(new) is not type(old):
        raise _other(where, f"{type(new).__name__} where {type(old).__name__} was")
    if isinstance(new, Tensor):
        if new.shape != old.shape or new.dtype != old.dtype:
            raise _other(where, f"{list(new.shape)} {new.dtype} where {list(old.shape)} {old.dtype} was")
        old.copy_(new)
        return True
    complete = True
    for name, value in vars(new).items():  # checked before anything is copied, so that a refused reload leaves `old` intact
        previous = getattr(old, name)
        if (isinstance(value, _KINDS) or isinstance(previous, _KINDS)) and value != previous:
            raise _other(where, f"{_name_of(value)} where {_name_of(previous)} was")
    for name, value in vars(new).items():
        previous = getattr(old, name)
        if isinstance(value, Tensor) and not has_storage(value):
            setattr(old, name, value)
            complete = False
        elif isinstance(value, (Tensor, *_HOLDERS)) and previous is not None:
            complete = _move(value, previous, where) and complete
    return complete


def _name_of(kind: Any) -> str:
    return str(getattr(kind, "name", kind))


def _other(where: str, what: str) -> OctavoError:
    return OctavoError(
        f"weights can be reloaded only by weights of the same shapes and schemes ({where}: {what}); start the model anew."
    )
