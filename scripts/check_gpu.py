"""What to run first on a new kind of GPU: one command, one file to send back.

    python scripts/check_gpu.py                        # about an hour; writes check-gpu.txt
    python scripts/check_gpu.py --only machine demo    # some of the steps

Steps: the machine, the tests of ops, the demo model served and asked, the accuracy of each scheme and cache beside BF16, and
the throughput of workloads A to F at Llama-3.1-8B's shape in `ptpc_fp8`, `fp8`, `fp8_block` and BF16. Each has a limit of time;
one that fails, or is stopped at its limit, does not stop the next. The file begins with one line a step, and each step's whole
output follows. Needs the test requirements (`make setup-test`, or requirements-test.txt beside a torch for the device).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
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
    name: str
    minutes: int
    words: Sequence[str]


def bench(scheme: str, workloads: str) -> Step:
    cache = [] if scheme == "none" else ["--kv-cache-dtype", "fp8"]
    words = ["-m", "octavo", "bench", "throughput", "--shape", "llama-3.1-8b", "-q", scheme, *cache, "--workload", workloads]
    return Step(f"bench-{scheme}", 15, [*words, "--repeats", "2"])


STEPS = (
    Step("machine", 2, ["-c", MACHINE]),
    Step("ops", 25, ["-m", "pytest", "-p", "no:xdist", "tests/ops"]),
    Step("demo", 5, ["-c", DEMO]),
    Step("engine", 15, ["-m", "pytest", "-p", "no:xdist", "-m", "gpu", "tests/engine"]),
    Step("accuracy", 10, ["-m", "bench.accuracy"]),
    bench("ptpc_fp8", "C,B,D,A,E,F"),
    bench("fp8", "C,B,D,A"),
    bench("fp8_block", "C,B,D,A"),
    bench("none", "C,B,D,A"),
)


def take(step: Step) -> tuple[str, str]:
    """One line of how it ended, and all that it printed."""
    began = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    process = subprocess.Popen(
        [PYTHON, *step.words], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        told, _ = process.communicate(timeout=60 * step.minutes)
        ended = "ok" if process.returncode == 0 else f"FAILED with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        told, _ = process.communicate()
        ended = f"STOPPED after {step.minutes} minutes"
    last = next((line for line in reversed(told.splitlines()) if line.strip()), "")
    return f"{step.name:16}{ended:28}{time.monotonic() - began:7.0f} s  {last[:100]}", told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], default=[step.name for step in STEPS])
    parser.add_argument("--output", type=Path, default=Path("check-gpu.txt"))
    args = parser.parse_args()
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    lines, whole = [f"Octavo {revision.strip() or 'without git'}, {time.strftime('%Y-%m-%d %H:%M %Z')}"], []
    for step in (step for step in STEPS if step.name in args.only):
        line, told = take(step)
        print(line, flush=True)
        lines.append(line)
        whole.append(f"\n===== {step.name}: {' '.join(step.words[:6])[:120]}\n{told}")
        temporary = args.output.with_suffix(".partial")  # what was measured is kept if a later step takes the machine down
        temporary.write_text("\n".join([*lines, *whole]))
        temporary.replace(args.output)
    print(f"Send back {args.output}.")
    return int(any(" ok " not in line for line in lines[1:]))


if __name__ == "__main__":
    sys.exit(main())
