"""What `octavo compare` found: every measurement, and what it comes to. The table and the report show it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from octavo.config import EngineConfig
from octavo.tools.compare.layer_errors import LayerError, Sensitivity
from octavo.tools.compare.measure import Measurement
from octavo.tools.compare.search import Budget

__all__ = ["Comparison"]


@dataclass
class Comparison:
    """Everything that was measured, and what it comes to."""

    model: str
    engine: EngineConfig  # the user's, from which each variant's is made
    predictions: int
    window: int
    context: int  # tokens of the longest request
    greedy: int  # tokens of each greedy continuation
    budget: Budget
    reference: Measurement
    measured: list[Measurement]
    layers: list[LayerError]
    text: str = "token ids"
    decoded: int = 0  # tokens at the end of each window that were read by decode steps, and alone count
    scheme: str = ""  # the one that the layers were ranked for
    ranked: list[Sensitivity] = field(default_factory=list)
    kept: list[Sensitivity] = field(default_factory=list)  # of `ranked`, those that hold most of the loss
    verdict: str = ""
    chosen: Measurement | None = None
    notes: list[str] = field(default_factory=list)
    machine: str = ""
    command: str = ""  # that this is the result of
    date: str = ""
    saved: str = ""  # the file for --quantization-config, where one was written

    def as_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {k: v for k, v in vars(self).items() if isinstance(v, (str, int))}
        for name in ("reference", "chosen"):
            out[name] = m.as_json() if (m := getattr(self, name)) is not None else None
        out["measured"] = [m.as_json() for m in self.measured]
        for name in ("layers", "ranked"):
            out[name] = [asdict(entry) for entry in getattr(self, name)]
        decided = self.chosen is not None and self.budget.decided(self.chosen)
        return {**out, "budget": str(self.budget), "decided": decided, "quantization_ignore": self.ignore, "notes": self.notes}

    @property
    def ignore(self) -> list[str]:
        """The `--quantization-ignore` list that takes most of the loss away."""
        return [name for layer in self.kept for name in layer.names]

    def memory(self, m: Measurement) -> float:
        """Weights and the KV cache of one longest request, as a part of BF16's."""
        return m.memory(self.context) / self.reference.memory(self.context)

    def row_of(self, scheme: str) -> Measurement:
        """The measurement of `scheme` with nothing kept in BF16, with the dearest of the KV dtypes measured."""
        plain = [m for m in self.measured if not (m.variant.ignore or m.variant.calibrated or m.variant.decode != "auto")]
        found = [m for m in plain if m.variant.scheme == scheme]
        return max(found, key=lambda m: m.kv_bytes_per_token)
