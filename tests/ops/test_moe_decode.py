"""What lies between the attention of two layers with experts as one launch, each phase against a reference; and that it
compiles where there is no GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import over, pairwise
from torch import Tensor

from octavo import ops
from octavo.config import EngineConfig
from octavo.distributed import TensorParallel
from octavo.models import qwen3_moe

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.ops import reference
from octavo.ops.contract import DecoderParts, ExpertLayerParts, MixtureParts, Router
from octavo.ops.gpu import PackedBlocks, PackedDense, PackedGrouped, PackedScaledMM
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper import moe_decode
from octavo.ops.hopper.moe_decode import MoeMegakernels
from octavo.platform import detect
from octavo.quant import SCHEMES, Scheme, quantize
from octavo.quant.qtensor import Stacker
from octavo.quant.scheme import Granularity
from tests.ops.caches import layer_cache
from tests.ops.megakernels import dumped, hopper, write
from tests.ops.paged import cache_of
from tests.ops.test_layer_megakernel import check_whole_steps

QWEN3_30B = dict(HIDDEN=2048, INTER=768, WIDE=4096, QKV=5120, EXPERTS=128, TOP_K=8, NORMALIZE=1, CTAS=132, SHARED=227 << 10)
SMALL = dict(HIDDEN=640, INTER=256, WIDE=512, QKV=768, EXPERTS=9, TOP_K=3, NORMALIZE=0, CTAS=114)
MODELS: dict[str, dict[str, Any]] = {
    "small": dict(hidden_size=512, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=4, heads=8, kv_heads=2),
    "odd": dict(hidden_size=640, moe_intermediate_size=1152, num_experts=9, num_experts_per_tok=3, heads=5, kv_heads=1,
                norm_topk_prob=False),
    "more rows than multiprocessors": dict(hidden_size=2304, moe_intermediate_size=128, num_experts=40, num_experts_per_tok=8,
                                           heads=32, kv_heads=4),
}  # fmt: skip
TOP_3 = Router(3)
COMMON = dict(model_type="qwen3_moe", intermediate_size=512, head_dim=128, norm_topk_prob=True)
WHOLE = COMMON | dict(hidden_size=64, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, vocab_size=64, max_position_embeddings=64)  # fmt: skip


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize(("tokens", "blocks", "options"), pairwise(moe_decode.COLUMNS, [0, 1], [QWEN3_30B, QWEN3_30B | SMALL]))
def test_it_compiles(
    tokens: int, blocks: int, options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For sm_90: FP8 matrix instructions of a group of warps, the copy engine's boxes, nothing kept in local memory."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    options = options | {"TOKENS": tokens, "BLOCKS": blocks}
    stacks, code = dumped(compiler.compile_cubin("moe_decode.cu", "sm_90a", options), tmp_path)
    assert stacks == ["0"]
    assert len(re.findall(r"QGMMA\.64x32x32\.F32\.E4M3\.E4M3", code)) >= 24
    assert all(f"UTMALDG.{rank}D" in code for rank in (3, 4, 5))


def parts(
    scheme: Scheme = SCHEMES["ptpc_fp8"], dtype: torch.dtype = torch.bfloat16, router: Router = TOP_3, *,
    hidden: int = 256, inter: int = 128, experts: int = 4, other: Scheme | None = None, correction: bool = False,
    ranks: int = 1,
) -> MixtureParts:  # fmt: skip
    def dense(n: int, k: int, of: Scheme) -> Any:
        packed = {None: PackedDense, Granularity.BLOCK: PackedBlocks}.get(of.activation, PackedScaledMM)
        return packed(quantize(torch.randn(n, k), of).padded(16))

    def stack(n: int, k: int) -> PackedGrouped:
        made = Stacker(experts)
        for e in range(experts):
            made.put(e, quantize(torch.randn(n, k), scheme).padded(16))
        return PackedGrouped(made.finished())

    gain = torch.ones(hidden, dtype=dtype)
    layer = ExpertLayerParts(
        dense(512, hidden, scheme), dense(hidden, 256, other or scheme), stack(2 * inter, hidden), stack(hidden, inter), gain,
        gain, None, None, layer_cache(cache_of(1, 1).views, 1.0, 1.0), None, torch.randn(experts, hidden).to(dtype),
        torch.zeros(experts) if correction else None, router,
    )  # fmt: skip
    return DecoderParts([layer, layer], torch.zeros(8, 128), hidden, inter, 2, 1, 128, 128**-0.5, 1e-6, ranks)


@over(
    "arch, changes, reason",
    [
        ("sm_90", {}, None),
        ("sm_90", {"scheme": SCHEMES["fp8"]}, None),
        ("sm_90", {"scheme": SCHEMES["fp8_block"]}, None),
        ("sm_100", {}, "sm_90"),
        ("sm_90", {"router": Router(3, sigmoid=True)}, "softmax"),
        ("sm_90", {"router": Router(2, groups=2, top_groups=1)}, "softmax"),
        ("sm_90", {"correction": True}, "softmax"),
        ("sm_90", {"dtype": torch.float32}, "float32"),
        ("sm_90", {"inter": 192}, "multiple of 128"),
        ("sm_90", {"other": SCHEMES["fp8_block"]}, "both kinds"),
        ("sm_90", {"scheme": SCHEMES["bf16"], "other": SCHEMES["fp8"]}, "FP8"),
        ("sm_90", {"inter": 32768, "hidden": 128, "experts": 1, "router": Router(1)}, "shared memory"),
        ("sm_90", {"experts": 140, "hidden": 128}, "more experts"),
        ("sm_90", {"ranks": 2}, "several ranks"),
    ],
)
def test_what_it_is_not_for(arch: str, changes: dict[str, Any], reason: str | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "missing", lambda: None)
        found = moe_decode.refusal(parts(**changes), hopper(arch))
    assert found is None if reason is None else reason in (found or "")


@over(
    "changes, reason",
    [
        ({"mlp_only_layers": [0]}, "layers without experts"),
        ({"attention_bias": True}, "bias of attention's output"),
    ],
)
def test_the_table_says_why_a_model_has_none(changes: dict[str, Any], reason: str) -> None:
    model = qwen3_moe.Model(qwen3_moe.Config.from_json(WHOLE | changes), TensorParallel(), 64)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = torch.zeros(1) if changes.get("attention_bias") else None
        layer.self_attn.attn.cache = layer_cache({"k": torch.empty(1, 1, 2, 16)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_fuse", lambda *_: pytest.fail("there are no parts to fuse"))
        patch.setattr(ops, "_table", {})
        model.fuse(detect())
        assert reason in ops.table()["decode steps of few requests"]
    assert model.model.fused is None


def decoder_of(directory: Path, shape: dict[str, Any], scheme: str) -> tuple[Any, MoeMegakernels]:
    from octavo.engine.runner import ModelRunner

    config = EngineConfig(
        model=str(write(directory, COMMON | shape)), load_format="dummy", quantization=scheme, kv_cache_dtype="fp8",
        device="cuda", enforce_eager=True, max_model_len=2048, kv_cache_memory_bytes=1 << 28, max_num_seqs=64,
    )  # fmt: skip
    runner = ModelRunner(config)
    return runner, runner.model.model.fused


def codes(x: Tensor, w: Any) -> Tensor:
    """x, FP64, as the weight's scheme quantizes it."""
    group = w.reads.granularity
    found, scale = reference.quantize_activation(x, group, torch.float8_e4m3fn)
    if group is Granularity.ROW:
        found = (x.float() * (1 / scale)).to(found.dtype)  # as kernels round
    if group is Granularity.BLOCK:
        scale = scale.repeat_interleave(128, 1)[:, : x.shape[1]]
    return found.double() * scale


