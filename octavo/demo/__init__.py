"""The embedded demo model: where its files are and the text it was never trained on."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
HELDOUT: Path = Path(__file__).parent / "heldout.txt"
