"""Loads a model as an EngineConfig says, and reports sizes and times."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from octavo.config import EngineConfig
from octavo.convert.save_quantized import save_quantized
from octavo.distributed import TensorParallel
from octavo.engine.calibration_text import TOKENS, calibration_windows
from octavo.engine.kv_setup import cache_specs, check_kv_scales, set_key_rounding
from octavo.engine.memory import check_weights, gib, length_held
from octavo.engine.pipeline import check_pipeline
from octavo.errors import OctavoError
from octavo.messages import Progress
from octavo.models import build_model, number_of_layers, read_config
from octavo.models.interface import Limits, Model
from octavo.platform import Platform
from octavo.quant import SCHEMES, QuantRules, Scheme, WeightDType
from octavo.quant.formats import served_scheme, stored_shape
from octavo.quant.stored_format import stored_format_of
from octavo.weights import DummySource, Loader, LoadReport, SafetensorsSource, load
from octavo.weights.in_place import Put, fresh, rehearse
from octavo.weights.meta import MatrixSizes, matrix_sizes
from octavo.weights.sources import Source

__all__ = ["checkpoint_scheme", "load_model", "make_loader", "make_model", "open_source", "rules_of"]

ALONE = TensorParallel()


def make_model(
    json_config: Mapping[str, Any], tp: TensorParallel, config: EngineConfig, platform: Platform, dtype: torch.dtype
) -> tuple[Model, Limits]:
    """The model of a config.json, not loaded yet, and its limits for the length that was asked for or that it was made for.

    The model is built for at most the length that a cache can hold, because a longer rotary table could take all memory.
    """
    layers = tp.stages.layers(number_of_layers(json_config)) if tp.stages.count > 1 else None
    build = partial(build_model, json_config, tp, layers=layers, vision=config.reads_images)
    model = build(config.max_model_len)
    check_pipeline(model, tp, config.kv_cache_dtype_skip_layers)
    limits = model.limits()
    token, fp8 = (
        sum(spec.bytes_per_token for spec in cache_specs(model, kind, dtype, platform, skipped))
        for kind, skipped in ((config.kv_cache_dtype, config.kv_cache_dtype_skip_layers), ("fp8_e4m3", ()))
    )
    check_kv_scales(model, config, json_config)
    length = length_held(config, platform, token, limits.positions, fp8)
    return model if length == limits.positions else build(length), limits


def rules_of(config: EngineConfig) -> QuantRules:
    """What `config` asks of weights."""
    scheme, exact_few = SCHEMES[config.quantization or "bf16"], config.decode_activations == "bf16"
    return QuantRules(scheme, config.quantization_ignore, config.quantize_lm_head, exact_few=exact_few)


def load_model(
    model: Model,
    config: EngineConfig,
    platform: Platform,
    dtype: torch.dtype,
    progress: Progress | None,
    tp: TensorParallel = ALONE,
    *,
    put: Put = fresh,
) -> tuple[LoadReport, bool]:
    """Loads `model`. Raises OctavoError for every error that the user can fix.

    `put`: `overwrite` for a model that is loaded already; False where not all of its weights could be.
    """
    rules = rules_of(config)
    scheme, directory, notes = rules.scheme, Path(config.model), list[str]()
    if config.save_quantized is not None:
        directory, notes = Path(config.save_quantized), _save(config, rules, platform, progress, tp)
    source = open_source(config, directory)
    if put is fresh:
        _check_room(model, source, platform, scheme, tp)
    loader = make_loader(source, rules, config, platform, dtype, tp)
    loader.report.notes.extend([*notes, *_said_of(source, config, dtype)])
    verb = "loading" if not scheme.quantized else f"loading as {scheme.name}"
    peak = None if platform.is_cpu else _Peak(platform.device)
    began = time.perf_counter()
    module = cast("nn.Module", model)
    shown = partial(progress, verb) if progress else None
    complete = load(module, loader, model.ignored, shown, put=put, elsewhere=model.other_stages)
    loader.report.notes.extend(set_key_rounding(model, config, directory, check_only=put is rehearse))
    if peak is not None:
        loader.report.note(peak.describe())
    platform.release()  # what loading held beside the weights is the cache's
    seconds = time.perf_counter() - began
    if isinstance(source, SafetensorsSource):
        read = source.bytes_read
        loader.report.note(f"loaded in {seconds:.2f} s: {read / 1e6:,.1f} MB at {read / 1e9 / seconds:.2f} GB/s")
    else:
        loader.report.note(f"random weights made in {seconds:.1f} s")
    return loader.report, complete


def make_loader(
    source: Source, rules: QuantRules, config: EngineConfig, platform: Platform, dtype: torch.dtype, tp: TensorParallel
) -> Loader:
    """A Loader of a whole checkpoint. Raises OctavoError where --quantize-lm-head has no scheme to take."""
    loader = Loader(source, platform, rules, dtype, tp)
    if config.quantize_lm_head and config.quantization in (None, "bf16"):
        rules.head_scheme = checkpoint_scheme(loader)
    return loader


def _save(
    config: EngineConfig, rules: QuantRules, platform: Platform, progress: Progress | None, tp: TensorParallel
) -> list[str]:
    """Rank 0 writes the checkpoint of --save-quantized, if it is not there yet; the others wait. Notes for the report."""
    notes = []
    if not tp.engine.rank:
        model, output = Path(config.model), Path(config.save_quantized or "")
        threads = config.threads or len(os.sched_getaffinity(0))
        shown = partial(progress, f"saving quantized weights ({rules.scheme.name})") if progress else None
        windows = calibration_windows(model, config.calibrate, TOKENS) if config.calibrate else ()
        overrides = cast("dict[str, Any] | None", config.hf_overrides)
        given = read_config(model)
        notes.append(save_quantized(model, given, output, rules, platform, threads, shown, windows, overrides))
    tp.engine.least(0)
    return notes


def _said_of(source: SafetensorsSource | DummySource, config: EngineConfig, dtype: torch.dtype) -> list[str]:
    """What a person should know of a checkpoint's tensors."""
    if not isinstance(source, SafetensorsSource):
        return []
    found, described = [], read_config(Path(config.model))
    if unused := source.checkpoint.unused:
        found.append(f"{', '.join(unused)} not used: what they would scale is not quantized")
    if renamed := source.checkpoint.renamed:
        found.append(f"names of tensors are read {renamed}")
    half = any(tensor.dtype == "F16" for tensor in source.checkpoint.tensors.values())
    if dtype is torch.bfloat16 and (half or "float16" in (described.get("dtype"), described.get("torch_dtype"))):
        found.append(
            "the checkpoint's float16 values are rounded to bfloat16, of the same size, with more range and 8 significant bits "
            "for 11; --dtype float32 keeps them"
        )
    return found


