"""Where `octavo bench` looks for what octavo.weights.output has."""

from __future__ import annotations

from octavo.weights.output import write_json

__all__ = ["write_json"]
