"""What a plan says first: whether it fits, the command to run or why there is none, and advice that holds when it is taken."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from cases import cases
from tools.planner import answer

from octavo.cli import engine_config, main, make_parser
from octavo.flags import COMMANDS
from octavo.server import serve
from octavo.tools.plan.accelerators import ACCELERATORS


def first_lines(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, list[str]]:
    """The verdict, whose lines are joined, and the lines before the next empty one that follow it."""
    assert main(["plan", *words]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    end = next((i for i, line in enumerate(lines) if line.startswith("  ")), len(lines))
    return " ".join(lines[:end]), lines[end:]


def test_the_command_of_what_fits_asks_for_what_was_planned(capsys: pytest.CaptureFixture[str]) -> None:
    verdict, (line,) = first_lines(capsys, "Llama-3.1-8B", "--accelerator", "h100", "--max-model-len", "8192")
    assert re.fullmatch(
        r"It fits: PTPC \+ FP8 KV on 1 x NVIDIA H100 SXM holds [\d.]+ requests of 8,192 tokens at a time\.", verdict
    )
    words = shlex.split(line)
    assert words[:2] == ["octavo", "serve"]
    config = engine_config(make_parser("serve", serve.add_arguments).parse_args(words[2:]))
    assert (config.quantization, config.kv_cache_dtype, config.max_model_len) == ("ptpc_fp8", "fp8_e4m3", 8192)


@pytest.mark.parametrize(
    "words",
    [
        ("Llama-3.1-405B", "--accelerator", "h200"),
        ("Kimi-K2.5", "--accelerator", "mi355x"),
        ("Llama-3.1-8B", "--accelerator", "rtx4090", "-q", "bf16", "--max-model-len", "131072"),
        ("Llama-3.1-70B", "--accelerator", "h100", "--num-accelerators", "2", "-q", "bf16"),
    ],
)
def test_the_advice_for_what_does_not_fit_makes_it_fit(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    verdict, reasons = first_lines(capsys, *words)
    assert verdict.startswith("It does not fit: ")
    assert verdict.endswith(" Octavo would not start it:")
    assert reasons[0].startswith("  - ")
    found = answer(*words)
    assert (found["fits"], found["command"], found["verdict"]) == (False, None, verdict)
    if (more := re.search(r"\((--num-accelerators \d+)\)", verdict)) is not None:
        advised = [*words, *more[1].split()]
    else:
        more = re.search(r"Use (--.*), which fits\.", verdict)
        assert more is not None
        kept = words[: words.index("-q")] + words[words.index("-q") + 2 :]
        advised = [*kept, *more[1].split()]
    assert answer(*advised)["fits"]


def test_what_fits_and_is_refused_has_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    refused = ["Llama-3.1-8B", "--accelerator", "h200", "-tp", "8"]
    verdict, reasons = first_lines(capsys, *refused)
    assert verdict.startswith("There are too few accelerators: ")
    assert verdict.endswith(" Octavo would not start it:")
    assert reasons == ["  - --tensor-parallel-size 8 needs 8 accelerators, and there is one."]
    for ranks, number, words in (("8", "1", "8 x NVIDIA H200"), ("2", "4", "2 of 4 x NVIDIA H200"), ("8", "8", "8 x NVIDIA")):
        on = "--accelerator", "h200", "--num-accelerators", number
        assert f" on {words}" in first_lines(capsys, "Llama-3.1-8B", *on, "-tp", ranks)[0]
    assert main(["plan", *refused]) == 0
    assert "octavo serve" not in capsys.readouterr().out


@cases("name", [name for name, one in ACCELERATORS.items() if one.refusal])
def test_an_accelerator_that_is_refused_fits_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verdict, reasons = first_lines(capsys, "Llama-3.1-8B", "--accelerator", name)
    assert verdict.startswith("It is refused, though memory would do: PTPC + FP8 KV on 1 x ")
    assert verdict.endswith(" tokens at a time. Octavo would not start it:")
    assert " has no FP8 units; Octavo needs gfx942," in reasons[0]
    assert "It fits" not in json.dumps(answer("Llama-3.1-8B", "--accelerator", name))


def test_a_flag_that_plan_takes_changes_the_plan(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text('{"quantization": "fp8_block"}')
    of_images = ["Qwen3-VL-8B", "--accelerator", "h200"]
    of_a_gpu, of_a_cpu = ["Llama-3.1-8B", "--accelerator", "h200"], ["--accelerator", "cpu", "--max-num-seqs", "4096"]
    base = [*of_a_gpu, "-q", "fp8"]
    lines: dict[str, tuple[list[str], list[str]]] = {
        "quantization": (base, ["ptpc_fp8"]),
        "quantization_ignore": (base, ["o_proj"]),
        "quantize_lm_head": (base, []),
        "quantization_config": (of_a_gpu, [str(tmp_path / "found.json")]),
        "kv_cache_dtype": (base, ["fp8"]),
        "decode_activations": (base, ["bf16"]),
        "kv_cache_rounding": (base, ["calibrated"]),
        "calculate_kv_scales": (["DeepSeek-V3", "--accelerator", "h200"], []),
        "dtype": (base, ["float32"]),
        "load_format": (["--accelerator", "cpu"], ["dummy"]),
        "max_model_len": (base, ["512"]),
        "gpu_memory_utilization": (base, ["0.5"]),
        "cpu_kv_cache_gib": (of_a_cpu, ["0.25"]),
        "tensor_parallel_size": (base, ["2"]),
        "enable_expert_parallel": (["Qwen3-30B-A3B", "--accelerator", "h200", "--num-accelerators", "2", "-tp", "2"], []),
        "pipeline_parallel_size": (["Llama-3.1-8B", "--accelerator", "h200", "--num-accelerators", "2", "-tp", "1"], ["2"]),
        "block_size": (base, ["48"]),
        "max_num_seqs": (base, ["7"]),
        "max_num_batched_tokens": (base, ["77"]),
        "limit_mm_per_prompt": (of_images, ['{"image": 0, "video": 0}']),
        "language_model_only": (of_images, []),
        "mm_processor_cache_gb": (of_images, ["9"]),
        "mm_encoder_tp_mode": ([*of_images, "--num-accelerators", "8", "-tp", "8"], ["data"]),
    }
    elsewhere = {"model", "revision", "download_dir", "device"}  # what is planned, and on what
    assert set(lines) == {*COMMANDS["plan"].engine} - elsewhere
    without = {tuple(words): answer(*words) for words, _ in lines.values()}
    same = [name for name, (words, more) in lines.items()
            if answer(*words, f"--{name.replace('_', '-')}", *more) == without[tuple(words)]]  # fmt: skip
    assert same == []
