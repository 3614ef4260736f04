"""Where a step's time goes: torch's profiler around steady steps, with kernels grouped by role."""

from __future__ import annotations

import importlib.util
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.engine.core import EngineCore
from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.tools.bench.ceilings import synchronize
from octavo.tools.bench.offline import Batch
from octavo.tools.bench.workloads import Workload, prompts

__all__ = ["ROLES", "check", "draw", "profile_into", "role_of"]

# Matched against kernel names in order; the first match counts. On a CPU the names are those of torch's operators.
ROLES = {
    "layers as one": r"between_(moe_)?attentions|decode_step",
    "indexer": r"index_(logits|keys)|select_keys|\b_(select|list|find_least)\b|_as_scored",
    "attention": r"attention|stage_kv|fmha|flash|softmax|bmm|baddbmm|\b_(merge|lay_out)\b",
    "norm": r"norm|vecdot",
    "activation": r"silu|gelu",
    "rope, cache": r"rope|rotate|write_kv|write_latent|reshape_and_cache|index_put",
    "linear": r"linear|product|gemm|gemv|cutlass|nvjet|sm90|sm100|splitk|cublas|addmm|aten::mm|matmul|scaled_mm|mkldnn|widen"
    r"|rescale|w4a(16|8)",
    "routing": r"route|_pairs|combine|find_tiles",
    "quantize": r"quantize|quant|round_columns|round_keys|rewrite_keys|_planes",
    "sampling": r"argmax|sampl|multinomial|topk|sort|gumbel|exponential",
    "copies": r"memcpy|memset|copy|aten::to|aten::cat|fill|index_select|gather|embedding",
}
OTHER, GAPS = "other", "gaps"
C_KERNEL = "octavo_"  # prefix of their names


@dataclass(frozen=True)
class Kernel:
    """One kernel: microseconds and calls per step, on average."""

    name: str
    role: str
    us: float
    calls: float


def check() -> None:
    """Raises OctavoError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OctavoError("--png needs matplotlib, which is not installed: pip install 'octavo[report]'.")


def role_of(name: str) -> str:
    """The role of a kernel, by its name."""
    return next((role for role, pattern in ROLES.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def profile_into(
    found: dict[str, Any], core: EngineCore, workloads: Sequence[Workload], seed: int, steps: int, png: str | None
) -> dict[str, Any]:
    """Adds the profiled steps of every workload to `found`, and draws them."""
    found["steps"] = [step for w in workloads for step in _workload(core, w, seed, steps)]
    if png is not None:
        draw(found["steps"], Path(png), f"{found['model']} on {found['machine']}")
    return found


def _workload(core: EngineCore, w: Workload, seed: int, steps: int) -> list[dict[str, Any]]:
    """Profiles the first prefill step, and `steps` decode steps after all requests are prefilled."""
    needed = 2 * steps + 1 if not w.prefill_only else 1
    # A "decode" workload's requests need room for more than their output.
    output = min(w.room(core.scheduler.max_num_batched_tokens), core.info.max_model_len) - w.input_len
    batch = Batch(core, w, prompts(w, core.info.vocab_size, f"profile {seed}"), [output] * w.num_requests, "profile-")
    try:
        out = []
        if w.part != "decode":
            depth, core.depth = core.depth, 1  # otherwise the next step would be launched, and counted, with it
            prefill = _profiled(core, f"{w.name}: a prefill step", batch.step, 1)
            core.depth = depth
            prefill["name"] += f" of {batch.stats.iteration_tokens:,} tokens"
            out.append(prefill)
        while batch.running and not batch.all_started:
            batch.step()
        if w.prefill_only:
            return out
        left = output - max(batch.counts)
        if left < needed:
            raise OctavoError(f"workload {w.name} has {left} decode steps left to look at, not {needed}; lower --steps.")
        name = f"{w.name}: a decode step of {w.num_requests} requests, {w.input_len + max(batch.counts):,} tokens each"
        return [*out, _profiled(core, name, batch.step, steps)]
    finally:
        batch.close()


def _profiled(core: EngineCore, name: str, step: Callable[[], None], steps: int) -> dict[str, Any]:
    """The average time of `steps` calls of `step`, by kernel.

    The profiler slows the host but not a device's kernels. For a device, the wall time is therefore measured without it, if
    there are several steps. A CPU's operators are compared with the wall time of the same steps.
    """
    platform = core.runner.platform
    plain = _wall(platform, step, steps) if steps > 1 and not platform.is_cpu else None
    with torch.profiler.profile() as profiler:
        wall = _wall(platform, step, steps)
    wall = plain if plain is not None else wall
    kernels = _operators(profiler.key_averages(), steps) if platform.is_cpu else _kernels(profiler.events(), steps)
    roles: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        roles[kernel.role] += kernel.us
        calls[kernel.role] += kernel.calls
    busy = sum(kernel.us for kernel in kernels)
    roles[GAPS] = max(0.0, 1e6 * wall / steps - busy)
    kind = "the host's operators" if platform.is_cpu else "the device's kernels"
    return {
        "name": name,
        "steps": steps,
        "wall_us": 1e6 * wall / steps,
        "busy_us": busy,
        "roles_us": dict(roles),
        "calls": dict(calls),
        "kernels": [asdict(kernel) for kernel in kernels],
        "note": f"Of {kind}; gaps: the step's time without any of them" + (", under the profiler." if plain is None else "."),
    }


def _wall(platform: Platform, step: Callable[[], None], steps: int) -> float:
    synchronize(platform)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(platform)
    return time.perf_counter() - start


def _operators(events: Iterable[Any], steps: int) -> list[Kernel]:
    """A CPU's operators, longest first. Times exclude the operators that they call."""
    out = []
    for event in events:
        annotation = getattr(event, "is_user_annotation", False) and not event.key.startswith(C_KERNEL)
        if event.device_type.name == "CPU" and not annotation and event.self_cpu_time_total:
            out.append(Kernel(event.key, role_of(event.key), event.self_cpu_time_total / steps, event.count / steps))
    return sorted(out, key=lambda kernel: -kernel.us)


def _kernels(events: Iterable[Any], steps: int) -> list[Kernel]:
    """A device's kernels, longest first.

    A kernel may start while the one before it still runs, and then waits for it. Its time counts from the end of that one.
    """
    ran = [e for e in events if e.device_type.name != "CPU" and not getattr(e, "is_user_annotation", False)]
    us: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    done = float("-inf")
    for event in sorted(ran, key=lambda e: e.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        us[event.name] += max(0.0, end - max(start, done))
        calls[event.name] += 1
        done = max(done, end)
    out = [Kernel(name, role_of(name), time / steps, calls[name] / steps) for name, time in us.items()]
    return sorted(out, key=lambda kernel: -kernel.us)


def draw(steps: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws one bar per step, with a part per role, as PNG. Writes the whole file or none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.7 * len(steps)), layout="constrained")
    axes = figure.subplots()
    roles = [*ROLES, OTHER, GAPS]
    left = [0.0] * len(steps)
    for number, role in enumerate(roles):
        widths = [100 * step["roles_us"].get(role, 0.0) / step["wall_us"] for step in steps]
        if not any(widths):
            continue
        color = "#dddddd" if role == GAPS else f"C{number}"
        axes.barh(range(len(steps)), widths, left=left, label=role, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(steps)), [f"{step['name']}\n{step['wall_us'] / 1000:.2f} ms" for step in steps], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the step")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png", dpi=150)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OctavoError(f"--png {path} cannot be written: {error.strerror}.") from None
