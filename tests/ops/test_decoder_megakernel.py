"""A decode step as one launch, beside the same step op by op; and that it compiles where there is no GPU.

The ops are tested against references elsewhere. CUDA C++ cannot be interpreted: on a CPU this file only compiles.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.batch import ForwardBatch, Span
from octavo.config import EngineConfig
from octavo.kvcache import KVCache, Layout, spec_for
from octavo.platform import Platform
from octavo.quant import FP8_PER_CHANNEL, quantize

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.ops.contract import DecoderParts, LayerParts
from octavo.ops.gpu import PackedScaledMM
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper import decoder_megakernel, megakernel_layers
from tests.ops.caches import layer_cache

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
LLAMA_8B = dict(
    HIDDEN=4096, INTER=14336, HEADS=32, KV_HEADS=8, DIM=128, BLOCK_SIZE=64, KV_FP8=1, PER_TOKEN_HEAD=0, WINDOW=0, HEAD_NORMS=0,
    QKV_BIAS=0, CTAS=132, LONGEST=4096, SHARED=227 << 10, TWO_CODES=0,
)  # fmt: skip
SMALL = dict(HIDDEN=256, INTER=704, HEADS=8, KV_HEADS=4, DIM=32, KV_FP8=0, WINDOW=100, HEAD_NORMS=1, QKV_BIAS=1, CTAS=114)


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


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize(
    "options",
    [LLAMA_8B, LLAMA_8B | SMALL, LLAMA_8B | {"PER_TOKEN_HEAD": 1}, LLAMA_8B | {"TWO_CODES": 1}],
    ids=["8b", "small", "per token and head", "two codes a value"],
)
def test_it_compiles(options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: matrix instructions, bulk copies, and registers for what it keeps."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    cubin = compiler.compile_cubin("decoder_megakernel.cu", "sm_90", options | {"TOKENS": 1})
    assert [path.read_bytes() for path in (tmp_path / "kept").iterdir()] == [cubin]
    stacks, code = dumped(cubin, tmp_path)
    assert stacks == ["0"]
    # sm_90 multiplies a warp's FP8 codes as halves, which hold them exactly.
    assert len(re.findall(r"HMMA\.16816\.F32", code)) >= 8
    assert "F2FP.F16.E4M3.UNPACK_B" in code
    assert "UBLKCP" in code


def test_a_refused_source_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler.missing() is not None:
        pytest.skip(f"needs NVRTC: {compiler.missing()}")
    with pytest.raises(compiler.NoKernel, match=r"kernel\.cu"):
        compiler.compile_cubin("decoder_megakernel.cu", "sm_90", {"TOKENS": 1})


def hopper(arch: str = "sm_90") -> Platform:
    """As large as an H100."""
    return Platform(CPU, arch, multiprocessors=132, shared_memory=227 << 10)


def parts(**changes: Any) -> DecoderParts:
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


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("sm_90", {}, None),
        ("sm_100", {"kv": "fp8_e4m3"}, None),
        ("sm_89", {}, "bulk copies"),
        ("gfx942", {}, "bulk copies"),
        ("sm_90", {"inter": 1400}, "multiple of 64"),
        ("sm_90", {"window": 100}, "different windows"),
        ("sm_90", {"kv": "fp8_e4m3", "second_kv": "auto"}, "caches of different dtypes"),
        ("sm_90", {"dtype": torch.float32}, "float32"),
        ("sm_90", {"kv": "fp8_e5m2"}, "the cache"),
        ("sm_90", {"kv": "fp8_per_token_head"}, None),
        ("sm_90", {"kv": "fp8_e4m3", "second_kv": "fp8_per_token_head"}, "caches of different dtypes"),
        ("sm_90", {"kv": "fp8_e4m3", "v_scale": [1.0] * 4}, "scales a head are Triton's"),
    ],
)
def test_what_it_is_not_for(arch: str, changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megakernel_layers, "missing", lambda: None)
    found = decoder_megakernel.refusal(parts(**changes), hopper(arch))
    assert found is None if reason is None else reason in (found or "")


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megakernel_layers, "missing", lambda: "there is no libnvrtc.so.13")
    assert decoder_megakernel.refusal(parts(), hopper()) == "there is no libnvrtc.so.13"


def test_where_the_driver_refuses_it_the_ops_remain(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from octavo.ops import cuda

    def refuse(*_: object) -> None:
        raise compiler.NoKernel("cuModuleLoadData failed with CUDA error 218\nmore")

    for module, name in ((cuda.decoder_megakernel, "DecoderMegakernel"), (cuda.layer_megakernel, "LayerMegakernels")):
        monkeypatch.setattr(module, "refusal", lambda *_: None)
        monkeypatch.setattr(module, name, refuse)
    assert set(cuda.fuse(parts(), hopper()).values()) == {"cuModuleLoadData failed with CUDA error 218"}
    assert "go op by op" in caplog.text


def sent(t: torch.Tensor, tokens: int) -> torch.Tensor:
    """The values of what programs sent to each other, without the numbers beside them."""
    return t[:tokens].view(torch.int32)[:, ::2].contiguous().view(torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("kv", ["fp8", "fp8_per_token_head", "auto"])
@pytest.mark.parametrize("scheme", ["ptpc_fp8", "fp8", "fp8_w8a16"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_step_op_by_op(name: str, scheme: str, kv: str, tmp_path: Path) -> None:
    """Each phase of a layer beside the ops, on what the launch itself computed before it; contexts from 1 to thousands.

    The whole step cannot be compared as closely: a last bit that falls the other way becomes another FP8 code.
    """
    from octavo import ops
    from octavo.engine.runner import ModelRunner

    config = EngineConfig(
        model=str(write(tmp_path, MODELS[name])), load_format="dummy", quantization=scheme, kv_cache_dtype=kv, device="cuda",
        enforce_eager=True, max_model_len=8192, gpu_memory_utilization=0.9, max_num_seqs=8,
    )  # fmt: skip
    runner = ModelRunner(config)
    fused: Any = next(one for one in runner.model.model.fused if one.attends)
    generator, block = torch.Generator().manual_seed(1), runner.block_size
    cases = [[1], [70], [333], [4095]]
    for lengths in cases:
        spans, free = [], torch.randperm(400, generator=generator).tolist()
        for length in lengths:
            blocks = [free.pop() for _ in range(-(-length // block))]
            ids = torch.randint(512, (length,), generator=generator).tolist()
            if length > 1:
                runner.forward(runner._batch([Span(ids[:-1], 0, blocks)]))
            spans.append(Span(ids[-1:], length - 1, blocks))
        batch, tokens = runner._batch(spans), len(lengths)
        assert fused.takes(tokens, max(lengths))
        fused.act.fill_(torch.nan)
        for t in fused.sent:
            t.view(torch.int32)[:, ::2] = -1  # NaN
        before = [buffer.clone() for buffer in runner.cache.buffers]
        with torch.inference_mode():
            whole = runner.forward(batch)
            cache = runner.cache.buffers[-1].clone()
            runner.cache.buffers[-1].copy_(before[-1])
            qkv, attended, between, after = (sent(t, tokens) for t in fused.sent)
            act, layer = fused.act[:tokens], runner.model.model.layers[-1]
            a, mlp, x = layer.self_attn, layer.mlp, runner.model.model.embed_tokens(batch.input_ids)
            want = {
                "qkv": torch.cat(
                    [part.flatten(1) for part in a.qkv_proj(layer.input_layernorm(x, None, a.qkv_proj.weight)[0])], 1
                )
            }
            q, k, v = qkv.unflatten(1, (-1, a.attn.head_dim)).split(a.qkv_proj.parts, dim=1)
            want["attended"] = a.attn.attend(q, k, v, batch)
            want["between"] = ops.linear(attended, a.o_proj.weight) + x
            normed = layer.post_attention_layernorm(between, None, mlp.gate_up_proj.weight)[0]
            want["act"] = ops.silu_mul(ops.linear(normed, mlp.gate_up_proj.weight)).values()
            want["after"] = ops.linear(act, mlp.down_proj.weight) + between
            want["whole"] = runner.model.model.norm(after)[0].values()
        got = {"qkv": qkv, "attended": attended, "between": between, "act": act, "after": after, "whole": whole}
        errors = {n: float((got[n].double() - w.double()).norm() / w.double().norm()) for n, w in want.items()}
        changed = float((cache != runner.cache.buffers[-1]).double().mean())
        print(f"{name} {scheme} {kv} {lengths}:", {n: f"{e:.4f}" for n, e in errors.items()}, f"cache {changed:.1e}")
        assert all(e < 0.01 for e in errors.values()), errors
        assert changed < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
def test_steps_of_many_layers_repeat_themselves(tmp_path: Path) -> None:
    """The same bits each time, launch after launch; and about what the ops give."""
    from octavo.engine.runner import ModelRunner

    config = EngineConfig(
        model=str(write(tmp_path, MODELS["llama"] | {"num_hidden_layers": 5})), load_format="dummy", quantization="ptpc_fp8",
        kv_cache_dtype="fp8", device="cuda", enforce_eager=True, max_model_len=8192, gpu_memory_utilization=0.9, max_num_seqs=8,
    )  # fmt: skip
    runner = ModelRunner(config)
    assert runner.model.model.fused_for(1, 700).attends
    ids = torch.randint(512, (700,)).tolist()
    runner.forward(runner._batch([Span(ids[:-1], 0, range(20))]))
    batch = runner._batch([Span(ids[-1:], 699, range(20))])
    first = runner.forward(batch)
    assert all(torch.equal(runner.forward(batch), first) for _ in range(50))
    runner.model.model.fused = ()
    want = runner.forward(batch)
    assert float((first - want).float().norm() / want.float().norm()) < 0.15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("kv", ["fp8", "fp8_per_token_head", "auto"])
def test_rotary_rows_scales_and_lengths_are_read_at_the_launch(kv: str, tmp_path: Path) -> None:
    """A row that is not the token's place and scales that changed in place, beside op by op; a token without a context."""
    from octavo.engine.runner import ModelRunner

    config = EngineConfig(
        model=str(write(tmp_path, MODELS["llama"])), load_format="dummy", quantization="ptpc_fp8", kv_cache_dtype=kv,
        device="cuda", enforce_eager=True, max_model_len=8192, gpu_memory_utilization=0.9, max_num_seqs=8,
    )  # fmt: skip
    runner = ModelRunner(config)
    fused: Any = next(one for one in runner.model.model.fused if one.attends)
    ids, attn = torch.randint(512, (300,)).tolist(), runner.model.attention_layers()[0]
    runner.model.model.fused = []
    keys = []

    def written(batch: ForwardBatch) -> dict[str, torch.Tensor]:
        """The new token's key and value as the cache has them."""
        slot, block, views = int(batch.slot_mapping[0]), runner.block_size, attn.cache.views
        made = {name: view[slot // block, slot % block].float() for name, view in views.items()}
        if kv != "fp8_per_token_head":
            return made
        return {name: made[name] * made[f"{name}_scale"].unsqueeze(-1) for name in "kv"}

    for delta, k_scale, v_scale in ((0, 1.0, 1.0), (37, 0.031, 0.017), (-100, 0.013, 0.029)):
        with torch.inference_mode():
            attn.k_scale.fill_(k_scale), attn.v_scale.fill_(v_scale)
            runner.forward(runner._batch([Span(ids[:-1], 0, range(20))]))
            batch = runner._batch([Span(ids[-1:], 299, range(20), delta)])
            x = runner.model.model.embed_tokens(batch.input_ids)
            assert fused(x, batch).isfinite().all()
            got = written(batch)
            q, k, v = sent(fused.sent[0], 1).unflatten(1, (-1, attn.head_dim)).split([8, 2, 2], dim=1)
            attended = sent(fused.sent[1], 1)
            want = attn.attend(q, k, v, batch)
        assert float((attended - want).float().norm() / want.float().norm()) < 0.01
        for name, value in written(batch).items():
            assert float((got[name] - value).norm() / value.norm()) < 0.02
        keys.append(got["k"] * (k_scale if kv == "fp8" else 1))
    assert all(float((one - other).norm() / other.norm()) > 0.1 for one, other in itertools.pairwise(keys))
    before = [buffer.clone() for buffer in runner.cache.buffers]
    with torch.inference_mode():
        batch.seq_lens.zero_()
        for _ in range(2):
            assert fused(x, batch).isfinite().all()
            assert not sent(fused.sent[1], 1).any()
    assert all(torch.equal(one, other) for one, other in zip(before, runner.cache.buffers, strict=True))
