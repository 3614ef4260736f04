"""How much KV cache is planned, what is said when it does not fit, and what the report says of FP8's bytes."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import cases
from conftest import COMMON

from octavo import LLM
from octavo.config import EngineConfig
from octavo.demo import MODEL_DIR
from octavo.distributed import TensorParallel
from octavo.engine.core import EngineCore
from octavo.engine.load_summary import without_effect
from octavo.engine.loading import _check_room
from octavo.engine.memory import GIB, check_weights, gib, length_held, plan_blocks
from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant import BF16
from octavo.stages import Stages
from octavo.weights import SafetensorsSource


@dataclass(frozen=True)
class Machine(Platform):
    """A device with the memory that a test gives it."""

    free: int = 0
    total: int = 0

    def memory(self) -> tuple[int, int]:
        return self.free, self.total


def cpu(free: float = 16, total: float = 32) -> Machine:
    return Machine(torch.device("cpu"), "avx512", free=int(free * GIB), total=int(total * GIB))


def cuda(free: float = 70, total: float = 80) -> Machine:
    return Machine(torch.device("cuda", 0), "sm_90", free=int(free * GIB), total=int(total * GIB))


PER_TOKEN = 1 << 17  # 128 KiB; a block of 16 tokens takes 2 MiB, 512 blocks a GiB


def plan(device: Platform, length: int = 4096, working: float = 0, **options):
    config = EngineConfig(model="x", **options)
    return plan_blocks(config, device, PER_TOKEN, length, 8 * GIB, int(working * GIB))


def test_bytes_and_blocks_that_are_asked_for():
    for device in (cpu(free=20), cuda(free=20)):
        assert plan(device, block_size=16, kv_cache_memory_bytes=3 * GIB).num_blocks == 3 * 512  # whatever else is free
        assert plan(device, block_size=16, kv_cache_memory_bytes=3 * GIB, num_gpu_blocks_override=300).num_blocks == 300
        with pytest.raises(OctavoError, match=r"--kv-cache-memory-bytes .* is 19.50 GiB, and 19.00 GiB is free beside weights"):
            plan(device, block_size=16, kv_cache_memory_bytes=int(19.5 * GIB), working=1)
        with pytest.raises(OctavoError, match=r"raise --kv-cache-memory-bytes [(]now 4194304[)]"):
            plan(device, block_size=16, kv_cache_memory_bytes=4 << 20, max_model_len=4096)
    assert plan(cpu(), length=64, num_gpu_blocks_override=900, max_num_seqs=1).num_blocks == 900  # more than are of use
    with pytest.raises(OctavoError, match=r"--num-gpu-blocks-override 2049 asks for 4.00 GiB of KV cache, and 2048 blocks fit"):
        plan(cpu(), num_gpu_blocks_override=2049)


def test_blocks_on_a_cpu():
    assert plan(cpu()).num_blocks == 4 * 512  # the default
    assert plan(cpu(free=6)).num_blocks == 3 * 512  # half of what is free, where that is less
    assert plan(cpu(free=6), cpu_kv_cache_gib=5).num_blocks == 5 * 512
    assert plan(cpu(), cpu_kv_cache_gib=2.001, block_size=32).num_blocks == 512


def test_a_cache_that_is_asked_for_is_compared_with_what_is_free():
    """Before the weights are read, and again beside them; what the requests could never use is no part of it."""
    told = r"--cpu-kv-cache-gib 500 makes a KV cache of (\S+) GiB, and (\S+) GiB is free: lower it"
    asked = EngineConfig(model="x", cpu_kv_cache_gib=500)
    for wrong, free in (
        (lambda: length_held(asked, cpu(free=16), PER_TOKEN, 4096), "16.00"),
        (lambda: plan(cpu(free=12), cpu_kv_cache_gib=500), "12.00"),
    ):
        with pytest.raises(OctavoError, match=told) as caught:
            wrong()
        assert re.search(told, str(caught.value)).groups() == ("128.00", free)  # 256 requests of 4096 tokens
    assert plan(cpu(free=1), length=160, max_num_seqs=3, cpu_kv_cache_gib=500).num_blocks == 30
    assert length_held(asked, cpu(free=129), PER_TOKEN, 4096) == 4096
    assert length_held(asked, cuda(free=1), PER_TOKEN, 4096) == 1  # an accelerator's cache is in its own memory


def test_blocks_on_an_accelerator():
    a_gib = 512 // 4  # blocks there hold 64 tokens, not 16
    assert plan(cuda()).num_blocks == int((80 * 0.9 - 10) * a_gib)
    assert plan(cuda(), working=3).num_blocks == int((80 * 0.9 - 13) * a_gib)
    assert plan(cuda(), gpu_memory_utilization=0.5).num_blocks == 30 * a_gib
    assert plan(cuda(free=80), gpu_memory_utilization=1).num_blocks == 80 * a_gib
    assert plan(cuda(), gpu_memory_utilization=0.5, block_size=16).num_blocks == 30 * 512


def test_no_more_blocks_than_could_be_used_at_once():
    assert plan(cpu(), length=160, max_num_seqs=3).num_blocks == 30
    assert plan(cpu(), length=161, max_num_seqs=3).num_blocks == 33
    assert plan(cuda(), length=161, max_num_seqs=3).num_blocks == 9


def test_a_length_that_nobody_asked_for_is_lowered():
    budget = plan(cpu(), length=131_072)
    assert (budget.num_blocks, budget.max_model_len) == (2048, 32_768)
    assert budget.notes == ("max_model_len lowered from 131072 to 32768: that is what 4.00 GiB of KV cache holds",)
    exact = plan(cpu(), length=32_768)
    assert (exact.num_blocks, exact.max_model_len, exact.notes) == (2048, 32_768, ())


@pytest.mark.parametrize(
    ("platform", "options", "parts"),
    [
        (
            cpu(),
            dict(max_model_len=65_536),
            [
                "65536 tokens needs 8.00 GiB",
                "4.00 GiB of 32.00 GiB is left",
                "lower --max-model-len to 32768",
                "use --kv-cache-dtype fp8 (half",
                "raise --cpu-kv-cache-gib (now 4.00)",
            ],
        ),
        (
            cuda(free=14),
            dict(max_model_len=65_536),
            [
                "65536 tokens needs 8.00 GiB",
                "6.00 GiB of 80.00 GiB is left",
                "lower --max-model-len to 49152",
                "use --kv-cache-dtype fp8 (half",
                "raise --gpu-memory-utilization (now 0.9)",
            ],
        ),
        (
            cuda(free=7),  # the model took more than its part
            dict(max_model_len=4096, gpu_memory_utilization=0.9),
            ["but 0.0 KiB of 80.00 GiB", "smaller model or quantization (weights take 8.00 GiB)"],
        ),
        (cpu(), dict(cpu_kv_cache_gib=0.2), ["32768 tokens needs 4.00 GiB", "0.20 GiB", "lower --max-model-len to 1632"]),
    ],
)
def test_what_does_not_fit(platform, options, parts):
    with pytest.raises(OctavoError) as caught:
        plan(platform, options.get("max_model_len", 32_768), **options)
    sentence = str(caught.value)
    assert [part for part in parts if part not in sentence] == [], sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    lowered = re.search(r"--max-model-len to (\d+)", sentence)
    if lowered:  # the advice works, and no larger length would
        length = int(lowered[1])
        assert plan(platform, length, **options | dict(max_model_len=length)).max_model_len == length
        with pytest.raises(OctavoError):
            plan(platform, length + 1, **options | dict(max_model_len=length + 1))


def test_ranks_of_a_cpu_share_the_cache_that_is_asked_for():
    """What is said of it is the flag's value, not one rank's part."""
    with pytest.raises(OctavoError, match=r"but 2\.00 GiB of .* raise --cpu-kv-cache-gib \(now 4\.00\)"):
        plan(cpu(), 65_536, max_model_len=65_536, cpu_kv_cache_gib=4, tensor_parallel_size=2)


def test_fp8_is_not_advised_to_those_who_have_it():
    with pytest.raises(OctavoError) as caught:
        plan(cpu(), 65_536, max_model_len=65_536, kv_cache_dtype="fp8")
    assert "--kv-cache-dtype" not in str(caught.value)


def test_images_that_take_too_much_are_named():
    def told(free: float, images: float) -> str:
        config = EngineConfig(model="x", max_model_len=4096, mm_processor_cache_gb=5)
        with pytest.raises(OctavoError) as caught:
            plan_blocks(config, cuda(free), PER_TOKEN, 4096, 8 * GIB, int(6 * GIB), None, None, int(images * GIB))
        return str(caught.value)

    assert "left for it: lower --mm-processor-cache-gb (now 5; images take 5.50 GiB), use --language-model-only" in told(
        14, 5.5
    )
    assert "--mm-processor" not in told(14, 0.2)  # where the request would not fit without them either
    assert "--mm-processor" not in told(8, 5.5)


def test_bytes_for_a_person():
    counts = [0, 4096, 1 << 20, GIB // 10 + 1, GIB * 3 / 2]
    assert [gib(count) for count in counts] == ["0.0 KiB", "4.0 KiB", "1.0 MiB", "0.10 GiB", "1.50 GiB"]


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    """A checkpoint for --load-format dummy: a config.json alone."""
    path = tmp_path_factory.mktemp("dummy")
    sizes = dict(model_type="llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2, tie_word_embeddings=True)
    (path / "config.json").write_text(json.dumps(COMMON | sizes))
    return path


DUMMY = dict(load_format="dummy", device="cpu", threads=1, max_model_len=64)


@pytest.mark.parametrize(("scheme", "scales"), [("fp8", 4), ("ptpc_fp8", 4), ("fp8_block", None)])
def test_fp8_linears_take_half_of_bf16(shape, scheme, scales):
    core = EngineCore(EngineConfig(model=str(shape), quantization=scheme, **DUMMY))
    groups = core.runner.report.groups
    stored = sum(groups[role, scheme].stored for role in ("attention", "mlp"))
    values = 2 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 512)
    assert sum(groups[role, scheme].values for role in ("attention", "mlp")) == values
    rows = 2 * (256 + 2 * 128 + 256 + 512 + 512 + 256)
    assert stored == values + (rows * scales if scales else values // 128**2 * 4)  # a code a value, and the FP32 scales
    (line,) = (line for line in core.info.report if line.startswith("FP8 linears"))
    assert 50 <= float(re.search(r"([\d.]+)% of BF16", line)[1]) <= 51
    widened = core.runner.platform.widened_dtype is not None  # where the C kernels are, codes stay codes
    assert any("FP8 codes are kept as exact" in line for line in core.info.report) == widened


def test_bf16_makes_no_claim_of_fp8(shape):
    assert "FP8" not in "\n".join(LLM(shape, **DUMMY).info.report)


@cases(
    ("kv", "nbytes", "percent"),
    [("auto", 1024, 100), ("bf16", 1024, 100), ("fp8", 512, 50), ("fp8_e5m2", 512, 50), ("fp8_per_token_head", 544, 53.1)],
)
def test_kv_cache_bytes(shape, kv, nbytes, percent):
    """2 layers of keys and values, 2 heads of 64; a per-token-head scale adds 4 bytes to a head's 64."""
    llm = LLM(shape, kv_cache_dtype=kv, cpu_kv_cache_gib=0.01, max_num_seqs=4, **DUMMY)
    (line,) = (line for line in llm.info.report if line.startswith("KV cache"))
    assert f" {nbytes} bytes a token ({percent:.1f}% of BF16's), 256 tokens" in line
    assert llm._core.runner.cache.nbytes == 256 * nbytes
    assert (llm.info.num_blocks, llm.info.block_size) == (16, 16)


