"""What `octavo plan` promises for a dummy Llama-3.1-8B against what an accelerator really holds."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from tools.planner import answer

from octavo.config import EngineConfig
from octavo.engine.runner import ModelRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)"),
]

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(("variant", "scheme", "kv"), [("PTPC + FP8 KV", "ptpc_fp8", "fp8"), ("BF16", "bf16", "auto")])
def test_an_accelerator_holds_what_was_planned(variant: str, scheme: str, kv: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    name = torch.cuda.get_device_name()
    accelerator = next((word for word in ("h100", "h200", "b200") if word in name.lower()), None)
    if accelerator is None:
        pytest.skip(f"needs an accelerator that `octavo plan` knows, which {name} is not")
    planned = answer(str(tmp_path), "--accelerator", accelerator, "-q", scheme, "--kv-cache-dtype", kv)["variants"][variant][
        "fit"
    ]
    given = dict(quantization=scheme, kv_cache_dtype=kv, load_format="dummy", enforce_eager=True)  # graphs are beside the plan
    runner = ModelRunner(EngineConfig(model=str(tmp_path), **given))  # type: ignore[arg-type]
    allocated, cache = torch.cuda.memory_allocated(), runner.cache.nbytes
    tokens = runner.cache.num_blocks * runner.block_size
    print(f"{variant}: weights {(allocated - cache) / 1e9:.3f} GB, planned {planned['weights'] / 1e9:.3f}")
    print(f"cache {cache / 1e9:.3f} GB, planned {planned['cache'] / 1e9:.3f}; tokens {tokens}, planned {planned['tokens']}")
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    assert allocated - cache == pytest.approx(planned["weights"], rel=0.02)
    assert cache == pytest.approx(planned["cache"], rel=0.02)
    assert tokens == pytest.approx(planned["tokens"], rel=0.02)
