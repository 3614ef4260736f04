"""`octavo plan`: checkpoints read by their headers, refusals, machines, output; and the engine, which must agree."""

from __future__ import annotations

import json
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cases import cases
from tools.planner import answer, checkpoint, plan_of

from octavo.cli import main
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.models.published import FP8_BLOCKS, known_config
from octavo.platform import detect
from octavo.tools.plan import accelerators
from octavo.tools.plan.explain import command, groups, notes, refusals

DEMO_BYTES = 11_540_992


@cases(
    ("words", "options"),
    [
        ((), {}),
        (("-q", "ptpc_fp8", "--kv-cache-dtype", "fp8"), {"quantization": "ptpc_fp8", "kv_cache_dtype": "fp8"}),
        (("-q", "fp8", "--quantize-lm-head"), {"quantization": "fp8", "quantize_lm_head": True}),
        (("-q", "fp8_block", "--quantize-lm-head"), {"quantization": "fp8_block", "quantize_lm_head": True}),
        (
            (
                "-q",
                "fp8_block",
                "--kv-cache-dtype",
                "fp8_per_token_head",
                "--quantization-ignore",
                "down_proj",
                "model.layers.0.*",
            ),
            {
                "quantization": "fp8_block",
                "kv_cache_dtype": "fp8_per_token_head",
                "quantization_ignore": ("down_proj", "model.layers.0.*"),
            },
        ),
        (("--dtype", "float32", "-q", "bf16", "--max-num-seqs", "4"), {"dtype": "float32", "max_num_seqs": 4}),
    ],
)
def test_the_engine_allocates_what_was_planned(words: tuple[str, ...], options: dict[str, object]) -> None:
    from octavo.config import EngineConfig
    from octavo.engine.runner import ModelRunner

    bf16 = () if words else ("-q", "bf16")
    plan = plan_of(*words, *bf16, "--accelerator", "cpu", "--cpu-kv-cache-gib", "0.25")
    runner = ModelRunner(EngineConfig(device="cpu", cpu_kv_cache_gib=0.25, **options))  # type: ignore[arg-type]
    assert plan.asked.fit is not None
    assert plan.asked.weights == runner.report.total("stored")
    assert plan.question.subject.base.total("values") == runner.report.total("values")
    assert plan.asked.token_bytes == runner.bytes_per_token
    assert plan.asked.fit.cache == pytest.approx(runner.cache.nbytes, rel=0.02)
    assert plan.asked.fit.max_model_len == runner.max_model_len


def test_the_demo_model_is_counted_by_its_headers() -> None:
    found = answer("--accelerator", "cpu")
    assert found["measured_by"] == "its safetensors headers"
    assert found["parameters_in_headers"] == found["parameters_by_component"]
    assert sum(found["parameters_by_component"].values()) == found["parameters"] == DEMO_BYTES // 2
    assert found["bytes_on_disk"] == found["variants"]["BF16"]["weights"] == DEMO_BYTES
    assert not found["refused"]
    assert answer(str(MODEL_DIR / "config.json"), "--accelerator", "cpu")["parameters"] == found["parameters"]


def test_a_tied_head_is_one_matrix_with_the_embeddings() -> None:
    """Qwen3-0.6B: 151,936 x 1024 values that are looked up and multiplied by, with a scale a row as ptpc_fp8."""
    values = 151_936 * 1024
    words = ("Qwen3-0.6B", "--accelerator", "h200", "-q", "ptpc_fp8")
    plain, quantized = plan_of(*words), plan_of(*words, "--quantize-lm-head")
    assert (plain.asked.components["embeddings"], plain.asked.components["lm_head"]) == (2 * values, 0)
    sizes = quantized.asked.components
    assert (sizes["embeddings"], sizes["lm_head"]) == (values + 4 * 151_936, 0)
    assert plain.asked.weights - quantized.asked.weights == values - 4 * 151_936
    found = {g.component: (g.format, g.nbytes) for g in groups(quantized)}
    assert found["embeddings"] == ("ptpc_fp8", sizes["embeddings"])
    assert found["lm_head"] == ("ptpc_fp8", 0)
    assert "embeddings and lm_head stay BF16" in " ".join(notes(plain))
    assert "stay BF16" not in " ".join(notes(quantized))
    untied = plan_of("Llama-3.1-8B", "--accelerator", "h200", "-q", "ptpc_fp8", "--quantize-lm-head")
    assert "; embeddings stay BF16 and add to it." in " ".join(notes(untied))


