"""The weights of one rank as a plan notes them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from octavo.quant import QuantRules, Scheme
from octavo.quant.scheme import WeightDType
from octavo.weights.load_report import role_of

__all__ = ["COMPONENTS", "Operand", "Walk", "component_of"]

COMPONENTS = (
    "attention", "indexer", "mlp", "experts", "shared experts", "router", "norms", "embeddings", "lm_head", "vision",
)  # fmt: skip


@lru_cache(maxsize=1 << 16)
def component_of(name: str) -> str:
    """One of COMPONENTS, by a tensor's name in the checkpoint."""
    if ".indexer." in name and "norm" not in name:
        return "indexer"
    if name.endswith(".gate"):
        return "router"
    return {"embedding": "embeddings"}.get(role := role_of(name), role)


@dataclass(frozen=True, slots=True)
class Operand:
    """One weight, or the equal ones of a layer's experts, as one rank holds it. Bytes.

    names: the checkpoint's modules that are stacked, or a vector's tensor. whole, shape: [N, K] of the stack, and of the
    rank's part. form: how it is stored, in a word. stored: bytes without padding, held: with it. read: what a
    product reads of one copy. values: parameters of the rank's part. experts: how many there are; `active` multiply a token
    (0: rows are looked up). A tied head has no bytes and no parameters of its own.
    """

    component: str
    names: tuple[str, ...]
    whole: tuple[int, int]
    shape: tuple[int, int]
    scheme: Scheme
    form: str
    why: str
    stored: int
    held: int
    read: int
    values: int
    is_vector: bool = False
    experts: int = 1
    active: int = 1
    sharing: int = 1  # ranks that hold the same KV heads

    @property
    def quantized(self) -> bool:
        return self.scheme.quantized

    @property
    def is_fp8(self) -> bool:
        """Whether it is multiplied by FP8 units. Packed INT4 is not, nor is FP8 by activations as they are."""
        return self.scheme.dtype is WeightDType.FP8 and self.scheme.activation is not None


@dataclass(frozen=True)
class Walk:
    """The operands of one rank, and why the checkpoint would not load, a sentence each, as loading says it.

    position: bytes of a position in the table of rotary embeddings.
    """

    operands: list[Operand]
    problems: list[str]
    rules: QuantRules
    position: int = 0

    def total(self, what: str) -> int:
        """The sum of a field of the operands."""
        return sum(getattr(o, what) for o in self.operands)

    @property
    def active(self) -> int:
        """Parameters that multiply one token of text: no embeddings, no vision, of the experts those it is sent to."""
        weights = [o for o in self.operands if not o.is_vector and o.component != "vision"]
        return sum(o.active * o.shape[0] * o.shape[1] for o in weights)

    def parameters(self, stored: Collection[str] | None = None) -> dict[str, int]:
        """Of each component, or those of them that are among the tensors `stored`."""
        found = dict.fromkeys((c for c in COMPONENTS if any(o.component == c for o in self.operands)), 0)
        for o in self.operands:
            there = stored is None or any(f"{n}{end}" in stored for n in o.names for end in ("", ".weight", ".weight_packed"))
            found[o.component] += o.values if there else 0
        return found
