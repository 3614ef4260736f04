"""Loads checkpoints into models, one named, sharded tensor at a time.

sources: tensors by name, from files or generated. loader: fills a model with them. checkpoint: safetensors files in parts.
"""

from __future__ import annotations

from octavo.weights.load_report import LoadReport
from octavo.weights.loader import WHOLE, Loader, Shard, load
from octavo.weights.sources import DummySource, SafetensorsSource

__all__ = ["WHOLE", "DummySource", "LoadReport", "Loader", "SafetensorsSource", "Shard", "load"]
