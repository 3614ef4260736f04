"""What to run first on a new kind of GPU: one command, one file to send back.

    python scripts/check_gpu.py                        # 11 minutes with 16 cores; writes check-gpu.txt
    python scripts/check_gpu.py --only machine demo    # some of the steps

Steps: the machine, the tests of ops, of the engine and of its memory, the demo model served and asked, the accuracy of each
scheme and cache beside BF16, and the throughput of workloads A to F at Llama-3.1-8B's shape in `ptpc_fp8`, `fp8`, `fp8_block`
and BF16. Those that compare results run side by side, since they mostly wait for compilers; those that measure run alone
afterwards. Each has a limit of time; one that fails, or is stopped at its limit, does not stop the next. The file begins with
one line a step, and each step's whole output follows. Needs the test requirements (`make setup-test`, or requirements-test.txt
beside a torch for the device).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
MACHINE = """
import platform, torch
print("python", platform.python_version(), platform.machine())
print("torch", torch.__version__, "cuda", torch.version.cuda, "hip", torch.version.hip)
for number in range(torch.cuda.device_count()):
    print(number, torch.cuda.get_device_properties(number))
try:
    import triton
    print("triton", triton.__version__)
except ImportError as error:
    print("no triton:", error)
from octavo.ops import bind, table
from octavo.platform import detect
found = detect()
print(found)
bind(found)
for op, implementation in table().items():
    print(f"  {op:24}{implementation}")
"""
DEMO = """
from octavo import LLM, SamplingParams
for cache in ("auto", "fp8"):
    for scheme in (None, "fp8", "ptpc_fp8", "fp8_block"):
        llm = LLM(quantization=scheme, kv_cache_dtype=cache)
        (answer,) = llm.generate(["def read(self"], SamplingParams(max_tokens=32, temperature=0))
        print(scheme, cache, repr(answer.outputs[0].text))
        del llm
"""


class Step(NamedTuple):
    """A command; `measures`: nothing else may run beside it."""

    name: str
    minutes: int
    words: Sequence[str]
    measures: bool = False


def checked(name: str, minutes: int, *words: str, measures: bool = False) -> Step:
    """Tests, on half of the cores: a process of them keeps one busy with compiling. Each is named as it ends, so that a step
    which its limit stops still says what failed. No plugins but the tests' own: others may warn, and a warning fails."""
    workers = 1 if measures else max(1, len(os.sched_getaffinity(0)) // 2)
    words = ("-m", "pytest", "-vv", "-p", "xdist", "-p", "no:cacheprovider", "-n", str(workers), *words)
    return Step(name, minutes, words, measures)


def bench(scheme: str, minutes: int, workloads: str) -> Step:
    cache = [] if scheme == "none" else ["--kv-cache-dtype", "fp8"]
    words = ["-m", "octavo", "bench", "throughput", "--shape", "llama-3.1-8b", "-q", scheme, *cache, "--workload", workloads]
    return Step(f"bench-{scheme}", minutes, [*words, "--repeats", "2"], measures=True)


STEPS = (
    Step("machine", 2, ["-c", MACHINE]),
    checked("ops", 20, "--dist", "worksteal", "tests/ops"),
    Step("demo", 5, ["-c", DEMO]),
    checked("engine", 10, "-m", "gpu", "tests/engine", "tests/weights"),
    Step("accuracy", 8, ["-m", "bench.accuracy"]),
    checked("memory", 4, "-m", "gpu", "tests/tools", measures=True),
    bench("ptpc_fp8", 4, "C,B,D,A,E,F"),
    bench("fp8", 2, "C,B,D,A"),
    bench("fp8_block", 2, "C,B,D,A"),
    bench("none", 2, "C,B,D,A"),
)


class Ended(NamedTuple):
    """What came of a step: one line, and all that it printed."""

    step: Step
    line: str
    told: str


def take(step: Step) -> Ended:
    """Runs a step to its end or its limit."""
    began = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    process = subprocess.Popen(
        [PYTHON, *step.words], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=60 * step.minutes)
        ended = "ok" if process.returncode == 0 else f"FAILED with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        told, _ = process.communicate()
        ended = f"STOPPED after {step.minutes} minutes"
    last = next((line for line in reversed(told.splitlines()) if line.strip()), "")
    line = f"{step.name:16}{ended:28}{time.monotonic() - began:7.0f} s  {last[:100]}"
    print(line, flush=True)
    return Ended(step, line, told)


def results(steps: Sequence[Step]) -> Iterator[Ended]:
    """Those that compare results, as they end; then those that measure, one after another."""
    beside = [step for step in steps if not step.measures]
    with ThreadPoolExecutor(max(1, len(beside))) as pool:
        for future in as_completed([pool.submit(take, step) for step in beside]):
            yield future.result()
    for step in steps:
        if step.measures:
            yield take(step)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], default=[step.name for step in STEPS])
    parser.add_argument("--output", type=Path, default=Path("check-gpu.txt"))
    args = parser.parse_args()
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    head = f"Octavo {revision.strip() or 'without git'}, {time.strftime('%Y-%m-%d %H:%M %Z')}"
    order, done = [step.name for step in STEPS], list[Ended]()
    for ended in results([step for step in STEPS if step.name in args.only]):
        done = sorted([*done, ended], key=lambda ended: order.index(ended.step.name))
        whole = [f"\n===== {step.name}: {' '.join(step.words[:6])[:120]}\n{told}" for step, _, told in done]
        temporary = args.output.with_suffix(".partial")  # what was measured is kept if a later step takes the machine down
        temporary.write_text("\n".join([head, *(ended.line for ended in done), *whole]))
        temporary.replace(args.output)
    print(f"Send back {args.output}.")
    return int(any(" ok " not in ended.line for ended in done))


if __name__ == "__main__":
    sys.exit(main())