def _check_room(
    model: Model, source: SafetensorsSource | DummySource, platform: Platform, scheme: Scheme, tp: TensorParallel
) -> None:
    """Raises OctavoError where the matrices cannot fit: those of the files that are read, or that dummy weights would be."""
    if isinstance(source, SafetensorsSource):
        stored = any(t.dtype.startswith("F8") or t.dtype == "I32" for t in source.checkpoint.tensors.values())
        globs = set(model.ignored) - set(model.other_stages)
        unread = {name for glob in globs for name in fnmatch.filter(source.names, glob)}
        sizes = MatrixSizes(source.checkpoint.matrix_values(unread), source.checkpoint.packed_bytes(unread))
        ranks = tp.engine.size
    else:  # the model has this stage's matrices alone
        stored = source.stored_format is not None
        sizes, ranks = matrix_sizes(cast("nn.Module", model), source.stored_format, QuantRules(), platform), tp.size
    values, packed = (n if platform.is_cpu else n // ranks for n in (sizes.values, sizes.packed_bytes))  # a CPU has all ranks
    check_weights(platform, values, packed, fp8=scheme.dtype is WeightDType.FP8 or stored)


def open_source(config: EngineConfig, directory: Path) -> SafetensorsSource | DummySource:
    """Opens a checkpoint directory, or dummy weights stored in the formats that its config.json names. Raises OctavoError."""
    if config.load_format == "dummy":
        return DummySource(stored_format_of(read_config(directory), directory))
    return SafetensorsSource(directory)


def checkpoint_scheme(loader: Loader) -> Scheme:
    """The one scheme of a checkpoint's FP8 weights, which --quantize-lm-head without --quantization uses."""
    scaled = {name.rpartition(".")[0] for name in loader.source.names if name.endswith((".weight_scale", ".weight_scale_inv"))}
    found = {served_scheme(loader, name, stored_shape(loader, name)) for name in scaled if loader.has(f"{name}.weight")}
    if len(found) == 1 and (scheme := found.pop()):
        return scheme
    raise OctavoError(
        f"--quantize-lm-head needs a scheme, and the checkpoint has {'several' if found else 'none'} of its own; "
        "add --quantization ptpc_fp8, fp8 or fp8_block, or leave the flag out."
    )


class _Peak:
    """The peak of accelerator memory while loading."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)

    def describe(self) -> str:
        """The peak, for the report. Waits for the device first, so that the load time measured after it is complete."""
        torch.accelerator.synchronize(self.device)
        model = torch.accelerator.memory_allocated(self.device) - self.before
        peak = torch.accelerator.max_memory_allocated(self.device) - self.before
        return f"peak while loading {gib(peak)} (model {gib(model)} + {gib(peak - model)})"
