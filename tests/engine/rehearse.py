"""Compiles kernels without a device, and looks for them as a start would. Run as a program: the tests' own process interprets.

The first argument is what to do; the last line of stdout is JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from octavo.config import EngineConfig
from octavo.engine.compile_process import CompileProcess
from octavo.engine.image_kernels import ACCELERATORS
from octavo.engine.rehearsal import Rehearsal, compile_in_processes, rehearsing
from octavo.ops.ahead import Jobs
from octavo.tools.bench.workloads import model_directory

SOME = 3  # kernels that are really compiled


def jobs_of(accelerator: str, shape: str, **options: Any) -> Jobs:
    """What a start of random weights of a known shape, with few layers, compiles."""
    with model_directory("", shape, 4) as directory:
        config = EngineConfig(model=str(directory), load_format="dummy", max_model_len=5000, **options)
        with rehearsing(ACCELERATORS[accelerator]) as jobs:
            Rehearsal(config, ACCELERATORS[accelerator])
    return jobs


def of_triton(jobs: Jobs) -> list[Any]:
    """The compilations of Triton's kernels, the functions that its own launches would call."""
    return [job.args[0] for key, job in jobs.items() if isinstance(key, str) and key != "utilities"]  # type: ignore[attr-defined]


def hits(jobs: Jobs) -> dict[str, Any]:
    """Which of the first kernels a launch finds in Triton's cache."""
    found: dict[str, bool] = {}

    def listener(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        found[f"{src.name} {metadata['hash'][:8]}"] = cache_hit

    triton.knobs.compilation.listener = listener
    for compiled in of_triton(jobs)[:SOME]:
        compiled()
    return {"found": sum(found.values()), "looked for": len(found)}


def in_processes() -> dict[str, Any]:
    """Forked processes compile some kernels of each kind."""
    jobs = jobs_of("h200", "llama-3.2-1b", quantization="ptpc_fp8", kv_cache_dtype="fp8")
    chosen = {key: job for key, job in list(jobs.items()) if isinstance(key, tuple)}  # CUDA C++: source, architecture, options
    some = [*list(chosen.values())[:1], *[jobs[key] for key in jobs if isinstance(key, str) and key != "utilities"][:SOME]]
    failed = compile_in_processes([*some, lambda: 1 // 0], 2)
    kept = len(list((Path.home() / ".cache" / "octavo").glob("*.cubin")))
    return hits(jobs) | {"failed": failed, "cubins": kept, "CUDA C++": sorted({key[0] for key in chosen})}


def many() -> dict[str, Any]:
    """More jobs than a pipe holds numbers of, and than two bytes count; some fail, and one that is the last is done."""
    count, (read, write) = 70_000, os.pipe()
    jobs: list[Any] = [lambda: None] * count
    jobs[-3:] = [lambda: 1 // 0, lambda: 1 // 0, lambda: os.write(write, b"done")]
    failed = compile_in_processes(jobs, 2)
    return {"failed": failed, "last": os.read(read, 99).decode(), "none": compile_in_processes([], 2)}


def by_process() -> dict[str, Any]:
    """The process that an engine begins compiles what Triton's own hook is told of."""
    process, sent = CompileProcess(), list[Any]()
    process.describe(ACCELERATORS["h200"])

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        if len(sent) < SOME:
            sent.append(process.submit(fn.module, fn.name, compile["specialization_data"]))

    triton.knobs.runtime.jit_cache_hook = hook
    jobs = jobs_of("h200", "llama-3.2-1b", quantization="ptpc_fp8", kv_cache_dtype="fp8")
    triton.knobs.runtime.jit_cache_hook = None
    errors = [str(job.exception()) for job in sent if job.exception() is not None]
    wrong = process.submit("octavo.ops.triton.elementwise", "no_such_kernel", "{}").exception()
    found = hits(jobs) | {"errors": errors, "wrong": str(wrong)}
    process.close()
    found["exit code"] = process.process.wait(timeout=60)
    return found | {"after": str(process.submit("a", "b", "c").exception(timeout=60))}


def walks() -> dict[str, Any]:
    """Starts of other kinds of model and on more ranks, to their last kernel. Kernels that depend on no model come once."""
    assert not torch.cuda.is_available()
    return {
        f"{accelerator} {shape} {options}": len(jobs_of(accelerator, shape, **options))
        for accelerator, shape, options in (
            ("h200", "qwen3-30b-a3b", {"quantization": "ptpc_fp8", "tensor_parallel_size": 2}),
            ("h200", "deepseek-v3.2", {}),
            ("h200", "qwen3-vl-8b", {"kv_cache_dtype": "fp8"}),
        )
    }


if __name__ == "__main__":
    print(json.dumps({"in_processes": in_processes, "many": many, "by_process": by_process, "walks": walks}[sys.argv[1]]()))