@cases(
    ("device", "options", "named"),
    [
        (cpu(), dict(gpu_memory_utilization=0.8), "--gpu-memory-utilization"),
        (cuda(), dict(gpu_memory_utilization=0.8), None),
        (cuda(), dict(cpu_kv_cache_gib=2), "--cpu-kv-cache-gib"),
        (cpu(), dict(cpu_kv_cache_gib=2), None),
        (cpu(), dict(quantization_ignore=("o_proj",)), "--quantization-ignore"),
        (cpu(), dict(quantization_ignore=("o_proj",), quantization="fp8"), None),
        (cpu(), dict(quantization_ignore=("lm_head",), quantize_lm_head=True), None),
        (cpu(), dict(enable_expert_parallel=True), "--enable-expert-parallel"),
        (cpu(), dict(mm_encoder_tp_mode="data"), None),  # which the ranks say
        (cpu(), {}, None),
    ],
)
def test_a_flag_that_changes_nothing_here_is_named(device, options, named):
    found = without_effect(EngineConfig(model="x", **options), device, TensorParallel(), False)
    assert [note.split(" ")[0] for note in found] == ([named] if named else [])
    assert all(" is without effect: " in note for note in found)


def test_a_note_reaches_the_report(shape):
    config = dict(max_position_embeddings=100_000)
    long = shape.parent / "long"
    long.mkdir()
    (long / "config.json").write_text(json.dumps(json.loads((shape / "config.json").read_text()) | config))
    llm = LLM(long, **DUMMY | dict(max_model_len=None, cpu_kv_cache_gib=4096 * 1024 / GIB))
    assert llm.info.max_model_len == 4096
    assert any("note: max_model_len lowered from 100000 to 4096" in line for line in llm.info.report)


