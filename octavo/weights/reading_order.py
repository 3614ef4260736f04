"""The order in which a model's layers read a checkpoint's tensors, so that files can be read ahead."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["reading_order"]


def reading_order(paths: Sequence[str], names: Collection[str]) -> list[str]:
    """The tensors in approximately the order in which the modules at `paths` read them."""
    below: dict[str, list[str]] = {}
    for name in sorted(names, key=_in_numbers):  # experts are read in numerical order
        owner = name.rpartition(".")[0]
        while owner:
            below.setdefault(owner, []).append(name)
            owner = owner.rpartition(".")[0]
    # A tied or fused layer at the top has the path "", which contains everything: unclaimed names come last.
    return list(dict.fromkeys([name for path in paths for name in below.get(path, ())] + sorted(names)))


def _in_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
