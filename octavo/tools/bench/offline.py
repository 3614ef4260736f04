"""Drives an engine in this process with random token ids, without EOS or text, and measures each workload."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.errors import OctavoError
from octavo.messages import EngineRequest, EngineStats, SamplingParams
from octavo.platform import detect
from octavo.tools.bench.workloads import Workload, prompts

__all__ = ["Batch", "Measured", "engine_options", "measure", "warm_up"]

STEP_TOKENS = 2048  # of a step, at most, for which first requests of "decode" workloads have room to run ahead
WARM_UP_LEN = 32


@dataclass
class Measured:
    """Measurements of one workload: seconds in total, ttft and tpot of each request, tokens counted in that time."""

    workload: Workload
    wall: float
    input_tokens: int
    output_tokens: int
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    preemptions: int = 0
    walls: list[float] = field(default_factory=list)  # of all repeats; `wall` is the best

    def as_json(self) -> dict[str, Any]:
        w = self.workload
        return w.figures(self.wall, self.input_tokens, self.output_tokens, self.ttft, self.tpot) | {
            "walls_s": self.walls or [self.wall],
            "prefill_tok_s": self.input_tokens / self.wall if w.prefill_only else None,
            "preemptions": self.preemptions,
        }


def engine_options(config: EngineConfig, workloads: Sequence[Workload], given: dict[str, Any]) -> EngineConfig:
    """`config` with room for all workloads where the user set no limits. Prefix caching is off unless asked for."""
    # One more than the longest, because prompts must be shorter than max_model_len.
    step = min(STEP_TOKENS, config.step_tokens_on(detect(config.device).is_cpu))
    room = max(w.room(step) for w in workloads) + 1
    wanted: dict[str, Any] = {
        "max_model_len": room,
        "max_num_seqs": min(256, max(w.num_requests for w in workloads)),
        "enable_prefix_caching": False,
    }
    return replace(config, **{name: value for name, value in wanted.items() if given.get(name) is None})


class Batch:
    """A workload's requests in an engine. Call `step` to run them. Counts and times are per request."""

    def __init__(
        self, core: EngineCore, w: Workload, token_ids: Sequence[list[int]], output_lens: Sequence[int], label: str = ""
    ):
        self.core = core
        self.counts = [0] * len(token_ids)
        self.first, self.last = [0.0] * len(token_ids), [0.0] * len(token_ids)
        self.preemptions = 0
        self.stats = EngineStats()
        self._number = {f"{label}{w.name}-{i}": i for i in range(len(token_ids))}
        self._running = set(self._number)
        self.start = time.perf_counter()
        for request_id, ids, output in zip(self._number, token_ids, output_lens, strict=True):
            params = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False, **w.sampling)  # type: ignore[arg-type]
            core.add(EngineRequest(request_id, ids, params))

    @property
    def running(self) -> bool:
        return bool(self._running)

    @property
    def all_started(self) -> bool:
        return all(self.counts)

    def step(self) -> None:
        """Runs one engine step. Raises OctavoError if a request fails in it."""
        outputs, self.stats = self.core.step()
        now = time.perf_counter()
        self.preemptions += self.stats.num_preemptions
        for output in outputs:
            if (i := self._number.get(output.request_id)) is None:
                continue
            if output.error is not None:
                raise OctavoError(f"a request failed: {output.error}")
            if not self.counts[i]:
                self.first[i] = now
            self.counts[i] += len(output.token_ids)
            self.last[i] = now
            if output.finish_reason is not None:
                self._running.discard(output.request_id)

    def close(self) -> None:
        """Aborts the running requests, so that the next batch finds an idle engine."""
        for request_id in self._running:
            self.core.abort(request_id)
        self._running.clear()
        while self.core.has_work():  # a step that was launched ahead
            self.core.step()


def warm_up(core: EngineCore, workload: Workload, seed: int) -> float:
    """Warm-up: runs as many short requests as the workload has, and one of full length. Returns time.time() of the first token.

    The short requests end one after another, so that batches of every size run.
    """
    short = replace(workload, input_len=min(WARM_UP_LEN, workload.input_len))
    ids = prompts(short, core.info.vocab_size, f"warm-up {seed}")
    ids[0] = prompts(replace(workload, num_requests=1), core.info.vocab_size, f"warm-up {seed}")[0]
    batch = Batch(core, workload, ids, [min(2 + i % 8, workload.output_len + 1) for i in range(len(ids))], "warm-up-")
    while not any(batch.counts):
        batch.step()
    first = time.time()
    while batch.running:
        batch.step()
    batch.close()
    return first