def test_the_fp8_list_in_config_json_is_enough() -> None:
    """Kimi's ignore list leaves only the experts in INT4; Qwen's FP8 release has all but routers, embeddings and the head."""
    for name in ("Kimi-K2.5", "Kimi-K2-Thinking"):
        found = answer(name, "--accelerator", "mi355x", "--num-accelerators", "8")
        kimi = {g["component"]: g["format"] for g in found["groups"]}
        assert {part for part, form in kimi.items() if form.startswith("int4")} == {"experts"}
        assert kimi["KV cache"] == "fp8_ds_mla"
        assert found["max_model_len"] == 262_144
        assert ("vision" in kimi) == (name == "Kimi-K2.5")
        assert found["refused"] == []
    alone = answer("Kimi-K2.5", "--accelerator", "mi355x", "--num-accelerators", "8", "--language-model-only")
    assert any("The vision tower is left out" in note for note in alone["notes"])
    qwen = {g["component"]: g["format"] for g in answer("Qwen3-30B-A3B-FP8", "--accelerator", "h200")["groups"]}
    assert {name for name, form in qwen.items() if form == "fp8_block"} == {"attention", "experts"}


def test_shapes_that_fp8_units_do_not_take_are_padded(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, {}, intermediate_size=24)
    plan = plan_of(directory + "/config.json", "--accelerator", "h200", "--num-accelerators", "2")
    mlp = next(g for g in groups(plan) if g.component == "mlp")
    assert mlp.remarks == ["48 / 2 = 24 is padded to 32", "24 / 2 = 12 is padded to 16"]
    assert plan.asked.rank_weights[2] == plan.asked.fit.weights  # type: ignore[union-attr]


@cases(
    ("words", "sentence"),
    [
        (("Llama-3.1-8B", "-tp", "8"), "--tensor-parallel-size 8 needs 8 accelerators, and there is one."),
        (("Llama-3.1-8B", "-tp", "8", "--num-accelerators", "4"), "needs 8 accelerators, and there are 4."),
        (("Llama-3.1-8B", "-tp", "3", "--num-accelerators", "3"), "32 heads with 8 of keys do not split over 3 ranks"),
        (("Llama-3.1-8B", "--max-model-len", "200k"), "over the 131072 positions"),
        (("Llama-3.1-8B", "--accelerator", "a100"), "(sm_80) has no FP8 units"),
        (("Llama-3.1-8B", "--accelerator", "mi250x"), "(gfx90a) has no FP8 units"),
        (
            ("Llama-3.1-405B",),
            "the weights alone would take 377.98 GiB of memory (1 byte(s) a value here), and 139.30 GiB is free",
        ),
        (
            ("Llama-3.1-8B", "--accelerator", "rtx4090", "-q", "fp8", "--max-model-len", "131072"),
            ", use --kv-cache-dtype fp8 (half of it)",
        ),
        (("Qwen3-30B-A3B-FP8", "-tp", "64", "--num-accelerators", "64"), "32 heads with 4 of keys do not split over 64 ranks"),
        (("Llama-3.1-8B", "-q", "bf16", "--quantize-lm-head"), "--quantize-lm-head needs a scheme"),
    ],
)
def test_refusals_are_one_sentence_each(words: tuple[str, ...], sentence: str) -> None:
    chosen = words if "--accelerator" in words else (*words, "--accelerator", "h200")
    found = refusals(plan_of(*chosen))
    assert any(sentence in text for text in found), found
    assert all(text.endswith(".") and "\n" not in text for text in found)


def test_packed_int4_takes_what_is_stored() -> None:
    """Half a byte a value and a BF16 scale for 32 of them: 4.5 bits."""
    directory = Path(__file__).parents[1] / "data/formats/llm_compressor_w4a16"
    plan = plan_of(str(directory), "--accelerator", "cpu")
    assert not refusals(plan)
    for one in (plan, plan_of("Kimi-K2.5", "--accelerator", "mi355x", "--num-accelerators", "8")):
        packed = [o for o in one.question.subject.base.operands if o.form == "int4"]
        assert packed
        assert all(o.stored * 8 == o.values * 4.5 for o in packed)


