"""`octavo plan`: will a model fit, how fast could it be and what would be done to it, before a weight is read."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from octavo.config import EngineConfig, config_fields
from octavo.errors import OctavoError
from octavo.tools.plan.accelerators import ACCELERATORS, find, in_this_machine
from octavo.tools.plan.explain import asked_variant, command, gb, groups, notes, refusals
from octavo.tools.plan.model_source import find_source
from octavo.tools.plan.roofline import ASSUMPTIONS
from octavo.tools.plan.subject import Subject, Variant
from octavo.tools.plan.variants import CONTEXT_BYTES, RANKS, Plan, Question, VariantPlan, build

__all__ = ["add_arguments", "as_json", "make_plan", "run"]

SAID_ELSEWHERE = ("model", "quantization", "kv_cache_dtype", "tensor_parallel_size", "device")
WIDTH = 100  # columns that the tables are made for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command; the engine's mean what they mean to `octavo serve`."""
    group = parser.add_argument_group(
        "plan", "MODEL is a checkpoint directory, a config.json, or a name such as Llama-3.1-405B; no weights are read."
    )
    group.add_argument(
        "--accelerator", metavar="NAME", help=f"{', '.join(ACCELERATORS)} or cpu; default: what is in this machine"
    )
    group.add_argument("--num-accelerators", type=int, metavar="N", help="how many there are (1, or what is in this machine)")
    group.add_argument("--context", type=int, default=4096, metavar="N", help="tokens of each request in the estimates (4096)")
    group.add_argument("--requests", type=int, default=64, metavar="N", help="requests at a time in the decode estimate (64)")
    group.add_argument("--json", action="store_true", help="print every number as JSON")


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Prints the plan. 0 even where it does not fit: the plan is the answer."""
    given = {f.name: value for f in config_fields() if (value := getattr(args, f.name)) is not None}
    plan = make_plan(args, config, given)
    line = command(plan, {name: value for name, value in given.items() if name not in SAID_ELSEWHERE})
    if args.json:
        print(json.dumps(as_json(plan, line), indent=2))
    else:
        show(plan, line)
    return 0


def make_plan(args: argparse.Namespace, config: EngineConfig, given: Container[str]) -> Plan:
    """The plan for the command line's words. Raises OctavoError for what cannot be planned at all."""
    for name in ("num_accelerators", "context", "requests"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise OctavoError(f"--{name.replace('_', '-')} must be positive, not {value}.")
    source = find_source(config.model, dummy=config.load_format == "dummy")
    named = args.accelerator or ("cpu" if config.device == "cpu" else None)
    on, there = (find(named), 1) if named else in_this_machine()
    number = args.num_accelerators or there
    subject = Subject.on(source, config, on, CONTEXT_BYTES)
    variant = asked_variant(config, given, subject.quantized)
    tp = args.tensor_parallel_size or _ranks(subject, variant, number)
    return build(Question(config, subject, on, number, tp, args.context, args.requests), variant)


def _ranks(subject: Subject, variant: Variant, number: int) -> int:
    """The most ranks up to `number` that the model splits over."""
    for tp in range(number, 1, -1):
        with suppress(OctavoError):
            subject.walk(variant, tp)
            return tp
    return 1


def as_json(plan: Plan, line: str) -> dict[str, Any]:
    """Every number of a plan, in bytes, tokens and tokens a second."""
    q = plan.question
    subject, source = q.subject, q.subject.source
    return {
        "model": source.name,
        "model_type": subject.model_type,
        "measured_by": source.by,
        "parameters": subject.base.total("values"),
        "active_parameters": subject.base.active,
        "parameters_by_component": subject.base.parameters(),
        "parameters_in_headers": subject.base.parameters(subject.stored.names) if source.tensors else None,
        "bytes_on_disk": source.nbytes or None,
        "accelerator": asdict(q.on),
        "num_accelerators": q.number,
        "tensor_parallel_size": q.tp,
        "max_model_len": plan.max_model_len,
        "variants": {v.variant.label: _variant_json(v) for v in plan.variants},
        "asked": plan.asked.variant.label,
        "groups": [asdict(group) for group in groups(plan)],
        "refused": refusals(plan),
        "notes": notes(plan),
        "assumptions": list(ASSUMPTIONS),
        "command": line,
    }


def _variant_json(v: VariantPlan) -> dict[str, Any]:
    numbers = asdict(v)
    numbers.update(numbers.pop("variant"))
    if v.fit:
        del numbers["fit"]["said"]  # where refusals and notes are
    return numbers


def show(plan: Plan, line: str) -> None:
    """The plan as tables, for a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, WIDTH))
    q, subject, stored = plan.question, plan.question.subject, plan.question.subject.base
    parameters = stored.total("values")
    active = f", {stored.active / 1e9:,.1f} B active" if stored.active < 0.7 * parameters else ""
    name, by = subject.source.name, subject.source.by
    console.print(f"[bold]{name}[/]: {subject.model_type}, {_count(parameters)} parameters{active}, from {by}")
    memory = f"{gb(q.on.memory)} ({q.on.memory / (1 << 30):.1f} GiB)"
    console.print(f"on {q.number} x {q.on.name} ({q.on.arch}), {memory} each, as {q.tp} rank{'s' if q.tp > 1 else ''}")
    timed = [_speeds(plan)] if any(v.speed for v in plan.variants) else []
    for table in (_weights(plan), _memory(plan), *timed, _groups(plan)):
        console.print()
        console.print(table)
    console.print("\n[bold]Command[/]")
    console.print(f"  {line}", soft_wrap=True, markup=False)
    for title, lines in (("Refused", refusals(plan)), ("Notes", notes(plan)), ("Estimates assume", _assumptions(plan))):
        if lines:
            console.print(f"\n[bold]{title}[/]")
        for text in lines:
            wrapped = textwrap.fill(text, console.width, initial_indent="  - ", subsequent_indent="    ")
            console.print(wrapped, markup=False)


def _assumptions(plan: Plan) -> Sequence[str]:
    return ASSUMPTIONS if any(v.speed for v in plan.variants) else ()


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return str(n or "tied")


def _table(title: str, *columns: str, note: str | None = None) -> Any:
    """A table whose first column names the row; the others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=note, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    table.title_style, table.caption_style = "bold", "dim"
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _weights(plan: Plan) -> Any:
    """Weights by component, and what one rank holds of them; the cache's dtype changes none of them."""
    kinds = {v.variant.weights_label: v for v in plan.variants}
    table = _table("Weights as stored, and what one rank of several holds", "", "parameters", *kinds)
    stored = plan.question.subject.base
    for component, count in stored.parameters().items():
        values = [gb(v.components[component]) for v in kinds.values()]
        table.add_row(component, _count(count), *("" if not count and text == "0 B" else text for text in values))
    table.add_row("all", _count(stored.total("values")), *(gb(v.weights) for v in kinds.values()), style="bold")
    table.add_row("of BF16", "", *(f"{v.weights_percent:.1f}%" for v in kinds.values()))
    for tp in RANKS[1:]:
        cells = (gb(n) if (n := v.rank_weights[tp]) is not None else "no split" for v in kinds.values())
        table.add_row(f"a rank of {tp}", "", *cells)
    return table


def _memory(plan: Plan) -> Any:
    """The percentages, and what fits."""
    q = plan.question
    where = f"on each of {q.tp} ranks" if q.tp > 1 else "on one"
    title = f"Memory in percent of BF16, and what fits {where}"
    note = f"* the weights and one request of {plan.max_model_len:,} tokens   ** requests of that length at a time"
    columns = ("weights", "KV/token", "KV", "both*", "KV room", "tokens", "requests**", "from TP")
    table = _table(title, "", *columns, note=note)
    for v in plan.variants:
        cells = [f"{v.weights_percent:.1f}%", f"{v.token_bytes / 1024:,.1f} KiB", f"{v.token_percent:.1f}%"]
        table.add_row(_label(plan, v), *cells, f"{v.request_percent:.1f}%", *_fit_cells(v), style=_style(plan, v))
    return table


def _fit_cells(v: VariantPlan) -> list[str]:
    smallest = str(v.smallest) if v.smallest else "none"
    if v.fit is None:
        return ["", "", "no split", smallest]
    requests = f"{v.fit.requests:,.1f}" if v.fit.max_model_len else "none"
    return [gb(v.fit.room), f"{v.fit.tokens:,}", requests, smallest]


def _speeds(plan: Plan) -> Any:
    q = plan.question
    columns = ("prefill", "decode, 1 request", f"decode, {q.requests} requests")
    table = _table(f"At most, in tokens/s of one server, with {q.context:,} tokens a request", "", *columns)
    for v in plan.variants:
        if v.speed is None:
            table.add_row(_label(plan, v), "", "", "", style=_style(plan, v))
            continue
        many = f"{v.speed.decode_many:,.0f}" + ("" if v.speed.requests == q.requests else f" (only {v.speed.requests})")
        cells = (f"{v.speed.prefill:,.0f}", f"{v.speed.decode_one:,.0f}", many)
        table.add_row(_label(plan, v), *cells, style=_style(plan, v))
    return table


def _groups(plan: Plan) -> Any:
    table = _table(f"What happens to each group of layers ({plan.asked.variant.label})", "", "stored as", "size", "why")
    table.columns[1].justify, table.columns[3].justify, table.columns[3].no_wrap = "left", "left", False
    for group in groups(plan):
        why = "; ".join([group.why, *group.remarks])
        table.add_row(group.component, group.format, gb(group.nbytes) if group.nbytes else "", why)
    return table


def _label(plan: Plan, v: VariantPlan) -> str:
    return f"> {v.variant.label}" if v is plan.asked else f"  {v.variant.label}"


def _style(plan: Plan, v: VariantPlan) -> str:
    return "bold" if v is plan.asked else ""
