"""Where the seconds of a start go, up to the first token: with nothing compiled, and again with what the first start compiled.

    python -m bench.start --shape llama-3.1-8b -q ptpc_fp8 --kv-cache-dtype fp8
    python -m bench.start --shape llama-3.1-8b -q ptpc_fp8 --kv-cache-dtype fp8 --home DIR  # of octavo.engine.image_kernels

Each start is an engine in a process of its own with random weights. Printed are the phases in order, with the processor seconds
used in each over its length (how many cores were busy), then the compilations that end last and the longest ones. `--json FILE`
has every compilation. An engine of several ranks has one timeline, rank 0's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.engine import compile_process

BEGAN = "--began"


@dataclass
class Event:
    """From `begin` to `end`, seconds since the process was started; cores: processor seconds over that, children's included."""

    kind: str  # "phase", "NVRTC" or "Triton"
    name: str
    begin: float
    end: float
    cores: float = 0.0
    note: str = ""


class Timeline:
    """Events of this process. `began`: time.time() just before it was started."""

    def __init__(self, began: float):
        self.began, self.events, self.lock = began, list[Event](), threading.Lock()

    def now(self) -> float:
        return time.time() - self.began

    def add(self, event: Event) -> None:
        with self.lock:
            self.events.append(event)

    def phase(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, each call of which is a phase."""

        @functools.wraps(fn)
        def timed(*args: Any, **given: Any) -> Any:
            begin, used = self.now(), _used()
            try:
                return fn(*args, **given)
            finally:
                end = self.now()
                self.add(Event("phase", name, begin, end, (_used() - used) / max(end - begin, 1e-9)))

        return timed

    def wrap(self, owner: Any, attribute: str, name: str = "") -> None:
        setattr(owner, attribute, self.phase(name or attribute.strip("_"), getattr(owner, attribute)))


def _used() -> float:
    """Processor seconds of this process and of its children that have ended."""
    return sum(
        used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def start_once(args: argparse.Namespace) -> None:
    """One start in this process; the last line of stdout is its events."""
    line = Timeline(args.began)
    line.add(Event("phase", "Python", 0.0, line.now()))
    if not args.alone:
        compile_process.begin(EngineConfig(model=""))
    line.phase("import torch", lambda: __import__("torch"))()
    line.phase("import triton", lambda: __import__("triton"))()

    def imported() -> Any:
        from octavo.engine import core

        return core

    line.phase("import octavo's engine", imported)()
    import torch

    from octavo import ops
    from octavo.engine import runner
    from octavo.tools.bench import leading, offline
    from octavo.tools.bench.workloads import WORKLOADS, model_directory

    if torch.cuda.is_available():
        line.phase("CUDA context", lambda: torch.zeros(1, device="cuda"))()
    _watch_compilers(line)
    ops.compile_ahead = _timed_context(line, "compile ahead", ops.compile_ahead)
    for owner, attribute, name in (
        (ops, "bind", "bind ops"), (runner, "make_model", "build the model"),
        (runner.ModelRunner, "load_weights", "weights"), (runner.ModelRunner, "_make_cache", "cache"),
        (runner.ModelRunner, "_make_graphs", "graphs, all"), (runner.DecodeGraphs, "_capture", "decode graphs"),
        (runner.PrefillGraphs, "capture", "prefill graphs"), (runner.ModelRunner, "_warm_up", "compile ahead: prompts"),
        (ops, "fuse", "megakernels"),
    ):  # fmt: skip
        line.wrap(owner, attribute, name)
    with model_directory("", args.shape, args.num_layers) as directory:
        given: dict[str, Any] = {"tensor_parallel_size": args.tensor_parallel_size}
        config = EngineConfig(
            model=str(directory), load_format="dummy", quantization=args.quantization, kv_cache_dtype=args.kv_cache_dtype,
            **given,
        )  # fmt: skip
        workload = WORKLOADS["C"]
        config = offline.engine_options(config, [WORKLOADS[name] for name in "ABCD"], given)
        with leading.engine(config, lambda *_: None) as core:
            ready = line.now()
            line.add(Event("phase", "READY", ready, ready))
            line.add(Event("phase", "FIRST TOKEN", ready, offline.warm_up(core, workload, 0) - line.began))
    print(json.dumps([asdict(event) for event in sorted(line.events, key=lambda event: event.begin)]), flush=True)


def _timed_context(line: Timeline, name: str, make: Callable[[], AbstractContextManager[None]]) -> Any:
    """`make`, whose contexts are phases: what runs in them, and their end, where compilations are waited for."""

    @contextmanager
    def timed() -> Iterator[None]:
        begin, used = line.now(), _used()
        with make():
            yield
            waited = line.now()
        end = line.now()
        line.add(Event("phase", name, begin, end, (_used() - used) / max(end - begin, 1e-9)))
        line.add(Event("phase", f"{name}: waited for the compiler", waited, end))

    return timed


def _watch_compilers(line: Timeline) -> None:
    """Has every compilation reported to `line`."""
    import triton

    from octavo.ops.hopper import compile as nvrtc

    original = nvrtc.compile_cubin

    def compile_cubin(name: str, arch: str, options: dict[str, int | float]) -> bytes:
        begin = line.now()
        cubin = original(name, arch, options)
        line.add(Event("NVRTC", name, begin, line.now(), note=" ".join(f"{k}={v}" for k, v in options.items())))
        return cubin

    for module in [module for name, module in sys.modules.items() if name.startswith("octavo.")]:
        if getattr(module, "compile_cubin", None) is original:
            module.compile_cubin = compile_cubin  # type: ignore[attr-defined]

    def listener(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        end, stages = line.now(), dict(times.lowering_stages)
        seconds = (times.ir_initialization + sum(stages.values()) + times.store_results) / 1e6
        parts = {"ir": times.ir_initialization, **stages}
        note = "found" if cache_hit else " ".join(f"{stage}={us / 1e6:.2f}" for stage, us in parts.items())
        line.add(Event("Triton", src.name, end - seconds, end, note=f"{note} {metadata['hash'][:8]}"))

    triton.knobs.compilation.listener = listener


def started(args: argparse.Namespace, home: Path) -> list[Event]:
    """The events of a start whose caches are in `home`."""
    own = [
        f"--shape={args.shape}", f"--kv-cache-dtype={args.kv_cache_dtype}",
        f"--tensor-parallel-size={args.tensor_parallel_size}", *(["--alone"] if args.alone else []),
        *([f"--quantization={args.quantization}"] if args.quantization else []),
        *([f"--num-layers={args.num_layers}"] if args.num_layers else []),
    ]  # fmt: skip
    env = os.environ | {"HOME": str(home), "TRITON_CACHE_DIR": str(home / ".triton" / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.start", *own, f"{BEGAN}={time.time()}"], env=env, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"the start failed with exit code {done.returncode}:\n{done.stdout[-4000:]}")
    return [Event(**event) for event in json.loads(done.stdout.splitlines()[-1])]


def show(title: str, events: Sequence[Event]) -> None:
    """Prints a start's phases and compilations."""
    print(f"== {title}")
    for event in events:
        if event.kind == "phase":
            seconds = event.end - event.begin
            print(f"{event.begin:7.2f} {event.end:7.2f} {seconds:6.2f} s {event.cores:5.1f} cores  {event.name}")
    for kind in ("NVRTC", "Triton"):
        of_kind = [event for event in events if event.kind == kind]
        made = [event for event in of_kind if "found" not in event.note]
        print(f"{kind}: {len(of_kind) - len(made)} found in the cache")
        if not made:
            print(f"{kind}: nothing compiled")
            continue
        total, last = sum(event.end - event.begin for event in made), max(event.end for event in made)
        first = min(event.begin for event in made)
        print(f"{kind}: {len(made)} compilations from {first:.2f} to {last:.2f}, {total:.1f} s in all; the last, the longest:")
        longest = sorted(made, key=lambda event: event.begin - event.end)[:6]
        for event in [*sorted(made, key=lambda event: event.end)[-4:], *longest]:
            print(f"  {event.begin:6.2f} {event.end:6.2f} {event.end - event.begin:5.2f} s {event.name} {event.note[:110]}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("-q", "--quantization")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--home", type=Path, help="with the caches in this directory, where they must have been made")
    parser.add_argument("--alone", action="store_true", help="without the process that compiles while weights are loaded")
    parser.add_argument("--once", action="store_true", help="one start, not a second with the kernels of the first")
    parser.add_argument("--json", type=Path)
    parser.add_argument(BEGAN, type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.began:
        start_once(args)
        return
    with nullcontext(args.home) if args.home else tempfile.TemporaryDirectory(prefix="octavo-start-") as home:
        found = {}
        for title in ("as it is" if args.home else "nothing compiled", "all compiled")[: 1 if args.once else 2]:
            found[title] = started(args, Path(home))
            show(title, found[title])
    if args.json:
        args.json.write_text(json.dumps({title: [asdict(event) for event in events] for title, events in found.items()}))


if __name__ == "__main__":
    main()
