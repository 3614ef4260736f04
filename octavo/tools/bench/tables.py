"""The output of `octavo bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.tools.rich_tables import console, table

__all__ = ["show_offline", "show_profile", "show_serve"]

WIDTH = 120  # columns that the tables are designed for


def show_offline(found: Mapping[str, Any]) -> None:
    """Prints the results of throughput and latency mode."""
    out = console(WIDTH)
    _heading(out, found)
    ceilings = found["ceilings"]
    rates = [f"{ceilings['bandwidth_bytes_s'] / 1e9:,.4g} GB/s copied"]
    rates += [
        f"{value / 1e12:,.4g} TFLOP/s in {name.removesuffix('_flops')}"
        for name, value in ceilings.items()
        if name.endswith("_flops")
    ]
    note = "Limit: the model's bytes and operations at what this machine was measured to do: " + ", ".join(rates) + "."
    if found["mode"] == "latency":
        columns = ["workload", "TTFT mean", "p50", "p99", "TPOT mean", "p50", "p99", "wall s", "% of limit"]
        rows = [[_name(n, w), *_times(w), f"{w['wall_s']:.3f}", _percent(w)] for n, w in found["workloads"].items()]
        title = f"Milliseconds to the first token, and for each one after it{_sampling(found)}"
    else:
        columns = ["workload", "wall s", "total tok/s", "out tok/s", "prefill tok/s", "limit s", "% of limit"]
        rows = [
            [
                _name(n, w),
                f"{w['wall_s']:.3f}",
                *(_rate(w[key]) for key in ("total_tok_s", "out_tok_s", "prefill_tok_s")),
                f"{w['limit_s']:.3f}",
                _percent(w),
            ]
            for n, w in found["workloads"].items()
        ]
        title = f"Throughput{_sampling(found)}"
    out.print(table(title, columns, rows, note))
    memory = f"peak memory {found['peak_memory_bytes'] / (1 << 30):.2f} GiB"
    out.print(f"ready after {found['start_s']:.1f} s, first token after {found['first_token_s']:.1f} s; {memory}")
    for name, w in found["workloads"].items():
        if w["preemptions"]:
            out.print(f"note: {name} preempted requests {w['preemptions']} times: the KV cache was too small for all of them")


def show_serve(found: Mapping[str, Any]) -> None:
    """Prints the results of serve mode."""
    out = console(WIDTH)
    out.print(f"[bold]{found['base_url']}[/]: {found['model']}, driven from {found['machine']}")
    columns = ["workload", "wall s", "out tok/s", "of offline", "TTFT mean", "p50", "p99", "TPOT mean", "p50", "p99"]
    rows = []
    for name, w in found["workloads"].items():
        ratio = "" if w["of_offline"] is None else f"{100 * w['of_offline']:.1f}%"
        rows.append([_name(name, w), f"{w['wall_s']:.3f}", _rate(w["out_tok_s"]), ratio, *_times(w)])
    title = f"Throughput, and milliseconds to the first token and for each after it{_sampling(found)}"
    out.print(table(title, columns, rows))


def show_profile(found: Mapping[str, Any]) -> None:
    """Prints where the time of steps goes, by role and by kernel."""
    out = console(WIDTH)
    _heading(out, found)
    for step in found["steps"]:
        rows = [
            [role, f"{us:,.0f}", f"{100 * us / step['wall_us']:.1f}%", str(round(step["calls"].get(role, 0)))]
            for role, us in sorted(step["roles_us"].items(), key=lambda item: -item[1])
        ]
        title = f"{step['name']}{_sampling(found)}: {step['wall_us'] / 1000:.3f} ms a step"
        out.print(table(title, ["role", "µs", "of the step", "calls"], rows, step["note"]))
        rows = [[k["name"][:70], k["role"], f"{k['us']:,.1f}", f"{k['calls']:g}"] for k in step["kernels"][:12]]
        out.print(table("its longest kernels", ["kernel", "role", "µs", "calls"], rows))


def _heading(out: Any, found: Mapping[str, Any]) -> None:
    kinds = f"{found['quantization']}, {found['kv_cache_dtype']} KV"
    out.print(f"[bold]{found['model']}[/] ({kinds}) on {found['machine']}, torch {found['torch']}", soft_wrap=True)


def _sampling(found: Mapping[str, Any]) -> str:
    return "" if found["sampling"] == "greedy" else f" ({found['sampling']})"


def _name(name: str, w: Mapping[str, Any]) -> str:
    part = {"decode": ", decode only", "prefill": "", "all": ""}[w["part"]]
    return f"{name}: {w['num_requests']} x {w['input_len']:,}/{w['output_len']:,}{part}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _percent(w: Mapping[str, Any]) -> str:
    return f"{w['percent_of_limit']:.1f}%"


def _times(w: Mapping[str, Any]) -> list[str]:
    cells = []
    for key in ("ttft_s", "tpot_s"):
        found = w[key] or {}
        cells += [f"{1000 * found[name]:,.2f}" if found else "" for name in ("mean", "p50", "p99")]
    return cells
