"""The page's large models whole on the GPUs of one host: each is planned, served with random weights, measured, and loses a
rank.

    python -m bench.large_models -tp 8                                        # the page's three; about twenty minutes
    python -m bench.large_models -tp 4                                        # what four H200 hold; about eight minutes
    python -m bench.large_models -tp 4 --offline                              # the same without a server and its packages
    python -m bench.large_models -tp 4 --shapes kimi-k2.5 --num-layers 8      # cut models, to try the script
    python -m bench.large_models -tp 2 --model DIR                            # a directory with a config.json

Of each model: `octavo serve` with the flags of the page's examples, what rank 0 holds beside `octavo plan` (within 2%), the
workloads over HTTP, then a rank is killed under load: every stream must end with an error, /health must fail, and the server
must end with no process left. Prints Markdown. Exits with 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from octavo.errors import OctavoError
from octavo.tools.bench.workloads import model_directory, parse_workloads, shape_config
from octavo.tools.plan.accelerators import find

PORT = 8000
BASE = f"http://127.0.0.1:{PORT}"
# The flags of the page's high-throughput example, by shape; DeepSeek's cache is chosen automatically, Kimi's INT4 is kept.
PAGE = ["--max-model-len", "32768", "--gpu-memory-utilization", "0.95"]
FP8 = ["--quantization", "fp8", "--kv-cache-dtype", "fp8"]
FLAGS = {"llama-3.1-405b": FP8, "deepseek-v3.2": ["--quantization", "fp8"], "kimi-k2.5": []}
# What four cards hold, the largest first, in the scheme that the goals are in.
PTPC = ["--quantization", "ptpc_fp8", "--kv-cache-dtype", "fp8"]
ON_FOUR = {"llama-3.1-405b": PTPC, "qwen3-vl-235b-a22b": [*PTPC, "--language-model-only"], "llama-3.1-70b": PTPC}
WORKLOADS = "C,B,D,A"
OWN_WORKLOADS = {"llama-3.1-405b": "C,B,D,128x1024/256"}  # fewer than A's requests: the cache of four cards holds no more
CUSTOM = re.compile(r"(\d+)x(\d+)/(\d+)")  # requests x tokens in/out
CONSTRAINED = ["--max-model-len", "16384", "--gpu-memory-utilization", "0.85"]  # the page's memory-constrained example
WITHIN = 0.02  # of what was planned
ENDS_WITHIN = 20.0  # seconds from a rank's death to the end of the last stream and of the server
STREAMS = 8
PROMPT = [5, 6, 7]


@dataclass
class Found:
    """What was found of one model."""

    name: str
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def say(self, line: str, holds: bool = True) -> None:
        self.lines.append(line if holds else f"{line} **(fails)**")
        print(f"{self.name}: {self.lines[-1]}", flush=True)
        if not holds:
            self.failures.append(line)


def octavo(*words: str, seconds: float = 900) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "octavo", *words], capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        raise RuntimeError(f"octavo {' '.join(words[:3])}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def get(path: str, seconds: float = 10) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(BASE + path, timeout=seconds) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


@contextmanager
def serving(directory: Path, flags: Sequence[str], seconds: float) -> Iterator[tuple[subprocess.Popen[bytes], float, Path]]:
    """A server that is ready, the seconds that it took, and its log. It is killed with all of its ranks in the end."""
    words = ["serve", str(directory), "--load-format", "dummy", "--port", str(PORT), "--host", "127.0.0.1", *flags]
    with tempfile.TemporaryDirectory() as place:
        log, started = Path(place) / "log", time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "octavo", *words], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            while get("/health")[0] != 200:
                took = time.monotonic() - started
                if (code := process.poll()) is not None:
                    raise RuntimeError(
                        f"ended with exit code {code} after {took:.0f} s, never ready: {log.read_text()[-1500:]}"
                    )
                if took > seconds:
                    raise RuntimeError(f"not ready after {seconds:.0f} s: {log.read_text()[-1500:]}")
                time.sleep(0.1)
            yield process, time.monotonic() - started, log
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The ids of the engine's processes, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def check_memory(found: Found, directory: Path, flags: Sequence[str], ranks: int, accelerator: str, log: Path) -> None:
    """What rank 0 holds, beside what was planned."""
    asked = ["plan", str(directory), *flags, "--num-accelerators", str(ranks), "--accelerator", accelerator, "--json"]
    plan = json.loads(octavo(*asked))
    planned = plan["variants"][plan["asked"]]["fit"]
    held = sum(
        float(line.rpartition(" ")[2]) for line in get("/metrics")[1].splitlines() if line.startswith("octavo:weight_bytes{")
    )
    share = held / planned["weights"] - 1
    found.say(
        f"weights on rank 0: {held / 1e9:.2f} GB, planned {planned['weights'] / 1e9:.2f} ({share:+.2%})", abs(share) <= WITHIN
    )
    if accelerator != "cpu" and (told := re.search(r"([\d,]+) tokens in [\d.]+ GiB", log.read_text())):
        tokens = int(told[1].replace(",", ""))
        share = tokens / planned["tokens"] - 1
        found.say(f"tokens of cache: {tokens:,}, planned {planned['tokens']:,} ({share:+.2%})", abs(share) <= WITHIN)


def stream(begun: list[float], ended: list[tuple[float, str]], max_tokens: int) -> None:
    """One request, by time: its first line, and the last one with an error, or else the first, of its end."""
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"{BASE}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    last = b""
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if not last:
                    begun.append(time.monotonic())
                if b'"error"' in line or not last:
                    last = line.strip()
    except (OSError, http.client.HTTPException) as error:
        last += f" {error!r}".encode()
    ended.append((time.monotonic(), last.decode(errors="replace")))


def lose_a_rank(found: Found, process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the last rank under load."""
    ranks, begun, ended = ranks_of(process), list[float](), list[tuple[float, str]]()
    tokens = min(8000, json.loads(get("/v1/models")[1])["data"][0]["max_model_len"] - len(PROMPT))
    threads = [threading.Thread(target=stream, args=(begun, ended, tokens), daemon=True) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    while len(begun) < STREAMS and not ended and time.monotonic() - started < 60:
        time.sleep(0.01)
    killed = time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    for thread in threads:
        thread.join(max(0.0, killed + ENDS_WITHIN - time.monotonic()))
    if early := [last for at, last in ended if at <= killed]:
        found.say(f"{len(early)} streams of {tokens} tokens ended before the rank was killed: {early[0][:300]}", False)
    failed = [at - killed for at, last in ended if at > killed and '"error"' in last]
    within = f" within {max(failed):.1f} s" if failed else ""
    found.say(
        f"rank {len(ranks) - 1} killed: {len(failed)} of {STREAMS} streams ended with an error{within}", len(failed) == STREAMS
    )
    try:
        code: int | None = process.wait(max(0.1, killed + ENDS_WITHIN - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
    left = [pid for pid in ranks if Path(f"/proc/{pid}").exists() and "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    health = get("/health", 2)[0]
    found.say(f"the server's exit code is {code}, /health gives {health}", code not in (None, 0) and health != 200)
    found.say(f"{len(left)} processes of ranks are left", not left)


def runs(workloads: str) -> list[list[str]]:
    """The words of each run of `octavo bench` for these workloads: names go together, and sizes alone."""
    named, sizes = [], list[list[str]]()
    for one in filter(None, workloads.split(",")):
        if (size := CUSTOM.fullmatch(one)) is None:
            named.append(one)
        else:
            flags = zip(("--num-requests", "--input-len", "--output-len"), size.groups(), strict=True)
            sizes.append([word for pair in flags for word in pair])
    return ([["--workload", ",".join(named)]] if named else []) + sizes


def measure(found: Found, workloads: str, *bench: str) -> None:
    """The workloads by `octavo bench` with the words `bench`."""
    with tempfile.TemporaryDirectory() as place:
        told = Path(place) / "found.json"
        for words in runs(workloads):
            octavo("bench", *bench, *words, "--json", str(told))
            result = json.loads(told.read_text())
            if "start_s" in result:
                found.say(f"ready after {result['start_s']:.1f} s")
            for name, figures in result["workloads"].items():
                prefills = figures["output_len"] == 1
                rate = figures["total_tok_s"] if name == "A" or prefills else figures["out_tok_s"]
                kind = "prefill" if prefills else "total" if name == "A" else "output"
                size = f"{figures['num_requests']} x {figures['input_len']}/{figures['output_len']}"
                sums = "" if name == "A" or prefills else f", {figures['total_tok_s']:,.1f} in all"
                found.say(
                    f"{name}: {size}: {rate:,.1f} {kind} tok/s{sums}, first token {1e3 * figures['ttft_s']['p50']:,.0f} ms"
                )


def try_model(name: str, directory: Path, args: argparse.Namespace) -> Found:
    found, ranks = Found(name), ["-tp", str(args.tensor_parallel_size)]
    flags = [*shapes_on(args.tensor_parallel_size).get(name, FP8), *ranks]
    page = PAGE if args.accelerator != "cpu" else []
    workloads = OWN_WORKLOADS.get(name, WORKLOADS) if args.workload is None else args.workload
    try:
        if args.offline:
            measure(found, workloads, "throughput", str(directory), "--load-format", "dummy", *flags)
            return found
        with serving(directory, [*flags, *page], args.seconds) as (process, took, log):
            found.say(f"`octavo serve {name} {' '.join([*flags, *page])}`: ready after {took:.1f} s")
            check_memory(found, directory, [*flags, *page], args.tensor_parallel_size, args.accelerator, log)
            if workloads:
                measure(found, workloads, "serve", "--base-url", BASE)
            lose_a_rank(found, process)
        if args.constrained and page:
            with serving(directory, [*flags, *CONSTRAINED], args.seconds) as (_, took, log):
                found.say(f"`{' '.join(CONSTRAINED)}`: ready after {took:.1f} s")
                check_memory(found, directory, [*flags, *CONSTRAINED], args.tensor_parallel_size, args.accelerator, log)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        found.say(str(error), False)
    return found


def shapes_on(ranks: int) -> dict[str, list[str]]:
    """The shapes that are tried on so many GPUs, and their flags."""
    return FLAGS if ranks > 4 else ON_FOUR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="default: the page's, on four GPUs or fewer those that four H200 hold")
    parser.add_argument("--model", type=Path, help="a directory with a config.json, instead of shapes")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=8)
    parser.add_argument(
        "--accelerator", default="h200", help="as `octavo plan` names it; cpu: the page's memory flags are left out"
    )
    parser.add_argument(
        "--workload",
        help="of `octavo bench`, or REQUESTSxIN/OUT; an empty string: none (default: C,B,D,A; 405B's A is smaller)",
    )
    parser.add_argument("--offline", action="store_true", help="by `octavo bench throughput`, without a server")
    parser.add_argument("--constrained", action="store_true", help="also start as the memory-constrained example does")
    parser.add_argument("--seconds", type=float, default=300, help="for which a start may take")
    args = parser.parse_args()
    tried = []
    try:
        find(args.accelerator)
        given = [] if args.workload is None else [one for one in args.workload.split(",") if not CUSTOM.fullmatch(one)]
        parse_workloads([",".join(given)] if any(given) else [])
        shapes = [] if args.model is not None else args.shapes
        if shapes is None:
            shapes = list(shapes_on(args.tensor_parallel_size))
        for shape in shapes:
            shape_config(shape)
        if args.model is not None:
            tried.append(try_model(args.model.name, args.model, args))
        for shape in shapes:
            with model_directory("", shape, args.num_layers) as directory:
                tried.append(try_model(shape, directory, args))
    except OctavoError as error:
        parser.error(str(error).replace("--shape ", "--shapes "))
    for found in tried:
        print(f"\n## {found.name}\n", *(f"- {line}" for line in found.lines), sep="\n")
    return int(any(found.failures for found in tried))


if __name__ == "__main__":
    sys.exit(main())