def values(w: Tensor, scale: Tensor, by_tile: bool) -> Tensor:
    """A weight [N, K] in FP64."""
    if not by_tile:
        return w.double() * scale.double().view(-1, 1)
    return w.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]


def product(x: Tensor, w: Any) -> Tensor:
    return (codes(x, w) @ values(w.weight, w.scale, isinstance(w, PackedBlocks)).T).bfloat16()


def error(out: Tensor, ref: Tensor) -> float:
    return float((out.double() - ref.double()).norm() / ref.double().norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("scheme", ["ptpc_fp8", "fp8_block"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_each_phase(name: str, scheme: str, tmp_path: Path) -> None:
    """Each is compared on what the launch itself computed before it. Rows that pad a graph wake no expert."""
    _, fused = decoder_of(tmp_path, MODELS[name] | {"num_hidden_layers": 2}, scheme)
    p, (layer, after) = fused.parts, fused.layers
    stacks = [w for w in (layer.gate_up, layer.down) if isinstance(w, PackedGrouped)]
    for tokens, padding in ((1, 0), (3, 1), (4, 0), (4, 4), (8, 3)):
        if not fused.takes(tokens, 5):
            continue
        torch.manual_seed(tokens)
        attended = torch.randn(tokens, p.heads * p.head_dim, device="cuda").bfloat16()
        attended[:, ::7] *= 30
        before = product(attended, layer.o)[:, torch.randperm(p.hidden, device="cuda")]
        lengths = torch.full((tokens,), 5, dtype=torch.int32, device="cuda")
        lengths[tokens - padding :] = 0
        for kept in (fused.middle, fused.o_out, fused.down_out, fused.logits, fused.act):
            kept.fill_(torch.nan)
        runs = []
        for _ in range(3):
            residual = before.clone()
            fused.grid_barriers.zero_()
            runs.append((fused.between(0, attended, residual, lengths), residual))
        out, residual = runs[0]
        of_o, summed, of_router, middle = (x[:tokens] for x in (fused.o_out, fused.down_out, fused.logits, fused.middle))
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
        normed = reference.normed(middle, layer.post_norm, p.eps)
        logits = normed.double() @ layer.gate.double().T
        scores = of_router.double().softmax(-1)
        weights, chosen = scores.topk(layer.router.top_k, -1)
        if layer.router.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        expected = torch.zeros(tokens, p.hidden, dtype=torch.float64, device="cuda")
        for e in chosen[lengths > 0].unique().tolist():
            t, place = ((chosen == e) & (lengths > 0)[:, None]).nonzero(as_tuple=True)
            gate_up, down = (values(w.weight[e], w.scale[e], w.by_tile) for w in stacks)  # type: ignore[index]
            act = reference.silu_mul((codes(normed[t], layer.gate_up) @ gate_up.T).bfloat16()).values()
            expected[t] += codes(act, layer.down) @ down.T * weights[t, place, None]
        last = product(reference.normed(residual, after.input_norm, p.eps), after.qkv)
        live = lengths > 0
        errors = {
            "middle": (error(middle, before + of_o), 1e-6),
            "o": (error(of_o, product(attended, layer.o)), 0.002),
            "logits": (error(of_router, logits), 1e-4),
            "experts": (error(summed[live], expected[live]) if live.any() else 0.0, 0.02),
            "qkv": (error(out, last), 0.004),
        }
        print(name, scheme, tokens, {n: f"{e:.5f}" for n, (e, _) in errors.items()})
        assert all(e < bound for e, bound in errors.values()), errors
        assert torch.equal(residual, middle + summed)
        assert not summed[~live].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@torch.inference_mode()
def test_whole_steps(tmp_path: Path) -> None:
    """Five layers, launch after launch: the same bits each time, and about what the ops give."""
    check_whole_steps(*decoder_of(tmp_path, MODELS["small"] | {"num_hidden_layers": 5}, "ptpc_fp8"), (1, 3, 4, 8))
