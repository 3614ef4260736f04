"""The HTML report of `octavo compare`: one file that refers to no other, its plots drawn by matplotlib as inline SVG."""

from __future__ import annotations

import importlib.util
import io
import math
import shlex
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.quant import QuantRules
from octavo.tools.compare import loss_table
from octavo.tools.compare.calibrated import made_by
from octavo.tools.compare.comparison import Comparison
from octavo.tools.compare.measure import Measurement
from octavo.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check", "render"]

COLORS = {"bf16": "#444444", "fp8": "#c8553d", "ptpc_fp8": "#2a6f97", "fp8_block": "#588157", "fp8_w8a16": "#8d5a97"}
MARKERS = {"auto": "o", "bfloat16": "o", "fp8_e4m3": "s", "fp8_e5m2": "^", "fp8_per_token_head": "D"}
BUDGET, PERPLEXITY, KL = "#b00020", "change of perplexity, %", "KL divergence, nats a token"
KL_CAPTION = '<p class="small">KL of the BF16 model with one layer quantized. Dark: proposed to stay in BF16.</p>'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } .scroll { overflow-x: auto }
tr.chosen { background: #eef6ee; font-weight: 600 } .verdict { border-left: 4px solid #588157; padding: .1rem 1rem }
code, pre { font-size: .85rem; background: #f5f5f5; padding: .1rem .3rem } pre { padding: .7rem; white-space: pre-wrap }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto } .small { color: #666; font-size: .85rem }
"""


def check() -> None:
    """Raises OctavoError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OctavoError("--output needs matplotlib for its plots, which is not installed: pip install 'octavo[report]'.")


def render(found: Comparison) -> str:
    """The report as one HTML document."""
    rows = [found.reference, *found.measured]
    chosen = rows.index(found.chosen) if found.chosen else None
    parts = [
        f"<h1>{escape(found.model)}: what FP8 costs</h1>",
        f'<p class="verdict">{escape(found.verdict)}</p>',
        f"<pre>{escape(loss_table.command(found))}</pre>" if found.chosen else "",
        f"<p>{escape(loss_table.basis(found))}, on {escape(found.machine)}, {escape(found.date)}, Octavo {__version__}:</p>",
        f"<pre>{escape(found.command)}</pre>",
        "<h2>Schemes and KV caches</h2>",
        _table(loss_table.COLUMNS, [loss_table.cells(found, m) for m in rows], "measurements", chosen),
        f'<p class="small">{escape(loss_table.legend(found))} Hollow marks: layers kept in BF16.</p>',
        _figure(_bars(found), "bars"),
        _figure(_memory(found), "memory"),
        "<h2>Layers</h2>",
        '<p class="small">Of each linear layer, on the activations of the BF16 model: ‖y′ − y‖ / ‖y‖ of its output, '
        "‖W′ − W‖ / ‖W‖ of its weight.</p>",
        _figure(_layers(found), "layers") if found.layers else "",
        KL_CAPTION + _figure(_layer_kl(found), "kl") if found.ranked else "",
        _worst(found) if found.ranked else "",
        _errors(found),
        *(f"<p>Note: {escape(note)}.</p>" for note in found.notes),
    ]
    head = f'<meta charset="utf-8"><title>{escape(found.model)}: FP8 against BF16</title><style>{STYLE}</style>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], name: str, chosen: int | None = None) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="{"chosen" if i == chosen else "other"}">{cells}</tr>')
    body = "\n".join(lines)
    return f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _worst(found: Comparison) -> str:
    return (
        f"<p>The layers that {escape(found.scheme)} costs most:</p>"
        + _table(loss_table.WORST_COLUMNS, loss_table.worst(found), "worst")
        + f"<p>{escape(loss_table.kept_sentence(found))}</p>"
        + f"<pre>--quantization-ignore {escape(shlex.join(found.ignore))}</pre>"
    )


def _errors(found: Comparison) -> str:
    schemes = list(found.layers[0].output) if found.layers else []
    if not schemes:
        return ""
    columns = ["layer", *(f"{scheme}: {what}" for scheme in schemes for what in ("weight", "output"))]
    rows = [[e.path, *(f"{100 * by[scheme]:.2f}%" for scheme in schemes for by in (e.weight, e.output))] for e in found.layers]
    table = _table(columns, rows, "errors")
    return f"<details><summary>Every layer's errors</summary>{table}</details>"


def _figure(figure: Figure, name: str) -> str:
    """Inline SVG. Its ids get the figure's name, since ids are shared by the whole document."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # text stays text; the same bytes every time
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = out.getvalue()
    return f'<figure id="{name}">{svg[svg.index("<svg") :]}</figure>'


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for ax in axes if columns > 1 else [axes]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def _label(m: Measurement) -> str:
    kept = f" -{len(m.variant.ignore)}" if m.variant.ignore else ""
    made = f" {made_by(m.variant.calibrated)}" if m.variant.calibrated else ""
    decode = f" {m.variant.decode} decode" if m.variant.decode != "auto" else ""
    return f"{m.variant.scheme}{made}{decode}{kept} / {m.variant.kv.replace('auto', 'BF16')}"


def _losses(m: Measurement) -> list[tuple[float, float]]:
    """What `m` loses and the standard error of it, in percent of perplexity and in nats a token; NaN, which is not drawn,
    where it is no number."""
    values = (100 * m.change, 100 * m.change_error), (m.kl, m.kl_error)
    return [(loss, error) if math.isfinite(loss + error) else (math.nan, math.nan) for loss, error in values]


def _limit(found: Comparison, draw: Callable[..., Any]) -> None:
    """The budget as a line."""
    limit = found.budget.limit * (100 if found.budget.relative else 1)
    draw(limit, color=BUDGET, lw=1, ls="--", label=f"budget: {found.budget}")


def _bars(found: Comparison) -> Figure:
    """Change of perplexity and KL of each variant, with their standard errors; the chosen one is framed."""
    measured = found.measured[::-1]  # the first on top
    figure, (left, right) = _new(9, 1.1 + 0.24 * len(measured), columns=2)
    colors = [COLORS.get(m.variant.scheme, "#888888") for m in measured]
    widths = [1.8 if m is found.chosen else 0 for m in measured]
    kinds = zip(*map(_losses, measured), strict=True)
    for ax, values, title in zip((left, right), kinds, (PERPLEXITY, KL), strict=True):
        loss, spread = zip(*values, strict=True)
        how = {"color": colors, "edgecolor": "#111111", "linewidth": widths, "error_kw": {"lw": 0.8}}
        ax.barh(range(len(measured)), loss, xerr=spread, **how)
        ax.set_yticks(range(len(measured)), [f"chosen: {_label(m)}" if m is found.chosen else _label(m) for m in measured])
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(title, fontsize=9)
    left.axvline(0, color="#222222", lw=0.8)
    right.set_yticklabels([])
    _limit(found, (left if found.budget.relative else right).axvline)
    figure.legend(
        *(left if found.budget.relative else right).get_legend_handles_labels(), loc="outside upper right", fontsize=7
    )
    return figure


def _memory(found: Comparison) -> Figure:
    """Loss against memory: what is low and left is good."""
    figure, ax = _new(7, 4)
    rows = (found.reference, *found.measured)
    for m in rows:
        color, marker = COLORS.get(m.variant.scheme, "#888888"), MARKERS.get(m.variant.kv, "o")
        face = "none" if m.variant.ignore else color  # hollow: layers kept in BF16
        memory, (loss, error) = 100 * found.memory(m), _losses(m)[0 if found.budget.relative else 1]
        ax.errorbar(memory, loss, error, fmt=marker, color=color, mfc=face, ms=6, elinewidth=0.8, capsize=2)
        if m is found.chosen:
            ax.plot(memory, loss, "o", color="#111111", mfc="none", ms=14, mew=1.5, label="chosen")
    for scheme in dict.fromkeys(m.variant.scheme for m in rows):
        ax.plot([], [], "o", color=COLORS.get(scheme, "#888888"), label=scheme)
    for kv in dict.fromkeys(m.variant.kv for m in rows):
        ax.plot([], [], MARKERS.get(kv, "o"), color="#222222", mfc="none", label=f"KV {kv.replace('auto', 'BF16')}")
    _limit(found, ax.axhline)
    ax.set_xlabel(f"weights and KV cache of {found.context:,} tokens, % of BF16", fontsize=9)
    ax.set_ylabel(PERPLEXITY if found.budget.relative else KL, fontsize=9)
    ax.legend(fontsize=7, frameon=False)
    return figure


def _layer_kl(found: Comparison) -> Figure:
    """KL of the whole model with only this layer quantized, in the model's order; those proposed to stay BF16 are dark."""
    order = {layer.path: place for place, layer in enumerate(found.layers)}
    ranked = sorted(found.ranked, key=lambda layer: order.get(layer.path, 0))
    rules = QuantRules(ignore=found.ignore)
    kept = [bool([name for name in layer.names if rules.ignored(name)]) for layer in ranked]
    figure, ax = _new(9, 3.6)
    color = COLORS.get(found.scheme, "#888888")
    ax.bar(
        range(len(ranked)),
        [layer.kl if math.isfinite(layer.kl) else math.nan for layer in ranked],
        color=[color if one else color + "60" for one in kept],
    )
    _name_layers(ax, [layer.path for layer in ranked])
    ax.set_ylabel(f"{KL}, {found.scheme}", fontsize=9)
    return figure


def _name_layers(ax: Any, paths: Sequence[str]) -> None:
    step = max(1, len(paths) // 32)
    names = [path.removeprefix("model.layers.") for path in paths]
    ax.set_xticks(range(0, len(paths), step), names[::step], rotation=90, fontsize=7)


def _layers(found: Comparison) -> Figure:
    """Output error (solid) and weight error (dotted) of each layer, by scheme."""
    figure, ax = _new(9, 4.2)
    places = range(len(found.layers))
    errors = [e.output for e in found.layers], [e.weight for e in found.layers]
    for scheme in found.layers[0].output:
        color = COLORS.get(scheme, "#888888")
        output, weight = ([100 * by[scheme] for by in kind] for kind in errors)
        ax.plot(places, output, "-o", ms=3, lw=1, color=color, label=f"{scheme}, output")
        ax.plot(places, weight, ":", lw=1.2, color=color, label=f"{scheme}, weight")
    _name_layers(ax, [e.path for e in found.layers])
    ax.set_ylabel("relative error, %", fontsize=9)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7, frameon=False, ncols=3)
    return figure