def measure(core: EngineCore, workloads: Sequence[Workload], seed: int, repeats: int = 1) -> list[Measured]:
    """Measures every workload, the best of `repeats`. A workload that decodes from the cache runs with its prefill."""
    gc.collect()
    gc.freeze()  # so that the collector does not walk the model during a step
    try:
        found: list[list[Measured]] = [_once(core, workloads, seed + r) for r in range(repeats)]
    finally:
        gc.unfreeze()
    best = []
    for same in zip(*found, strict=True):
        chosen = min(same, key=lambda m: m.wall)
        best.append(replace(chosen, walls=[m.wall for m in same]))
    return best


def _once(core: EngineCore, workloads: Sequence[Workload], seed: int) -> list[Measured]:
    done: dict[str, Measured] = {}
    for w in workloads:
        if w.part == "decode":
            prefill = next((p for p in workloads if p.prefill_only and _alike(p, w)), None)
            first, done[w.name] = _from_cache(core, w, prefill or w, seed)
            if prefill is not None:
                done[prefill.name] = first
    for w in workloads:
        if w.name not in done:
            done[w.name] = _whole(core, w, seed)
    return [done[w.name] for w in workloads]


def _alike(a: Workload, b: Workload) -> bool:
    return (a.num_requests, a.input_len) == (b.num_requests, b.input_len)


def _whole(core: EngineCore, w: Workload, seed: int) -> Measured:
    batch = Batch(core, w, prompts(w, core.info.vocab_size, seed), [w.output_len] * w.num_requests)
    while batch.running:
        batch.step()
    batch.close()
    wall = max(batch.last) - batch.start
    _expect(batch.counts, w.output_len, w)
    ttft = [first - batch.start for first in batch.first]
    pairs = zip(batch.first, batch.last, strict=True)
    tpot = [(last - first) / (w.output_len - 1) for first, last in pairs] if w.output_len > 1 else []
    return Measured(w, wall, w.num_requests * w.input_len, sum(batch.counts), ttft, tpot, batch.preemptions)


def _from_cache(core: EngineCore, w: Workload, prefill: Workload, seed: int) -> tuple[Measured, Measured]:
    """Runs the prefill until every request has its first token, then `output_len` more of each, all decoding together."""
    held = core.info.num_blocks * core.info.block_size
    ahead = min(w.room(core.scheduler.max_num_batched_tokens), core.info.max_model_len) - w.input_len
    if (needed := w.num_requests * (w.input_len + ahead)) > held:
        raise OctavoError(
            f"workload {w.name} keeps {needed:,} tokens in the KV cache, which holds {held:,}; "
            "use --kv-cache-dtype fp8, or leave the workload out."
        )
    batch = Batch(core, w, prompts(w, core.info.vocab_size, seed), [ahead] * w.num_requests)
    while not batch.all_started and batch.running:
        batch.step()
    boundary, before, ends = time.perf_counter(), list(batch.counts), [0.0] * w.num_requests
    first = Measured(
        prefill,
        boundary - batch.start,
        w.num_requests * w.input_len,
        w.num_requests,  # tokens decoded while other requests were prefilling are not counted
        [at - batch.start for at in batch.first],
        preemptions=batch.preemptions,
    )
    while not all(ends) and batch.running:
        batch.step()
        for i, end in enumerate(ends):
            if not end and batch.counts[i] - before[i] >= w.output_len:
                ends[i] = batch.last[i]
    extra = [count - b for count, b in zip(batch.counts, before, strict=True)]
    batch.close()
    _expect(extra, w.output_len, w)  # all requests decode in every step, unless one was preempted
    tpot = [(end - boundary) / w.output_len for end in ends]
    decoded = w.num_requests * w.output_len
    return first, Measured(w, max(ends) - boundary, 0, decoded, [], tpot, batch.preemptions)


def _expect(counts: Sequence[int], output_len: int, w: Workload) -> None:
    if wrong := [count for count in counts if count != output_len]:
        raise OctavoError(f"workload {w.name}: a request brought {wrong[0]} tokens instead of {output_len}; nothing was timed.")
