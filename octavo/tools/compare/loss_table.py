"""What `octavo compare` prints, and what it says in words."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from octavo.engine.kv_setup import SCALED
from octavo.engine.memory import gib
from octavo.tools.compare.calibrated import made_by
from octavo.tools.compare.comparison import Comparison
from octavo.tools.compare.measure import Measurement
from octavo.tools.rich_tables import console, table

__all__ = ["COLUMNS", "WORST_COLUMNS", "basis", "cells", "command", "kept_sentence", "legend", "show", "worst"]

WIDTH = 100
WORST = 6
COLUMNS = ("weights", "KV cache", "perplexity", "vs BF16", "KL", "KL p99", "top-1", "greedy", "memory")
WORST_COLUMNS = ("layer", "weight error", "output error", "KL alone", "more in BF16")


def cells(found: Comparison, m: Measurement) -> tuple[str, ...]:
    """One row of the main table, under COLUMNS."""
    v = m.variant
    modules = sum(len(layer.names) * layer.layers for layer in found.kept) if v.ignore == tuple(found.ignore) else len(v.ignore)
    weights = v.scheme + (f", {made_by(v.calibrated)}" if v.calibrated else "") + (f", {modules} kept" if v.ignore else "")
    weights += f", {v.decode} decode" if v.decode != "auto" else ""
    change = "" if m is found.reference else f"{100 * m.change:+.2f}% ±{100 * m.change_error:.2f}"
    kv, greedy = "BF16" if v.kv in ("auto", "bfloat16") else v.kv, f"{m.greedy:.1f}"
    top1, memory = f"{100 * m.top1:.1f}%", f"{100 * found.memory(m):.1f}%"
    return weights, kv, f"{m.perplexity:.3f}", change, _short(m.kl), _short(m.kl_p99), top1, greedy, memory


def _short(value: float) -> str:
    return f"{value:.2g}" if 0 < value < 1e-4 else f"{value:.4f}"


def basis(found: Comparison) -> str:
    """What was measured on."""
    decoded = f", the last {found.decoded} of each by decode steps" if found.decoded else ""
    return f"{found.predictions:,} predictions on {found.text}, windows of {found.window} tokens{decoded}"


def legend(found: Comparison) -> str:
    """What the columns mean."""
    whole = gib(found.reference.memory(found.context))
    return (
        f"±: standard error over positions. KL: nats a token. greedy: equal tokens of {found.greedy}. "
        f"memory: weights as stored and the KV cache of {found.context:,} tokens, in percent of BF16's {whole}."
    )


def worst(found: Comparison) -> list[tuple[str, ...]]:
    """Rows (layer, weight error, output error, KL, extra bytes) of the layers that `found.scheme` costs most."""
    errors = {layer.path: layer for layer in found.layers}
    rows: list[tuple[str, ...]] = []
    for layer in sorted(found.ranked, key=lambda layer: layer.kl, reverse=True)[:WORST]:
        e = errors[layer.path]
        weight, output = (f"{100 * by_scheme[found.scheme]:.2f}%" for by_scheme in (e.weight, e.output))
        rows.append((layer.path, weight, output, f"{layer.kl:.2g}", gib(layer.extra_bytes)))
    return rows


def kept_sentence(found: Comparison) -> str:
    """What the proposed ignore list takes away and costs, as it was measured."""
    if not found.kept:
        return ""
    extra = sum(layer.extra_bytes for layer in found.kept)
    share = sum(layer.kl for layer in found.kept) / sum(layer.kl for layer in found.ranked)
    layers = sum(layer.layers for layer in found.kept)
    said = (
        f"{layers} of {len(found.ranked)} layers hold {100 * share:.0f}% of what {found.scheme} loses (KLs added); "
        f"in BF16 they take {gib(extra)} more, {100 * extra / found.reference.weight_bytes:.1f}% of the BF16 model"
    )
    ignore = tuple(found.ignore)
    after = next((m for m in found.measured if m.variant.ignore == ignore), None)
    if after is None:
        return f"{said}."
    before = next(m for m in found.measured if m.variant == replace(after.variant, ignore=()))
    return f"{said}. Measured without them: KL {_short(before.kl)} -> {_short(after.kl)}."


def show(found: Comparison, report: Path | None) -> None:
    """Prints the comparison."""
    out = console(WIDTH)
    rows = [cells(found, m) for m in (found.reference, *found.measured)]
    out.print(table(f"{found.model}\n{basis(found)}", COLUMNS, rows, legend(found), words=(0, 1)))
    if found.ranked:
        out.print(table(f"The layers that {found.scheme} costs most:", WORST_COLUMNS, worst(found)))
        out.print(kept_sentence(found))
        if not found.saved:
            out.print("To keep them in BF16:\n--quantization-ignore " + shlex.join(found.ignore), soft_wrap=True)
    for note in found.notes:
        out.print(f"note: {note}")
    out.print(f"\n[bold]{found.verdict}[/bold]")
    if found.chosen:
        out.print((f"Written to {found.saved}: " if found.saved else "  ") + command(found), soft_wrap=True)
    if report:
        out.print(f"Report: {report}", soft_wrap=True)


def command(found: Comparison) -> str:
    """The command line that serves what was chosen."""
    assert found.chosen is not None
    if found.saved:
        return shlex.join(["octavo", "serve", found.model, "--quantization-config", found.saved])
    v = found.chosen.variant
    engine = v.config(found.engine)
    flags = [] if found.chosen.weights_as_stored else ["--quantization", v.scheme]
    flags += ["--kv-cache-dtype", v.kv]
    if engine.kv_cache_rounding != "nearest":
        flags += ["--kv-cache-rounding", engine.kv_cache_rounding]
    if engine.calculate_kv_scales and v.kv in SCALED:
        flags += ["--calculate-kv-scales"]
    if v.decode != "auto":
        flags += ["--decode-activations", v.decode]
    if engine.quantize_lm_head:
        flags += ["--quantize-lm-head"]
    if engine.quantization_ignore:
        flags += ["--quantization-ignore", *engine.quantization_ignore]
    return shlex.join(["octavo", "serve", v.calibrated or found.model, *flags])
