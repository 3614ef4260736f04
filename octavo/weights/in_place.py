"""Overwrites a loaded model's weights with others of the same shapes and schemes, so that captured graphs and tensor maps,
which hold addresses, stay valid."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import OctavoError
from octavo.ops import PackedStack, PackedWeight
from octavo.ops.contract import has_storage
from octavo.quant import QTensor, Scheme

__all__ = ["Put", "fresh", "held", "overwrite", "rehearse"]

Put = Callable[[Any, Any], bool]  # puts what a Loader reads into a layer
_HOLDERS = (PackedStack, PackedWeight, QTensor)  # their attributes are tensors
_KINDS = (Scheme, Enum, torch.dtype)  # attributes that describe how values are stored


def held(module: nn.Module) -> dict[str, Any]:
    """The weights of a loaded module, by attribute."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (Tensor, *_HOLDERS))}


def fresh(module: Any, loader: Any) -> bool:
    """Loads a layer that has no weights yet, from a Loader at its path. True, as `overwrite` says it."""
    module.load(loader)
    return True


def overwrite(module: Any, loader: Any) -> bool:
    """Loads a layer anew and keeps the memory of its weights.

    Returns whether all could be copied: a tensor in a library's opaque layout is replaced instead. Raises OctavoError where a
    shape, a dtype or a kind of weight differs.
    """
    before = held(module)
    try:
        module.load(loader)
        pairs = _pairs(module, before)
        for new, old in pairs.values():
            _check(new, old, type(module).__name__)
        moved = [_move(new, old) for new, old in pairs.values()]
    except OctavoError:
        vars(module).update(before)  # graphs hold the addresses of these tensors
        raise
    for name, (_, old) in pairs.items():
        setattr(module, name, old)
    return all(moved) and not any(isinstance(value, Tensor) and not has_storage(value) for value in held(module).values())


def rehearse(module: Any, loader: Any) -> bool:
    """Reads all that `overwrite` would and raises what it would, and leaves the layer as it is."""
    trial = copy(module)
    trial.load(loader)
    for new, old in _pairs(trial, held(module)).values():
        _check(new, old, type(module).__name__)
    return True


def _pairs(module: Any, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The weights that were newly loaded and those that they replace, by attribute."""
    found = held(module).items()
    return {
        name: (new, before[name])
        for name, new in found
        if before.get(name) is not None and before[name] is not new and not (isinstance(new, Tensor) and not has_storage(new))
    }


def _check(new: Any, old: Any, where: str) -> None:
    """Raises OctavoError where `new` cannot be written over `old`."""
    if type(new) is not type(old):
        raise _other(where, f"{type(new).__name__} where {type(old).__name__} was")
    if isinstance(new, Tensor):
        if new.shape != old.shape or new.dtype != old.dtype:
            raise _other(where, f"{list(new.shape)} {new.dtype} where {list(old.shape)} {old.dtype} was")
        return
    for name, value in vars(new).items():
        previous = getattr(old, name)
        if (isinstance(value, _KINDS) or isinstance(previous, _KINDS)) and value != previous:
            raise _other(where, f"{_name_of(value)} where {_name_of(previous)} was")
        if (
            isinstance(value, (Tensor, *_HOLDERS))
            and previous is not None
            and not (isinstance(value, Tensor) and not has_storage(value))
        ):
            _check(value, previous, where)


def _move(new: Any, old: Any) -> bool:
    """Copies `new`, which `_check` has passed, into `old`. False where something was replaced instead."""
    if isinstance(new, Tensor):
        old.copy_(new)
        return True
    complete = True
    for name, value in vars(new).items():
        previous = getattr(old, name)
        if isinstance(value, Tensor) and not has_storage(value):
            setattr(old, name, value)
            complete = False
        elif isinstance(value, (Tensor, *_HOLDERS)) and previous is not None:
            complete = _move(value, previous) and complete
    return complete


def _name_of(kind: Any) -> str:
    return str(getattr(kind, "name", kind))


def _other(where: str, what: str) -> OctavoError:
    return OctavoError(
        f"weights can be reloaded only by weights of the same shapes and schemes ({where}: {what}); start the model anew."
    )
