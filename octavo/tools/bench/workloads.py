"""Workloads of `octavo bench`: named ones, and model shapes that need no checkpoint. Nothing here imports torch."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import InvalidRequest, OctavoError
from octavo.messages import SamplingParams
from octavo.models import read_config
from octavo.models.published import KNOWN, known_config
from octavo.option_values import canonical

__all__ = [
    "GREEDY", "WORKLOADS", "Workload", "model_directory", "parse_sampling", "parse_workloads", "prompts",
    "shape_config", "spread",
]  # fmt: skip

# All fields are set, so that a checkpoint's generation_config.json has no effect.
GREEDY: dict[str, float] = {
    "temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together, with equal lengths in tokens.

    part: "all"; or "decode", which is timed from the moment when every request has its first token, for `output_len` further
    tokens each. sampling: parameters by the names of an API request.
    """

    name: str
    num_requests: int
    input_len: int
    output_len: int
    part: str = "all"
    sampling: Mapping[str, float] = field(default_factory=lambda: GREEDY, repr=False, hash=False)  # not in the prompts' seed

    @property
    def prefill_only(self) -> bool:
        return self.output_len == 1

    @property
    def as_json(self) -> dict[str, Any]:
        """The workload's parameters, for results."""
        return {
            "num_requests": self.num_requests, "input_len": self.input_len, "output_len": self.output_len,
            "part": "prefill" if self.prefill_only else self.part, "sampling": dict(self.sampling),
        }  # fmt: skip

    def figures(
        self, wall: float, input_tokens: int, output_tokens: int, ttft: Sequence[float], tpot: Sequence[float]
    ) -> dict[str, Any]:
        """The results of a run. Seconds: in total, of each request to its first token, and per token after it."""
        return self.as_json | {
            "input_tokens": input_tokens, "output_tokens": output_tokens, "wall_s": wall,
            "total_tok_s": (input_tokens + output_tokens) / wall, "out_tok_s": output_tokens / wall,
            "ttft_s": spread(ttft), "tpot_s": spread(tpot),
        }  # fmt: skip

    def room(self, step_tokens: int) -> int:
        """Most tokens of a request, where a step computes at least `step_tokens`.

        In a "decode" workload the first requests run ahead by one token per step while the others prefill.
        """
        ahead = self.num_requests * (-(-self.input_len // step_tokens) + 1) if self.part == "decode" else 0
        return self.input_len + self.output_len + ahead


WORKLOADS = {
    w.name: w
    for w in (
        Workload("A", 256, 1024, 512),
        Workload("B", 32, 1024, 256),
        Workload("C", 1, 128, 256),
        Workload("D", 32, 4096, 1),
        Workload("E", 16, 32768, 1),
        Workload("F", 16, 32768, 256, part="decode"),
    )
}


def parse_workloads(words: Sequence[str]) -> list[Workload]:
    """["A,C", "D"] -> the three workloads, each once, in that order. Raises OctavoError for an unknown name."""
    names = [name.strip().upper() for word in words for name in word.split(",")]
    for name in names:
        if name not in WORKLOADS:
            raise OctavoError(f"--workload '{name}' is not known; known are {', '.join(WORKLOADS)}.")
    return [WORKLOADS[name] for name in dict.fromkeys(names)]


def parse_sampling(words: str) -> dict[str, float]:
    """ "temperature=0.7,top_k=40" -> these values, and GREEDY's for the rest. Raises OctavoError."""
    found = dict(GREEDY)
    for word in words.split(","):
        name, _, value = word.partition("=")
        if (name := name.strip()) not in GREEDY:
            raise OctavoError(f"--sampling '{word}' is not known; it takes NAME=NUMBER of {', '.join(GREEDY)}.")
        try:
            found[name] = int(value) if name == "top_k" else float(value)
        except ValueError:
            kind = "a whole number" if name == "top_k" else "a number"
            raise OctavoError(f"--sampling {name} must be {kind}, not '{value}'.") from None
    try:
        SamplingParams(**found)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise OctavoError(f"--sampling: {error}") from None
    return found


def prompts(workload: Workload, vocab_size: int, seed: int | str) -> list[list[int]]:
    """Random token ids, equal for equal seeds. Ids 0 to 2, often special tokens, are left out."""
    rng = random.Random(f"{seed} {workload}")
    low = min(3, vocab_size - 1)
    return [rng.choices(range(low, vocab_size), k=workload.input_len) for _ in range(workload.num_requests)]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 99th percentile (nearest rank)."""
    if not values:
        return None
    ordered, last = sorted(values), len(values) - 1
    return {"mean": sum(values) / len(values), "p50": ordered[round(0.5 * last)], "p99": ordered[round(0.99 * last)]}


def shape_config(name: str) -> dict[str, Any]:
    """The config.json of a --shape. Raises OctavoError with a suggestion."""
    if (found := known_config(name)) is not None:
        return found[1]
    return KNOWN[canonical("--shape", name, {known.lower(): known for known in KNOWN})]


@contextmanager
def model_directory(model: str, shape: str | None, num_layers: int | None) -> Iterator[Path]:
    """A directory to load: `model` itself, or a temporary one with only config.json, for dummy weights."""
    if shape is None and num_layers is None:
        yield Path(model)
        return
    config = dict(shape_config(shape) if shape is not None else read_config(Path(model)))
    if num_layers is not None:
        if num_layers <= 0:
            raise OctavoError(f"--num-layers must be positive, not {num_layers}.")
        text = config
        if isinstance(nested := config.get("text_config"), dict):
            config["text_config"] = text = dict(nested)
        if isinstance(layers := text.get("num_hidden_layers"), int) and num_layers > layers:
            raise OctavoError(f"--num-layers {num_layers} is more than the model has; use at most {layers}.")
        text["num_hidden_layers"] = num_layers
        if isinstance(kinds := text.get("layer_types"), list):
            text["layer_types"] = kinds[:num_layers]
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        yield Path(directory)