@cases(
    ("words", "message"),
    [
        (("--accelerator", "MI-355"), "--accelerator 'MI-355' is not known; did you mean 'mi355x'?"),
        (("Llama-3.1-450B",), "did you mean 'Llama-3.1-405B'?"),
        (("/nowhere/at/all",), "is no directory, no config.json and no model that is known by name"),
        (("--num-accelerators", "0"), "--num-accelerators must be positive, not 0."),
        (("--num-accelerators", "1000000"), "--num-accelerators must be at most 4096, not 1000000."),
        (("--num-hosts", "5000"), "--num-hosts must be at most 4096, not 5000."),
        (("--num-hosts", "2", "--host-link", "nan"), "--host-link must be positive, not nan."),
        (("DeepSeek-V3.2", "--kv-cache-dtype", "fp8_e5m2"), "is not for MLA models, whose FP8 cache is fp8_ds_mla; use fp8,"),
        (("Llama-3.1-8B", "--kv-cache-dtype", "fp8_ds_mla"), "--kv-cache-dtype fp8_ds_mla is for MLA models"),
        (("--device", "cpu", "--accelerator", "h200"), "--device cpu and --accelerator h200 contradict each other; give one"),
        (("--device", "cuda", "--accelerator", "CPU"), "--device cuda and --accelerator CPU contradict each other; give one"),
        (("--quantization-ignore", "no_such_layer"), "'no_such_layer' matches no layer of this model"),
        (("--quantization-ignore", "re:("), "is not a regular expression"),
    ],
)
def test_nonsense_is_refused_with_a_suggestion(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_roofline_is_the_hardwares() -> None:
    """Llama-3.1-8B on one H200: 8.03 GB (no embedding) at 4.22 TB/s a token, 14 GFLOP at 1.3 PFLOP/s a prompt token."""
    words = ("Llama-3.1-8B", "--accelerator", "h200", "-q", "ptpc_fp8", "--kv-cache-dtype", "fp8")
    one = plan_of(*words, "--context", "256").asked.speed
    assert one is not None
    assert one.decode_one == pytest.approx(527, rel=0.02)
    assert one.prefill == pytest.approx(92_000, rel=0.03)
    speeds = [v.speed for v in plan_of(*words).variants]
    assert all(s is not None and s.requests == 64 for s in speeds)
    bf16, *fp8 = [s for s in speeds if s is not None]
    assert all(
        1.1 < getattr(s, what) / getattr(bf16, what) < 2.01 for s in fp8 for what in ("prefill", "decode_one", "decode_many")
    )


def test_weights_alone_in_fp8_are_multiplied_as_bf16() -> None:
    found = answer("Llama-3.1-8B", "--accelerator", "h200", "-q", "fp8_w8a16", "--kv-cache-dtype", "auto")
    assert found["asked"] == "W8A16"
    assert found["variants"]["W8A16"]["speed"]["prefill"] == pytest.approx(found["variants"]["BF16"]["speed"]["prefill"])
    assert any("the rest, W8A16, INT4 and MLA too, in BF16" in text for text in found["assumptions"])


def test_what_fits() -> None:
    fits = answer("Llama-3.1-405B", "--accelerator", "mi300x", "--num-accelerators", "8")["variants"]
    assert fits["BF16"]["smallest"] == 8
    assert fits["PTPC"]["smallest"] == 4
    room = fits["PTPC + FP8 KV"]["fit"]["room"]
    assert fits["PTPC + FP8 KV"]["fit"]["tokens"] == room // (126 * 2 * 128 * 64) * 64
    assert fits["PTPC + FP8 KV"]["token_percent"] == 50
    assert fits["PTPC + FP8 KV"]["request_percent"] == pytest.approx(50.5, abs=0.1)


@cases(
    ("accelerator", "memory", "scheme", "weights"),  # GB of a rank: an eighth of what is split, all of the latents' projections
    [
        ("mi300x", 192 << 30, (), 86.15), ("mi325x", 256 << 30, (), 86.15), ("h200", int(139.8 * (1 << 30)), (), 86.15),
        ("mi300x", 192 << 30, ("-q", "fp8_block"), 86.15), ("h200", int(139.8 * (1 << 30)), ("-q", "bf16"), 171.3),
    ],
)  # fmt: skip
def test_deepseek_v32_on_eight(accelerator: str, memory: int, scheme: tuple[str, ...], weights: float, tmp_path: Path) -> None:
    """As the hub has it, in blocks, and from a BF16 checkpoint, which fits where it is quantized while it is loaded."""
    config = known_config("DeepSeek-V3.2")[1]  # type: ignore[index]
    hub = config | {"quantization_config": FP8_BLOCKS | {"fmt": "e4m3", "scale_fmt": "ue8m0"}}
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(plain if scheme else hub))
    words = (*scheme, "--kv-cache-dtype", "auto") if scheme else ()
    plan = plan_of(str(tmp_path / "config.json"), "--accelerator", accelerator, "--num-accelerators", "8", *words)
    fit, token = plan.asked.fit, 61 * (656 + 132)
    assert (plan.question.tp, plan.asked.token_bytes) == (8, token)
    assert fit is not None
    assert fit.weights / 1e9 == pytest.approx(weights, rel=1e-3)
    working = plan.question.subject.model(8).workspace_bytes(8192) + 256 * 129_280 * 4 * 6
    positions = 163_840 * 64 * 4
    room = 0.9 * memory - (3 << 29) - fit.weights - positions - working  # less what a driver takes, and NCCL
    assert fit.tokens == pytest.approx(max(0, room) / token, abs=64)
    assert fit.max_model_len == (163_840 if room > 0 else 0)
    assert (room > 0) == (scheme != ("-q", "bf16"))
    option = "--quantization fp8_block " if "fp8_block" in scheme else ""
    assert command(plan, {}) == f"octavo serve {tmp_path} {option}--kv-cache-dtype fp8 --tensor-parallel-size 8"


