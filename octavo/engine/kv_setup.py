"""The formats of a model's caches and their name, and the scales of an FP8 cache: the checkpoint's, measured on a fixed text
(--calculate-kv-scales), or 1.0."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from octavo.config import EngineConfig
from octavo.convert.key_rounding import read_key_rounding
from octavo.errors import OctavoError
from octavo.files import KEY_ROUNDING
from octavo.kvcache import KVCacheSpec, Layout
from octavo.models.interface import CalibratedModel, Model
from octavo.platform import Platform
from octavo.quant.checks import cache_format_said
from octavo.text.tokenizer import Tokenizer

__all__ = [
    "SCALED",
    "cache_format",
    "cache_specs",
    "calibration_tokens",
    "check_kv_scales",
    "set_key_rounding",
    "set_kv_scales",
]

SCALED = ("fp8_e4m3", "fp8_e5m2")  # cache dtypes with a scale for each layer's keys and values
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


def cache_specs(
    model: Model, kv_cache_dtype: str, dtype: torch.dtype, platform: Platform, skipped: Sequence[str] = ()
) -> list[KVCacheSpec]:
    """The cache specs of the model on this platform. `dtype`: the model's. skipped: layers, as --kv-cache-dtype-skip-layers
    names them, whose caches are in `dtype`. Raises OctavoError for layers that there are not, or whose cache cannot be.
    """
    specs = model.kv_specs(kv_cache_dtype, dtype, platform.fp8_dtype, Layout.on(platform.is_cpu))
    if not skipped:
        return specs
    names, asked = model.cache_names(), set(skipped)
    if missing := asked - {"sliding_window"}.union(*names):
        numbers = sorted(int(name) for found in names for name in found if name.isdecimal())
        raise OctavoError(
            f"--kv-cache-dtype-skip-layers names layer {min(missing, key=int)}; the model's are {numbers[0]} to {numbers[-1]}."
        )
    own = cache_specs(model, "auto", dtype, platform)
    chosen = [of_model for found, of_model in zip(names, own, strict=True) if asked & found]
    if any(field.dtype == platform.fp8_dtype for spec in chosen for field in spec.fields):
        raise OctavoError(
            f"--kv-cache-dtype-skip-layers cannot keep layers in {str(dtype).removeprefix('torch.')}: this model's sparse "
            "attention reads a cache in FP8; leave it out."
        )
    return [of_model if asked & found else spec for found, spec, of_model in zip(names, specs, own, strict=True)]


def cache_format(specs: Sequence[KVCacheSpec], kv_cache_dtype: str) -> str:
    """The name of a cache of `specs` for the report, and the bytes per token where a token is one row per layer.

    `kv_cache_dtype`: the canonical option value. The name says so where it means another format for this model.
    """
    kinds = {spec.name: spec for spec in sorted(specs, key=lambda spec: not spec.interleaved) if spec.name}
    names = list(kinds)
    asked = {"fp8_e4m3": "fp8"}.get(kv_cache_dtype, kv_cache_dtype)
    if "fp8_ds_mla" in names and kv_cache_dtype != "fp8_ds_mla":
        names[names.index("fp8_ds_mla")] += f" (what --kv-cache-dtype {asked} means here)"
    rows = [str(spec.bytes_per_token) for spec in kinds.values()]
    row = f", {' + '.join(rows)} bytes a token a layer" if any(spec.interleaved for spec in specs) else ""
    return (" and ".join(names) or kv_cache_dtype) + row


def check_kv_scales(model: Model, config: EngineConfig, json_config: Mapping[str, Any]) -> None:
    """Raises OctavoError where --calculate-kv-scales or --kv-cache-rounding asks for what the model's caches or the checkpoint
    do not have, and where the checkpoint's scales are for another format: such of FP4 would clip most of the values of FP8."""
    directory, scaled = Path(config.model), hasattr(model, "kv_scales")
    said = cache_format_said(json_config, directory if directory.is_dir() else None)  # a plan may have a config.json alone
    if said not in ("", "FP8") and scaled and config.kv_cache_dtype in SCALED and not config.calculate_kv_scales:
        raise OctavoError(
            f"the checkpoint's KV scales are for a cache in {said}, and no FP8 cache can use them; "
            "add --calculate-kv-scales, or leave --kv-cache-dtype fp8 out."
        )
    if config.calculate_kv_scales and not scaled:
        raise OctavoError(
            "--calculate-kv-scales has nothing to measure for this model: an FP8 cache of MLA, fp8_ds_mla, takes the scales of "
            "each token as it is written; leave the flag out."
        )
    if config.kv_cache_rounding == "calibrated" and not scaled:
        raise OctavoError("--kv-cache-rounding calibrated is for keys, and MLA's cache holds latents; leave it out.")
    if config.kv_cache_rounding == "calibrated" and config.kv_cache_dtype not in SCALED:
        raise OctavoError(
            f"--kv-cache-rounding calibrated is for an FP8 cache with one scale a layer or head, not for --kv-cache-dtype "
            f"{config.kv_cache_dtype}; use fp8, or leave it out."
        )
    if config.kv_cache_rounding == "calibrated" and config.calibrate is None and directory.is_dir():
        places = [Path(place) for place in (config.save_quantized, config.model) if place]
        if not any((place / KEY_ROUNDING).exists() for place in places):
            read_key_rounding(directory, range(0))  # says so, before minutes are spent on the weights


def set_key_rounding(model: Model, config: EngineConfig, directory: Path, *, check_only: bool) -> list[str]:
    """Has caches round keys as --kv-cache-rounding says, by what calibration left beside the checkpoint in `directory`.

    check_only: reads it and changes nothing. Returns notes for the report. Raises OctavoError where the checkpoint has none.
    """
    if config.kv_cache_rounding == "nearest":
        return []
    cast("CalibratedModel", model).set_key_rounding(partial(read_key_rounding, directory), check_only=check_only)
    return [f"keys are rounded by what queries read of them, as {KEY_ROUNDING} has it, in a kernel of its own"]


def calibration_tokens(directory: Path, vocab_size: int) -> list[int]:
    """Token ids of TEXT by the model's tokenizer; without a tokenizer, 512 random ids, the same every time."""
    try:
        return Tokenizer(directory).encode(TEXT)
    except OctavoError:
        return random.Random(0).choices(range(vocab_size), k=512)


def set_kv_scales(model: Model, config: EngineConfig, run: Callable[[], object]) -> str | None:
    """Measures the scales if asked for; `run` puts TEXT through the model. Returns a note for the report."""
    if not hasattr(model, "kv_scales"):
        return None
    scaled = cast("CalibratedModel", model)
    if config.kv_cache_dtype not in SCALED:
        if config.calculate_kv_scales:
            return f"--calculate-kv-scales measured nothing: --kv-cache-dtype {config.kv_cache_dtype} has no scales for it"
        unused = f"the checkpoint has KV scales, which --kv-cache-dtype {config.kv_cache_dtype} does not use; fp8 does"
        return unused if scaled.kv_scales()[1] else None
    if config.calculate_kv_scales:
        scaled.calibrate(run)
        values = [float(value) for scale in scaled.kv_scales()[0] for value in scale.view(-1)]
        return f"KV scales measured: {min(values):.3g} to {max(values):.3g}"
    scales, stored = scaled.kv_scales()
    if stored:
        part = f", which has them of {stored} of {len(scales) // 2} layers; the others' are 1.0"
        return "KV scales taken from the checkpoint" + part * (2 * stored < len(scales))
    return "KV scales are 1.0: the checkpoint has none (--calculate-kv-scales measures them)"
