"""Paths of the embedded demo model and of its held-out text."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
HELDOUT: Path = Path(__file__).parent / "heldout.txt"