def fake_tool(directory: Path, name: str, output: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    (directory / name).chmod(0o755)


def test_the_machines_accelerators_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake_tool(tmp_path, "nvidia-smi", "NVIDIA H100 80GB HBM3, 81559, 9.0\nNVIDIA H100 80GB HBM3, 81559, 9.0")
    found, number = accelerators.in_this_machine()
    assert (number, found.memory, found.bandwidth) == (2, 81559 << 20, 3.35e12)
    fake_tool(tmp_path, "nvidia-smi", "NVIDIA GeForce RTX 4090, 24564, 8.9")
    assert accelerators.in_this_machine()[0].fp8 == 330.3e12
    fake_tool(tmp_path, "nvidia-smi", "NVIDIA Something New, 100000, 13.0")
    found, _ = accelerators.in_this_machine()
    assert (found.bandwidth, found.has_fp8) == (0, True)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    card = {"Card Series": "AMD Instinct MI300X", "GFX Version": "gfx942", "VRAM Total Memory (B)": "206141652992"}
    fake_tool(tmp_path, "rocm-smi", json.dumps({f"card{i}": card for i in range(8)} | {"system": {}}))
    found, number = accelerators.in_this_machine()
    assert (number, found.arch, found.memory, found.bandwidth) == (8, "gfx942", 206141652992, 5.3e12)


def test_a_device_is_planned_for_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for tool in ("nvidia-smi", "rocm-smi"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / tool).chmod(0o755)
    for words in ([], ["--device", "cpu"], ["--accelerator", "cpu"], ["--device", "cpu", "--accelerator", "cpu"]):
        assert plan_of(*words).question.on.is_cpu
    with pytest.raises(OctavoError, match="--device cuda: this machine has no accelerator; name the one that is meant"):
        plan_of("--device", "cuda")
    assert plan_of("--device", "cuda", "--accelerator", "h200").question.on.name == "NVIDIA H200 SXM"
    fake_tool(tmp_path, "nvidia-smi", "NVIDIA H100 80GB HBM3, 81559, 9.0")
    assert plan_of("--device", "cuda").question.on.arch == "sm_90"


def test_the_host_has_the_memory_that_the_engine_sees() -> None:
    host = accelerators.find("cpu")
    free, total = detect("cpu").memory()
    assert host.memory == total
    assert host.free == pytest.approx(free, rel=0.05)


@cases("name", ["Llama-3.1-405B", "DeepSeek-V3.2", "Kimi-K2.5", "Qwen3-VL-235B-A22B", ""])
def test_tables_are_readable_at_100_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = [name, "--accelerator", "mi355x", "--num-accelerators", "8"] if name else ["--accelerator", "cpu"]
    assert main(["plan", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    command = next((line for line in lines if line.startswith("  octavo serve")), None)
    assert max(len(line) for line in lines if line != command) <= 100
    assert "…" not in "".join(lines)
    assert command is not None


def test_the_command_keeps_what_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["Llama-3.1-8B", "--accelerator", "h200", "-q", "fp8", "--max-model-len", "8192", "--quantize-lm-head"]
    assert main(["plan", *words, "--quantization-ignore", "o_proj", "re:.*layers.0.*", "--block-size", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == (
        "octavo serve path/to/Llama-3.1-8B --quantization fp8 --quantization-ignore o_proj 're:.*layers.0.*' "
        "--quantize-lm-head --max-model-len 8192 --block-size 32"
    )


def test_the_table_of_the_page_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    (block,) = re.findall(r"```\n\$ octavo (plan .*?)\n```", page, re.DOTALL)
    command, shown = block.replace("\\\n", " ").split("\n", 1)
    assert main(shlex.split(command)) == 0
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    assert [line for line in shown.splitlines() if line not in {*printed, "…"}] == []


def test_a_plan_is_quick() -> None:
    """Whatever importing torch takes, the plan of a large model takes little more: no weight is made, no compiler imported."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stderr == ""
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime  # of the processor, since the machine may be busy

    words = "['plan', 'Llama-3.1-405B', '--accelerator', 'mi355x', '--num-accelerators', '8']"
    code = f"import sys; from octavo.cli import main; main({words}); assert 'torch._dynamo' not in sys.modules"
    assert seconds(code) < 3 * seconds("import torch")
