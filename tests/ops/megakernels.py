"""What the tests of kernels in CUDA C++ share: small models and layers, and the machine code of what was compiled."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.kvcache import KVCache, Layout, spec_for
from octavo.ops.contract import DecoderParts, DenseParts, LayerParts
from octavo.ops.gpu import PackedScaledMM
from octavo.platform import Platform
from octavo.quant import FP8_PER_CHANNEL, quantize
from tests.ops.caches import layer_cache

__all__ = ["MODELS", "dumped", "hopper", "parts", "write"]

CPU = torch.device("cpu")
COMMON = dict(vocab_size=512, num_hidden_layers=1, max_position_embeddings=8192, rms_norm_eps=1e-5, torch_dtype="bfloat16")
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", hidden_size=1024, intermediate_size=2752, heads=8, kv_heads=2, head_dim=128),
    "small heads": dict(model_type="llama", hidden_size=256, intermediate_size=704, heads=8, kv_heads=8, head_dim=32),
    "window": dict(
        model_type="mistral", hidden_size=512, intermediate_size=1408, heads=8, kv_heads=4, head_dim=64, sliding_window=100
    ),
    "qkv bias": dict(model_type="qwen2", hidden_size=512, intermediate_size=1472, heads=8, kv_heads=4, head_dim=64),
    "head norms": dict(model_type="qwen3", hidden_size=512, intermediate_size=1088, heads=16, kv_heads=4, head_dim=128),
    "large heads": dict(model_type="llama", hidden_size=512, intermediate_size=1408, heads=8, kv_heads=1, head_dim=256),
}


def write(directory: Path, shape: dict[str, Any]) -> Path:
    given = {name: value for name, value in shape.items() if name not in ("heads", "kv_heads")}
    given |= {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"]}
    (directory / "config.json").write_text(json.dumps(COMMON | given))
    return directory


def dumped(cubin: bytes, directory: Path) -> tuple[list[str], str]:
    """Bytes of local memory that each function needs, and the machine code."""
    import triton

    file, tool = directory / "dumped.cubin", Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file.write_bytes(cubin)
    found = [
        subprocess.run([tool, what, file], capture_output=True, text=True, check=True).stdout
        for what in ("--dump-resource-usage", "--dump-sass")
    ]
    return re.findall(r"STACK:(\d+)", found[0]), found[1]


def hopper(arch: str = "sm_90") -> Platform:
    """As large as an H100."""
    return Platform(CPU, arch, multiprocessors=132, shared_memory=227 << 10)


def parts(**changes: Any) -> DenseParts:
    """Two layers of 8 heads of 64 dimensions, in FP8 with a BF16 cache."""

    def weight(n: int, k: int) -> PackedScaledMM:
        return PackedScaledMM(quantize(torch.randn(n, k), FP8_PER_CHANNEL))

    made = {"hidden": 512, "inter": 1408, "bias": None, "window": None, "dtype": torch.bfloat16, "kv": "auto", "v_scale": 1.0}
    made |= changes
    kinds = made["kv"], made.get("second_kv", made["kv"])
    specs = [spec_for(kind, 4, 64, torch.bfloat16, torch.float8_e4m3fn, Layout.TENSOR_CORE) for kind in kinds]
    views = KVCache(specs, 2, 64, CPU).views
    gain = torch.ones(512, dtype=made["dtype"])
    layers = [
        LayerParts(weight(1024, 512), weight(512, 512), weight(2 * made["inter"], 512), weight(512, made["inter"]),
                   gain, gain, None, None, layer_cache(view, 1.0, made["v_scale"]), window)
        for window, view in zip((None, made["window"]), views, strict=True)
    ]  # fmt: skip
    return DecoderParts(layers, torch.zeros(64, 64), made["hidden"], made["inter"], 8, 4, 64, 0.125, 1e-5)
