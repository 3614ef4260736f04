"""Which KV caches a model has, by its own word."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.models import read_config
from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.model_source import source_of_config
from octavo.tools.plan.subject import Subject, Variant

__all__ = ["KV_NAMES", "kv_names", "own_kv", "stored_as"]

# In the order of the ladder: what takes the least memory, or is the most usual, first. `auto` is here the model's own dtype.
KV_NAMES = ("fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "auto")


def kv_names(config: EngineConfig, asked: Sequence[str]) -> list[str]:
    """Of KV_NAMES those that the canonical `asked` come to, in that order; none asked: all that the model has.

    Raises OctavoError, in the model's words, for one that it has not.
    """
    subject = _subject(config.model, config.dtype)
    if asked:
        return sorted({_of(subject, name) for name in asked}, key=KV_NAMES.index)
    found = []
    for name in KV_NAMES[:-1]:
        try:
            found.append(_of(subject, name))
        except OctavoError:  # it is offered for other models
            continue
    return [*found, "auto"]


def own_kv(config: EngineConfig) -> str:
    """The `--kv-cache-dtype` that keeps this model's cache in its own dtype."""
    subject = _subject(config.model, config.dtype)
    return subject.own_kv(subject.itemsize)


def stored_as(config: EngineConfig, kv_cache_dtype: str) -> str:
    """What this model makes of a canonical `--kv-cache-dtype`, as its cache calls it."""
    subject = _subject(config.model, config.dtype)
    return subject.cache_format(Variant("bf16", False, kv_cache_dtype, subject.itemsize))


def _of(subject: Subject, name: str) -> str:
    own, given = (
        subject.caches(Variant("bf16", False, kv, subject.itemsize), 1) for kv in (subject.own_kv(subject.itemsize), name)
    )
    return "auto" if given == own else subject.kv_word(name, subject.itemsize)


@cache
def _subject(model: str, dtype: str) -> Subject:
    source = source_of_config(model, "config.json", read_config(Path(model)))
    return Subject(source, EngineConfig(model=model, dtype=dtype, language_model_only=True), Accelerator("any", "any", 0))
