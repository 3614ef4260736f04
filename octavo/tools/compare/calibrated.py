"""A calibrated checkpoint, or another of the same model's codes, beside the model that it was made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from octavo.config import EngineConfig
from octavo.convert.output_directory import ORIGIN
from octavo.errors import OctavoError
from octavo.models import read_config, same_architecture
from octavo.quant import SCHEMES
from octavo.quant.stored_format import stored_format_of

__all__ = ["made_by", "served_schemes"]


@cache
def made_by(directory: str) -> str:
    """What a checkpoint's codes are called: "calibrated" where it says that Octavo made them so, "as stored" otherwise."""
    try:
        origin = json.loads((Path(directory) / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        origin = {}
    return "calibrated" if "calibration" in origin else "as stored"


def served_schemes(directory: Path, schemes: Sequence[str], config: EngineConfig) -> list[str]:
    """Those of `schemes` in which the codes of the checkpoint `directory` are served as they are.

    Raises OctavoError for another model than `config` has, and for a checkpoint in none of them.
    """
    described = read_config(directory)
    if not same_architecture(described, read_config(Path(config.model))):
        raise OctavoError(f"--calibrated {directory} is of another model than {config.model}; name what was made of it.")
    stored = stored_format_of(described, directory)
    found = [
        name
        for name in schemes
        if stored is not None and stored.scheme is not None and SCHEMES[name].has_codes_of(stored.scheme)
    ]
    if not found:
        kind = "not quantized" if stored is None or stored.scheme is None else f"in {stored.scheme.name}"
        raise OctavoError(
            f"--calibrated {directory} is {kind}, and none of {', '.join(schemes)} has such codes; "
            "make it with octavo quantize --calibrate in one of these schemes."
        )
    return found
