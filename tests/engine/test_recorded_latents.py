"""Decode steps of MLA models on a CPU: recordings of them give what the model gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tokens
from models.test_logits import deepseek_v3, deepseek_v32, randomize

import octavo
from octavo import LLM, SamplingParams
from octavo.ops.cpu import library

needs_kernels = pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")


@needs_kernels
@pytest.mark.parametrize(
    ("sparse", "dtype", "kv", "held"),
    [(True, "bfloat16", "auto", 1), (True, "float32", "auto", 4), (False, "float32", "fp8", 1), (False, "bfloat16", "auto", 2)],
    ids=["V3.2, fp8_ds_mla", "V3.2, FP32", "V3, fp8_ds_mla", "V3, BF16"],
)
def test_recorded_steps_give_what_the_model_gives(sparse: bool, dtype: str, kv: str, held: int, tmp_path: Path) -> None:
    """Bit for bit, with contexts shorter than what is chosen, of which a recording chooses all, longer ones, and in parts."""
    torch.manual_seed(0)
    randomize(deepseek_v32(index_topk=24) if sparse else deepseek_v3()).save_pretrained(tmp_path)
    prompts = [tokens(n, n) for n in (3, 20, 60, 300)]
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=2, ignore_eos=True)
    options = dict(dtype=dtype, kv_cache_dtype=kv, device="cpu", block_size=4, cpu_kv_cache_gib=0.05)
    found = []
    for eager in (False, True):
        llm = LLM(str(tmp_path), enforce_eager=eager, **options)
        core = llm._core
        assert (core.runner.graphs is None) == eager
        assert {views["latent"].dtype.itemsize for views in core.runner.cache.views if "latent" in views} == {held}
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        found.append([(one.token_ids, one.logprobs) for one in outputs])
        assert eager or len(core.runner.graphs) >= 1
    assert found[0] == found[1]
    assert len({tuple(ids) for ids, _ in found[0]}) == len(prompts)


# What a process without the C kernels chooses: torch attends, and nothing is recorded.
WITHOUT = """
import sys
import octavo.engine, octavo.platform as platform
platform.cpu_kernels = lambda: "no C compiler was found"
from octavo import LLM, SamplingParams, ops
params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
for model in sys.argv[2:]:
    llm = LLM(model, dtype="float32", device="cpu", block_size=4, cpu_kv_cache_gib=0.05)
    assert llm._core.runner.graphs is None
    assert ops.table()["latent_attention"] == ops.table()["select_keys"] == "reference_latent"
    print([out.outputs[0].token_ids for out in llm.generate(eval(sys.argv[1]), params, use_tqdm=False)])
"""


@needs_kernels
def test_a_machine_without_a_compiler_chooses_the_same_tokens(tmp_path: Path) -> None:
    """A prompt of it is long enough for keys and values to be made of latents where all is attended to: V3, then V3.2."""
    prompts = [tokens(n, n) for n in (5, 60)]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    models, expected = [str(tmp_path / name) for name in ("v3", "v32")], []
    for path, make in zip(models, (deepseek_v3, deepseek_v32), strict=True):
        torch.manual_seed(0)
        randomize(make()).save_pretrained(path)
        llm = LLM(path, dtype="float32", device="cpu", block_size=4, cpu_kv_cache_gib=0.05)
        expected.append(str([out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, repr(prompts), *models],
        capture_output=True, text=True, cwd=Path(octavo.__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]
