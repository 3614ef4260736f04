"""Sizes of the loaded weights, by role and scheme."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from octavo.quant import Scheme
from octavo.quant.scheme import WeightDType

__all__ = ["GroupReport", "LoadReport", "role_of"]

TOWER = re.compile(r"(^|\.)(visual|vision_tower|mm_projector)\.")  # in paths of what reads images


@dataclass
class GroupReport:
    """Bytes of the weights that share a role (attention, mlp, embedding, ...) and a scheme with dtype `dtype`."""

    dtype: WeightDType
    tensors: int = 0
    parameters: int = 0  # of the model; a tied head's are counted at the embedding, here and below
    values: int = 0  # those that this rank holds
    dense: int = 0  # bytes in BF16 of the weights stored here
    stored: int = 0
    held: int = 0


@dataclass
class LoadReport:
    """The weights that a rank has loaded: (role, scheme name) -> GroupReport."""

    groups: dict[tuple[str, str], GroupReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, path: str, scheme: Scheme, parameters: int, values: int, stored: int, held: int) -> None:
        group = self.groups.setdefault((role_of(path), scheme.name), GroupReport(scheme.dtype))
        group.tensors += 1
        group.parameters += parameters
        group.values += values
        group.dense += 2 * values
        group.stored += stored
        group.held += held

    def note(self, text: str) -> None:
        """Adds a note once, even if several layers report it."""
        if text not in self.notes:
            self.notes.append(text)

    def total(self, what: str, dtype: WeightDType | None = None) -> int:
        """Sum of a GroupReport's field over all groups, or over those stored in `dtype`."""
        return sum(getattr(g, what) for g in self.groups.values() if dtype in (None, g.dtype))


@lru_cache(maxsize=1 << 16)  # a plan asks for the same names once a variant
def role_of(path: str) -> str:
    """The role of the weight at `path`: attention, experts, shared experts, router, mlp, embedding, lm_head or norms.

    All of a vision tower is vision.
    """
    roles = {
        "attention": "attn", "experts": ".experts.", "shared experts": ".shared_experts.", "router": ".gate.", "mlp": "mlp",
        "embedding": "embed", "lm_head": "lm_head",
    }  # fmt: skip
    if TOWER.search(path):
        return "vision"
    if path.endswith("e_score_correction_bias"):
        return "router"
    return next((role for role, word in roles.items() if word in path and "norm" not in path), "norms")