def test_no_table_is_made_for_positions_that_no_cache_holds(shape, tmp_path):
    """10**9 positions of a head of 64 take 256 GB of cosines and sines, and the cache here holds 4096 tokens."""
    config = json.loads((shape / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=10**9)))
    small = DUMMY | dict(cpu_kv_cache_gib=4096 * 1024 / GIB)
    llm = LLM(tmp_path, **small | dict(max_model_len=None))
    assert llm.info.max_model_len == 4096
    assert any("note: max_model_len lowered from 1000000000 to 4096" in line for line in llm.info.report)
    assert llm._core.runner.model.model.layers[0].self_attn.rotary_emb.cos_sin.shape[0] == 4096
    with pytest.raises(OctavoError, match=r"one request of 1000000000 tokens needs .* lower max_model_len to 4096"):
        LLM(tmp_path, **small | dict(max_model_len=10**9))
    assert LLM(tmp_path, **small | dict(max_model_len=100)).info.max_model_len == 100


def test_the_length_of_a_model_is_what_its_cache_could_hold():
    held = partial(length_held, EngineConfig(), bytes_per_token=GIB // 8192)
    assert held(cuda(free=80), wanted=10**9) == int(80 * 0.9 * 128) * 64
    assert held(cuda(free=40), wanted=10**9) == ((40 - 8) * 128) * 64  # of a device that others use too
    assert held(cuda(free=80), wanted=5000) == 5000
    assert held(cuda(free=1), wanted=5000) == 1  # plan_blocks says it, with what the weights take
    with pytest.raises(OctavoError, match="lower --max-model-len to 589824"):
        length_held(EngineConfig(max_model_len=10**9), cuda(free=80), GIB // 8192, 10**9)


def test_a_cache_is_for_no_more_than_the_model():
    """Memory may have been given back while the weights were read."""
    budget = plan_blocks(EngineConfig(), cuda(free=80), GIB // 8192, 10**6, 0, 0, 4096)
    assert (budget.max_model_len, budget.notes[0].split(":")[0]) == (4096, "max_model_len lowered from 1000000 to 4096")


def test_weights_that_cannot_fit_are_refused_before_they_are_read():
    check_weights(cuda(free=20), 19 << 30, fp8=True)
    check_weights(cuda(free=20), 9 << 30, 10 << 30, fp8=True)  # packed INT4 takes its bytes, whatever the rest is
    with pytest.raises(OctavoError, match=r"the weights alone would take 21\.00 GiB"):
        check_weights(cuda(free=20), 9 << 30, 12 << 30, fp8=True)
    with pytest.raises(OctavoError, match=r"would take 19\.00 GiB.*1 byte.*18\.00 GiB is free.*--tensor-parallel-size"):
        check_weights(cuda(free=18), 19 << 30, fp8=True)
    with pytest.raises(OctavoError, match=r"38\.00 GiB.*use --quantization ptpc_fp8"):
        check_weights(cuda(free=20), 19 << 30, fp8=False)


def test_a_stage_of_a_pipeline_needs_room_for_its_part():
    """A checkpoint that no single device holds, and two do."""
    source = SafetensorsSource(MODEL_DIR)
    stage = TensorParallel(everyone=TensorParallel(0, 2), stages=Stages(0, 2))
    device = cuda(free=2 * 0.6 * source.checkpoint.matrix_values() / GIB)
    whole = SimpleNamespace(ignored=(), other_stages=())
    _check_room(whole, source, device, BF16, stage)
    with pytest.raises(OctavoError, match="the weights alone would take"):
        _check_room(whole, source, device, BF16, TensorParallel())
    source.close()


def test_what_no_layer_reads_needs_no_room():
    """Layers that predict further tokens, or a tower with --language-model-only; not what other stages read."""
    source = SafetensorsSource(MODEL_DIR)
    unread = {name for name in source.names if ".layers.0." in name}
    device = cuda(free=2.002 * source.checkpoint.matrix_values(unread) / GIB)
    _check_room(SimpleNamespace(ignored=("*.layers.0.*",), other_stages=()), source, device, BF16, TensorParallel())
    elsewhere = SimpleNamespace(ignored=("*.layers.0.*",), other_stages=("*.layers.0.*",))
    with pytest.raises(OctavoError, match="the weights alone would take"):
        _check_room(elsewhere, source, device, BF16, TensorParallel())
    source.close()


FREED = """
import ctypes
from octavo.host import release

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

kept, freed = [], []
for _ in range(1000):
    freed.append(ctypes.create_string_buffer(b"x" * 100_000))
    kept.append(ctypes.create_string_buffer(b"x" * 100))
full = resident()
freed.clear()
release()
print(full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc: another C library keeps no memory")
def test_freed_memory_goes_back_to_the_system():
    """Also where things that are kept lie between: 95 MiB of buffers under the size that has pages of its own."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 85
