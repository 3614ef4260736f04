"""`octavo compare` has one model in memory at a time: more variants take no more of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMMON
from transformers import LlamaConfig, LlamaForCausalLM

COMPARED = """
import gc
gc.disable()  # Python's collector comes by when it likes, and a machine with little memory cannot wait for it
import resource, sys
from octavo.config import EngineConfig
from octavo.tools.compare.compare import compare
config = EngineConfig(model=sys.argv[1], device="cpu", threads=1, cpu_kv_cache_gib=0.01, max_model_len=80)
compare(config, list(range(200)), sys.argv[2].split(","), sys.argv[3].split(","), window=32, tokens=64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 MB of BF16: more than what a process's memory varies by."""
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    path = tmp_path_factory.mktemp("large")
    LlamaForCausalLM(LlamaConfig(**(COMMON | sizes))).to(torch.bfloat16).save_pretrained(path)
    return path


def test_more_variants_take_no_more_memory(large: Path) -> None:
    peaks = []
    for schemes, kvs in (("fp8", "auto"), ("fp8,ptpc_fp8", "fp8_e4m3,auto")):
        ran = subprocess.run([sys.executable, "-c", COMPARED, str(large), schemes, kvs], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        peaks.append(int(ran.stdout) * 1024)
    model = (large / "model.safetensors").stat().st_size
    print(f"one scheme {peaks[0] / 1e6:.0f} MB, four variants {peaks[1] / 1e6:.0f} MB, the model {model / 1e6:.0f} MB")
    assert model > 60e6
    assert peaks[1] < peaks[0] + model / 2
