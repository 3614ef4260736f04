"""`octavo plan`: will a model fit, how fast could it be and what would be done to it, before a weight is read."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from octavo.config import EngineConfig, config_fields
from octavo.errors import OctavoError
from octavo.tools.json_numbers import json_text
from octavo.tools.plan.accelerators import ACCELERATORS, choose
from octavo.tools.plan.explain import asked_variant, command, groups, notes, refusals, verdict
from octavo.tools.plan.model_source import find_source
from octavo.tools.plan.roofline import ASSUMPTIONS
from octavo.tools.plan.splits import Split, smallest_split, splits
from octavo.tools.plan.subject import Subject, Variant
from octavo.tools.plan.variants import CONTEXT_BYTES, EXCHANGE_BYTES, RANKS, Plan, Question, VariantPlan, build
from octavo.tools.rich_tables import console, gb, table

__all__ = ["add_arguments", "as_json", "make_plan", "run"]

SAID_ELSEWHERE = ("model", "quantization", "kv_cache_dtype", "tensor_parallel_size", "pipeline_parallel_size", "device")
HOST_LINK = 50.0
MOST = 4096  # accelerators of a host, and hosts: each number of ranks is tried
WIDTH = 100  # columns that the tables are made for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command; the engine's mean what they mean to `octavo serve`."""
    group = parser.add_argument_group("plan")
    group.add_argument("--accelerator", metavar=f"{{{','.join(ACCELERATORS)},cpu}}", help="default: what is in this machine")
    group.add_argument(
        "--num-accelerators", type=int, metavar="N", help="how many a host has (default: 1, or what is in this machine)"
    )
    group.add_argument("--num-hosts", type=int, default=1, metavar="N", help="hosts, alike (default: %(default)s)")
    group.add_argument(
        "--host-link",
        type=float,
        metavar="GB/S",
        help=f"what an accelerator sends to one of another host, one way (default: {HOST_LINK}, a 400 Gb/s card for each)",
    )
    group.add_argument(
        "--context", type=int, default=4096, metavar="N", help="tokens of each request in the estimates (default: %(default)s)"
    )
    group.add_argument(
        "--requests", type=int, default=64, metavar="N", help="requests at a time in the decode estimate (default: %(default)s)"
    )
    group.add_argument("--json", action="store_true", help="print every number as JSON")


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Prints the plan. 0 even where it does not fit: the plan is the answer."""
    given = {f.name: value for f in config_fields() if (value := getattr(args, f.name, None)) is not None}
    plan = make_plan(args, config, given)
    line = command(plan, {name: value for name, value in given.items() if name not in SAID_ELSEWHERE})
    if args.json:
        print(json_text(as_json(plan, line)))
    else:
        show(plan, line)
    return 0


def make_plan(args: argparse.Namespace, config: EngineConfig, given: Container[str]) -> Plan:
    """The plan for the command line's words. Raises OctavoError for what cannot be planned at all."""
    for name in ("num_accelerators", "num_hosts", "host_link", "context", "requests"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise OctavoError(f"--{name.replace('_', '-')} must be positive, not {value}.")
        if name.startswith("num_") and value is not None and value > MOST:
            raise OctavoError(f"--{name.replace('_', '-')} must be at most {MOST}, not {value}.")
    if args.host_link is not None and args.num_hosts == 1:
        raise OctavoError("--host-link is for --num-hosts above 1; leave it out, or say how many hosts there are.")
    source = find_source(
        config.model,
        dummy=config.load_format == "dummy",
        revision=config.revision,
        download_dir=config.download_dir,
    )
    on, there = choose(args.accelerator, config.device)
    number = args.num_accelerators or there
    subject = Subject(source, config, on, CONTEXT_BYTES, EXCHANGE_BYTES)
    variant = asked_variant(subject, given)
    stages = args.pipeline_parallel_size
    tp = args.tensor_parallel_size or _ranks(subject, variant, max(1, number * args.num_hosts // (stages or args.num_hosts)))
    q = Question(subject, number, tp, args.context, args.requests, 1, args.num_hosts, (args.host_link or HOST_LINK) * 1e9)
    pp = stages or (smallest_split(q, variant, tp) if args.num_hosts > 1 else 1)
    if pp > 1 and getattr(subject.model(1), "has_tower", False):
        subject = Subject(source, replace(config, language_model_only=True), on, CONTEXT_BYTES, EXCHANGE_BYTES)
    return build(replace(q, subject=subject, pp=pp), variant)


def _ranks(subject: Subject, variant: Variant, number: int) -> int:
    """The most ranks up to `number` that the model splits over."""
    for tp in range(number, 1, -1):
        with suppress(OctavoError):
            subject.walk(variant, tp)
            return tp
    return 1


def as_json(plan: Plan, line: str) -> dict[str, Any]:
    """Every number of a plan, in bytes, tokens and tokens a second; `line`, its command, only if it would run."""
    q = plan.question
    subject, source, refused = q.subject, q.subject.source, refusals(plan)
    return {
        "verdict": verdict(plan, refused),
        "fits": plan.asked.fit is not None and bool(plan.asked.fit.max_model_len) and q.tp * q.pp <= q.all,
        "model": source.name,
        "model_type": subject.model_type,
        "measured_by": source.by,
        "parameters": subject.base.total("values"),
        "active_parameters": subject.base.active,
        "parameters_by_component": subject.base.parameters(),
        "parameters_in_headers": subject.base.parameters(subject.stored.names) if source.tensors else None,
        "bytes_on_disk": source.nbytes or None,
        "bytes_to_download": source.download,
        "accelerator": asdict(q.on),
        "num_accelerators": q.number,
        "num_hosts": q.hosts,
        "tensor_parallel_size": q.tp,
        "pipeline_parallel_size": q.pp,
        "splits": [asdict(split) for split in splits(plan)],
        "max_model_len": q.model_len,
        "variants": {v.variant.label: _variant_json(v) for v in plan.variants},
        "asked": plan.asked.variant.label,
        "groups": [asdict(group) for group in groups(plan)],
        "refused": refused,
        "notes": notes(plan),
        "assumptions": list(ASSUMPTIONS),
        "command": None if refused else line,
    }


def _variant_json(v: VariantPlan) -> dict[str, Any]:
    numbers = asdict(v)
    numbers.update(numbers.pop("variant"))
    if v.fit:
        del numbers["fit"]["said"]  # where refusals and notes are
    return numbers


def show(plan: Plan, line: str) -> None:
    """The verdict and what to do about it, then the plan as tables, for a terminal."""
    out, refused = console(WIDTH), refusals(plan)
    q, subject, stored = plan.question, plan.question.subject, plan.question.subject.base
    out.print(textwrap.fill(verdict(plan, refused), out.width, break_on_hyphens=False), style="bold", markup=False)
    if refused:
        _print_list(out, refused)
    else:
        out.print(f"  {line}", soft_wrap=True, markup=False)
    parameters = stored.total("values")
    active = f", {_count(stored.active)} active" if stored.active < 0.7 * parameters else ""
    name, by = subject.source.name, subject.source.by
    out.print(f"\n[bold]{name}[/]: {subject.model_type}, {_count(parameters)} parameters{active}, from {by}")
    memory = f"{gb(q.on.memory)} ({q.on.memory / (1 << 30):.1f} GiB)"
    ranks = f"{q.tp} x {q.pp} ranks" if q.pp > 1 else f"{q.tp} rank{'s' if q.tp > 1 else ''}"
    several = f" each, as {ranks}" if q.all > 1 else ""
    hosts = f"{q.hosts} hosts of " if q.hosts > 1 else ""
    out.print(f"on {hosts}{q.number} x {q.on.name} ({q.on.arch}), {memory}{several}")
    timed = [_speeds(plan)] if any(v.speed for v in plan.variants) else []
    out.print()
    ways = [_splits(plan, found)] if q.pp * q.hosts > 1 and (found := splits(plan)) else []
    for made in (_weights(plan), _memory(plan), *timed, *ways, _groups(plan)):
        out.print(made)
    for title, lines in (("Notes", notes(plan)), ("Estimates assume", ASSUMPTIONS if timed else ())):
        if lines:
            out.print(f"[bold]{title}[/]")
            _print_list(out, lines)
            out.print()


def _print_list(out: Any, lines: Sequence[str]) -> None:
    for text in lines:
        indented = textwrap.fill(text, out.width, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
        out.print(indented, markup=False)


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return str(n or "tied")


def _weights(plan: Plan) -> Any:
    """Weights by component, and what one rank holds of them; the cache's dtype changes none of them."""
    kinds = {v.variant.weights_label: v for v in plan.variants}
    stored = plan.question.subject.base
    rows = []
    for component, count in stored.parameters().items():
        values = [gb(v.components[component]) for v in kinds.values()]
        rows.append([component, _count(count), *("" if not count and text == "0 B" else text for text in values)])
    total = len(rows)
    rows.append(["all", _count(stored.total("values")), *(gb(v.weights) for v in kinds.values())])
    rows.append(["of BF16", "", *(f"{v.weights_percent:.1f}%" for v in kinds.values())])
    for tp in () if plan.question.on.is_cpu else RANKS[1:]:
        cells = (gb(n) if (n := v.rank_weights[tp]) is not None else "no split" for v in kinds.values())
        rows.append([f"a rank of {tp}", "", *cells])
    return table(
        f"Weights as stored{'' if plan.question.on.is_cpu else ', and what one rank of several holds'}",
        ["", "parameters", *kinds],
        rows,
        bold=total,
    )


def _of_variants(
    plan: Plan, title: str, columns: Sequence[str], cells: Callable[[VariantPlan], list[str]], note: str = ""
) -> Any:
    """A table of a row for each variant, of which the asked one stands out."""
    rows = [[f"{'>' if v is plan.asked else ' '} {v.variant.label}", *cells(v)] for v in plan.variants]
    return table(title, ["", *columns], rows, note, bold=plan.variants.index(plan.asked))


def _memory(plan: Plan) -> Any:
    """The percentages, and what fits."""
    q = plan.question
    title = f"Memory in percent of BF16, and what fits {f'on each of {q.tp} ranks' if q.tp > 1 else 'on one'}"
    note = (
        f"* the weights and the KV cache of one request of {q.model_len:,} tokens\n"
        "** how many requests of that length the KV room holds at a time; none: it would not start\n"
        "*** the fewest ranks (--tensor-parallel-size) on which one such request fits"
    )
    columns = ("weights", "KV/token", "KV", "both*", "KV room", "tokens", "requests**", "ranks***")

    def cells(v: VariantPlan) -> list[str]:
        percents = [f"{v.weights_percent:.1f}%", f"{v.token_bytes / 1024:,.1f} KiB", f"{v.token_percent:.1f}%"]
        fit = ["", "", "no split"]
        if v.fit is not None:
            fit = [gb(v.fit.room), f"{v.fit.tokens:,}", f"{v.fit.requests:,.1f}" if v.fit.max_model_len else "none"]
        return [*percents, f"{v.request_percent:.1f}%", *fit, str(v.smallest or "none")]

    return _of_variants(plan, title, columns, cells, note)


def _speeds(plan: Plan) -> Any:
    q = plan.question
    title = f"At most, in tokens/s of one server, with {q.context:,} tokens a request"

    def cells(v: VariantPlan) -> list[str]:
        if (s := v.speed) is None:
            return ["", "", ""]
        only = "" if s.requests == q.requests else f" (only {s.requests})"
        return [f"{s.prefill:,.0f}", f"{s.decode_one:,.0f}", f"{s.decode_many:,.0f}{only}"]

    return _of_variants(plan, title, ("prefill", "decode, 1 request", f"decode, {q.requests} requests"), cells)


def _splits(plan: Plan, found: Sequence[Split]) -> Any:
    """Ways to use all accelerators, of which the asked one stands out."""
    q = plan.question
    rows = []
    for one in found:
        assert one.fit is not None
        mark = ">" if (one.tp, one.pp) == (q.tp, q.pp) else " "
        cells = ["", "", "", ""]
        if (s := one.speed) is not None:
            hop = f"{1e3 * one.hop:.2f} ms" if one.pp > 1 else ""
            cells = [f"{s.prefill:,.0f}", f"{s.decode_one:,.0f}", f"{s.decode_many:,.0f}", hop]
        rows.append([f"{mark} {one.tp} x {one.pp} x {one.replicas}", f"{one.fit.tokens * one.replicas:,}", *cells])
    note = (
        "* --tensor-parallel-size x --pipeline-parallel-size x engines side by side, which share requests out\n"
        "** of a decode step of those requests, for messages between stages"
    )
    columns = ("tokens", "prefill", "decode, 1 request", f"decode, {q.requests} requests", "hops**")
    return table(f"Ways to use all {q.all}*, with {q.context:,} tokens a request", ["", *columns], rows, note)


def _groups(plan: Plan) -> Any:
    rows = [(g.component, g.format, gb(g.nbytes) if g.nbytes else "", "; ".join([g.why, *g.remarks])) for g in groups(plan)]
    title = f"What happens to each group of layers ({plan.asked.variant.label})"
    return table(title, ["", "stored as", "size", "why"], rows, words=(0, 1, 3))
