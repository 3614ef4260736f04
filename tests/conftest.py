"""Tiny checkpoints that transformers wrote, and Octavo's model of them without an engine around it."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: no test asks the network
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's: references are small, and its threads wait in loops

import octavo.engine  # noqa: F401 (says how torch's threads wait, before torch is loaded)

import torch  # isort: skip

import ops.interpreter

from octavo import batch, ops
from octavo.distributed import TensorParallel
from octavo.kvcache import KVCache, Layout
from octavo.models import build_model, read_config
from octavo.platform import Platform, detect
from octavo.quant import BF16, QuantRules, Scheme
from octavo.weights import Loader, SafetensorsSource, load

VOCAB = 256
ONE = TensorParallel()
COMMON = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=136, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip


@dataclasses.dataclass
class Loaded:
    """A model with a cache of its own, to be run without an engine."""

    model: Any
    cache: KVCache
    platform: Platform
    loader: Loader
    block_size: int = 4

    def hidden(self, spans: list[batch.Span]) -> torch.Tensor:
        with torch.inference_mode():
            built = batch.build(spans, self.block_size, self.platform.device)
            return self.model(built, self.model.embed(built.input_ids))

    def logits(self, ids: list[int], chunks: tuple[int, ...] = ()) -> torch.Tensor:
        """Logits of every position of one sequence, computed in parts of the given lengths (default: all at once)."""
        blocks = list(range(1, 2 + len(ids) // self.block_size))
        start, parts = 0, []
        for length in chunks or (len(ids),):
            parts.append(self.hidden([batch.Span(ids[start : start + length], start, blocks)]))
            start += length
        assert start == len(ids)
        with torch.inference_mode():
            return self.model.logits(torch.cat(parts)).float()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: a GPU is one process's at a time, and a process's models and kernels take up to 2 GB of memory."""
    return 0 if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))


LONG = ("ops/test_compile.py", "ops/test_native_build.py", "engine/test_rehearsal.py")  # of few tests, each of tens of seconds
WAITING = "nodes"  # tests that wait for other processes and for silence more than they compute


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two processes one begins with what computes longest and the other with what waits most, so that neither ends alone
    with a long test: xdist gives each a half, and a process that is done takes from the other's, but never its next two."""
    here = Path(__file__).parent
    long = [item for item in items if item.path in {here / name for name in LONG}]
    waiting = [item for item in items if item.path.is_relative_to(here / WAITING)]
    taken = {*long, *waiting}
    rest = [item for item in items if item not in taken]
    half = max(len(items) // 2 - len(long), 0)
    items[:] = [*long, *rest[:half], *waiting, *rest[half:]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says above pytest's own closing line why tests were skipped: each reason once, with the number of tests that had it."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    if reasons:
        counted = "; ".join(f"{count} \N{MULTIPLICATION SIGN} {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped: {counted}")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(told.removeprefix("Skipped: ").split()) or "no reason was given"


@pytest.fixture(scope="session")
def platform() -> Platform:
    return detect()


LoadModel = Callable[..., Loaded]


@pytest.fixture
def load_model(platform: Platform) -> LoadModel:
    """load_model(directory, scheme=BF16, kv="auto", dtype=float32, ...) -> Loaded"""

    def make(
        directory: Path,
        scheme: Scheme = BF16,
        kv: str = "auto",
        dtype: torch.dtype = torch.float32,
        rules: QuantRules | None = None,
        on: Platform = platform,
        tp: TensorParallel = ONE,
        layers: range | None = None,
    ) -> Loaded:
        ops.bind(on)
        config = read_config(directory)
        model = build_model(config, tp, config.get("max_position_embeddings"), layers)
        loader = Loader(SafetensorsSource(directory), on, rules or QuantRules(scheme), dtype, tp)
        load(model, loader, model.ignored)
        cache = KVCache(model.kv_specs(kv, dtype, on.fp8_dtype, Layout.on(on.is_cpu)), 40, 4, on.device)
        model.bind_cache(cache.views)
        return Loaded(model, cache, on, loader)

    return make


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; NaN if anything is."""
    out, ref = out.double().cpu(), ref.double().cpu()
    return float((out - ref).norm() / ref.norm())


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
