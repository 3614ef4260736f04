"""Tables: whatever the width of the terminal, every number and every label is there, whole."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from cases import cases
from rich.console import Console

from octavo.cli import main
from octavo.tools.rich_tables import table

COLUMNS = ["weights", "KV cache", "perplexity", "vs BF16", "KL", "KL p99", "top-1", "greedy", "memory"]
ROWS = [
    ("bf16", "BF16", "13.431", "", "0.0000", "0.0000", "100.0%", "64.0", "100.0%"),
    ("ptpc_fp8, 21 kept", "fp8_per_token_head", "1234567.431", "+1234.56% ±0.46", "0.00991", "0.0511", "95.1%", "27.8", "58%"),
]


def shown(made: Any, width: int, terminal: bool = True) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False).print(made, crop=False)
    return [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in out.getvalue().splitlines()]


@cases("width", [30, 48, 60, 80, 100, 132])
def test_no_number_and_no_label_is_cut(width: int) -> None:
    lines = shown(table("A title", COLUMNS, ROWS, words=(0, 1)), width)
    assert "…" not in "".join(lines)
    labels = len("ptpc_fp8, 21 kept  fp8_per_token_head")
    assert max(map(len, lines)) <= max(width, labels + 2 + len("+1234.56% ±0.46") + 1)
    heads = [line.split("  ") for line in lines if line.startswith("weights")]
    assert [name for head in heads for name in map(str.strip, head) if name and name not in COLUMNS[:2]] == COLUMNS[2:]
    for row in ROWS:
        own = [re.split(r"  +", line) for line in lines if line.startswith(row[0])]
        assert len(own) == len(heads)
        assert all(parts[:2] == list(row[:2]) for parts in own)
        assert [cell for parts in own for cell in parts[2:]] == [cell for cell in row[2:] if cell]
    assert (len(heads) == 1) == (width == 132)


def test_where_there_is_no_terminal_a_row_is_one_line() -> None:
    lines = shown(table("", COLUMNS, ROWS, words=(0, 1)), 60, terminal=False)
    assert sum(line.startswith("ptpc_fp8") for line in lines) == 1


def test_long_text_is_wrapped_beside_its_label() -> None:
    why = "lm_head is BF16 by default and --quantize-lm-head stores it in FP8"
    lines = shown(table("", ["", "stored as", "size", "why"], [("lm_head", "bf16", "4.2 GB", why)], words=(0, 1, 3)), 60)
    row = next(i for i, line in enumerate(lines) if line.startswith("lm_head"))
    assert lines[row].split()[:4] == ["lm_head", "bf16", "4.2", "GB"]
    assert " ".join(word for line in lines[row:] for word in line.split()[0 if line.startswith(" ") else 4 :]) == why


@pytest.mark.parametrize("width", ["60", "80"])
def test_a_plan_keeps_its_labels(width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("FORCE_COLOR", "1")
    line = ["plan", "Llama-3.1-405B", "--accelerator", "mi300x", "--num-accelerators", "8", "-q", "fp8"]
    assert main([*line, "--kv-cache-dtype", "fp8"]) == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "…" not in text
    memory = text[text.index("Memory in percent") : text.index("What happens to each group")]
    for label in ("  BF16", "  FP8", "> FP8 + FP8 KV", "  PTPC", "  PTPC + FP8 KV"):
        assert len(re.findall(rf"(?m)^{re.escape(label)}  ", memory)) >= 3, label
    for number in ("252.0 KiB", "120.5 GB", "3,735,936", "4,336"):
        assert number in memory
