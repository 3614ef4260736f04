"""An engine that nobody holds any more is gone at once: its weights, its cache and its graphs, without Python's collector."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.errors import OctavoError
from octavo.ops.bound import bound_for

DROPPED = """
import gc
gc.disable()
import sys, weakref
from octavo import LLM, SamplingParams
from octavo.messages import StructuredOutput

def owner(device, options):
    llm = LLM(device=device, max_model_len=1024, cpu_kv_cache_gib=0.05, **options)
    params = [SamplingParams(max_tokens=4), SamplingParams(max_tokens=9, temperature=0, presence_penalty=1, logprobs=2)]
    llm.generate(["Once upon a time", "def f"], params, use_tqdm=False)
    llm.generate("Once", SamplingParams(max_tokens=4, structured=StructuredOutput("regex", "[a-z]+")), use_tqdm=False)
    if options.get("enforce_eager"):
        llm._core.sleep()
        llm._core.wake()
    runner = llm._core.runner
    assert (runner.graphs is None) == bool(options.get("enforce_eager"))
    held = [llm, llm._core, runner, runner.model, runner.cache, runner.graphs, runner.prompts]
    return [weakref.ref(one) for one in held if one is not None]

device, first = sys.argv[1], None
for options in eval(sys.argv[2]) * 2:
    left = [type(ref()).__name__ for ref in owner(device, options) if ref() is not None]
    assert left == [], (options, left)
    if device == "cuda":
        import torch
        if first is None:
            first = torch.cuda.memory_allocated()  # tables that kernels share
        assert torch.cuda.memory_allocated() <= first, (torch.cuda.memory_allocated(), first)
        assert torch.cuda.max_memory_reserved() > 400 << 20 > 3 * torch.cuda.memory_reserved(), torch.cuda.memory_reserved()
"""
OPTIONS = [
    {"enforce_eager": True},
    {"quantization": "ptpc_fp8", "kv_cache_dtype": "fp8"},
    {"quantization": "fp8_block", "kv_cache_dtype": "fp8_per_token_head", "calculate_kv_scales": False},
    {"quantization": "fp8", "quantize_lm_head": True},
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_dropped_engine_is_gone(device: str) -> None:
    """In a process of its own: importing torch leaves a frame that holds whoever imported it, and here that is the LLM. A GPU's
    memory is that of one engine, so there each has a process."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an accelerator (torch sees none)")
    for together in [OPTIONS] if device == "cpu" else [[one] for one in OPTIONS]:
        ran = subprocess.run([sys.executable, "-c", DROPPED, device, repr(together)], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]


def test_another_device_s_model_in_the_same_process_is_said() -> None:
    """Kernels are a process's: those of the later model would be given the earlier one's addresses."""
    llm = LLM(device="cpu", load_format="dummy", cpu_kv_cache_gib=0.01, threads=1)
    bound_for(torch.device("meta"))
    with pytest.raises(OctavoError, match="another model was started on meta in this process after this one on cpu"):
        llm.generate("x", SamplingParams(max_tokens=1), use_tqdm=False)
