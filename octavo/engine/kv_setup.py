"""The scales of an FP8 cache: the checkpoint's, or measured on a fixed text (--calculate-kv-scales), or 1.0."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.models.interface import CalibratedModel, Model
from octavo.text.tokenizer import Tokenizer

__all__ = ["calibration_tokens", "settle_kv_scales"]

TEXT = """\
The harbour was quiet when the first boats came in. Twelve baskets of herring, four of mackerel; the price had fallen again, to
3.75 a kilo, and nobody spoke of it. "We should have gone north," said Ines, and her brother nodded: north, yes, on the 14th.

def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

Question: If a train leaves at 09:40 and travels 210 km at 84 km/h, when does it arrive?
Answer: 210 / 84 = 2.5 hours, so it arrives at 12:10.

{"name": "Octavo", "tags": ["paper", "format"], "pages": 8, "bound": true, "price": null}

Les feuilles pliées trois fois donnent seize pages. Ein Bogen, dreimal gefalzt, ergibt acht Blätter. 一张纸折三次，得到八页。
SELECT city, COUNT(*) FROM orders WHERE total > 100 GROUP BY city ORDER BY 2 DESC;
"""


def calibration_tokens(directory: Path, vocab_size: int) -> list[int]:
    """Token ids of the text, in the model's own tokens; without a tokenizer, 512 random ones, the same every time."""
    try:
        return Tokenizer(directory).encode(TEXT)
    except OctavoError:
        return random.Random(0).choices(range(vocab_size), k=512)


def settle_kv_scales(model: Model, config: EngineConfig, run: Callable[[], object]) -> str | None:
    """Measures the scales if that is asked for, with `run`, which puts the text through the model. What to say of them."""
    if not hasattr(model, "kv_scales"):
        return None
    scaled = cast("CalibratedModel", model)
    if config.kv_cache_dtype not in ("fp8_e4m3", "fp8_e5m2"):
        unused = f"the checkpoint has KV scales, which --kv-cache-dtype {config.kv_cache_dtype} does not use; fp8 does"
        return unused if scaled.kv_scales()[1] else None
    if config.calculate_kv_scales:
        scaled.calibrate(run)
        values = [float(value) for scale in scaled.kv_scales()[0] for value in scale.view(-1)]
        return f"KV scales measured: {min(values):.3g} to {max(values):.3g}"
    if scaled.kv_scales()[1]:
        return "KV scales taken from the checkpoint"
    return "KV scales are 1.0: the checkpoint has none (--calculate-kv-scales measures them)"
