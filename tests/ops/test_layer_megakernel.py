"""What lies between two attentions as one launch, each phase against float64; and that it compiles where there is no GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.cases import over, pairwise
from torch import Tensor

from octavo.config import EngineConfig
from octavo.ops.reference import SCALE_FLOOR
from octavo.quant.qtensor import expand_scale
from octavo.quant.scheme import BLOCK

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.ops.gpu import PackedScaledMM
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper import layer_megakernel, megakernel_layers
from octavo.ops.hopper.layer_megakernel import LayerMegakernels as Between
from tests.ops.megakernels import MODELS, dumped, hopper, parts, write

CPU = torch.device("cpu")
LLAMA_8B = dict(
    HIDDEN=4096, INTER=14336, WIDE=4096, QKV=6144, QKV_BIAS=0, CTAS=132, SHARED=227 << 10, O_ROWS=128, O_SPLITS=4,
    GATE_UP_ROWS=112, DOWN_ROWS=128, DOWN_SPLITS=4, QKV_ROWS=48, ALONE=0, BLOCKS=0, TWO_CODES=0, O_TILE=128,
    GATE_UP_TILE=128, DOWN_TILE=128, QKV_TILE=128,
)  # fmt: skip
SMALL = dict(HIDDEN=528, INTER=1472, WIDE=528, QKV=1584, QKV_BIAS=1, CTAS=114, O_ROWS=32, O_SPLITS=5, GATE_UP_ROWS=16,
             DOWN_ROWS=32, DOWN_SPLITS=6, QKV_ROWS=16, GATE_UP_TILE=1, QKV_TILE=1)  # fmt: skip
SHAPES = MODELS | {
    "not multiples of 64": dict(
        model_type="qwen2", hidden_size=528, intermediate_size=1424, heads=11, kv_heads=11, head_dim=48
    ),
    "two units a program": dict(model_type="llama", hidden_size=256, intermediate_size=17408, heads=4, kv_heads=2, head_dim=64),
}


# Each two of columns, kind and shape once; 32 tokens have 64 columns only with two codes a value, where a CTA holds the most.
# Variants for one token alone have eight.
COMPILED = [
    *pairwise(layer_megakernel.COLUMNS, ["", "BLOCKS", "TWO_CODES"], [LLAMA_8B, LLAMA_8B | SMALL]),
    (64, "TWO_CODES", LLAMA_8B),
    *pairwise(layer_megakernel.COLUMNS[:1], ["ALONE", "ALONE BLOCKS", "ALONE TWO_CODES"], [LLAMA_8B, LLAMA_8B | SMALL]),
]


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize(("columns", "kind", "options"), COMPILED)
def test_it_compiles(columns: int, kind: str, options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: FP8 matrix instructions of a group of warps, the copy engine's boxes, nothing kept in local memory."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    given = options | {"TOKENS": columns >> ("TWO_CODES" in kind)} | dict.fromkeys(kind.split(), 1)
    stacks, code = dumped(compiler.compile_cubin("layer_megakernel.cu", "sm_90a", given), tmp_path)
    assert stacks == ["0"]
    assert len(re.findall(rf"QGMMA\.64x{columns}x32\.F32\.E4M3\.E4M3", code)) >= 16
    assert "UTMALDG.2D" in code
    if options == LLAMA_8B:  # a product is ended while the next one runs; where there are few steps the compiler undoes that
        assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", code)) >= 8


@over("programs", [78, 114, 132])
@over("n, k", [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672), (528, 1472), (16, 16)])
def test_units_cover_a_product(n: int, k: int, programs: int) -> None:
    """Every row and step is in one unit; no share of K is empty; the busiest program reads at most twice the average."""
    for most in (1, 8):
        rows, shares = layer_megakernel.units(n, k, programs, most_shares=most)
        steps = -(-k // layer_megakernel.STEP)
        share = -(-steps // shares)
        assert rows % 16 == 0
        assert 16 <= rows <= 128
        assert share * (shares - 1) < steps <= share * shares
        turns = -(-(-(-n // rows) * shares) // programs)
        if n * steps > 16 * 8 * programs and most == 8:
            assert turns * share * rows < 2 * n * steps / programs


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("sm_90", {}, None),
        ("sm_90", {"inter": 1424, "kv": "fp8_e5m2", "window": 100}, None),
        ("sm_100", {}, "sm_90"),
        ("gfx942", {}, "sm_90"),
        ("sm_90", {"inter": 1416}, "multiple of 16"),
        ("sm_90", {"dtype": torch.float32}, "float32"),
    ],
)
def test_what_it_is_not_for(arch: str, changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megakernel_layers, "missing", lambda: None)
    found = layer_megakernel.refusal(parts(**changes), hopper(arch))
    assert found is None if reason is None else reason in (found or "")


def test_steps_that_it_takes_are_computed_by_it() -> None:
    """Few requests: two launches a layer; many, prompts and those that images bring something to: op by op."""
    from octavo.distributed import TensorParallel
    from octavo.models.common import LayerStack
    from octavo.models.config import ConfigBase
    from octavo.models.dense import DenseDecoder
    from octavo.models.interface import ModelInput

    class Fused(Between):
        def __init__(self) -> None:
            self.columns = layer_megakernel.COLUMNS

        def __call__(self, x: Tensor, batch: Any) -> Tensor:
            return x + 1

    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config = ConfigBase(vocab_size=8, head_dim=64, max_position_embeddings=8, **sizes)
    model: Any = DenseDecoder(config, TensorParallel(), LayerStack(range(0), lambda _: torch.nn.Identity()))

    def fused(requests: int, longest: int, tokens: int = 1, *extras: Tensor) -> bool:
        batch = SimpleNamespace(query_lens=[1] * (requests - 1) + [tokens], context_lens=[longest] * requests)
        x, residual = model.run_layers(batch, ModelInput(torch.zeros(1), extras))
        assert residual is None
        return bool(x == 1)

    assert not fused(1, 1)
    model.fused, most = Fused(), layer_megakernel.MAX_TOKENS
    assert all(fused(*step) for step in ((1, 700), (1, 5000), (2, 700), (most, 1)))
    assert not any(fused(*step) for step in ((most + 1, 1), (2, 700, 2), (1, 700, 1, torch.zeros(1))))


def test_what_one_token_has_a_variant_for() -> None:
    """Where a CTA has one unit of each product, whose inputs it can keep."""
    assert layer_megakernel.fits_alone(LLAMA_8B)
    assert layer_megakernel.fits_alone(LLAMA_8B | SMALL)
    assert not layer_megakernel.fits_alone(LLAMA_8B | {"HIDDEN": 8192})  # 64 K steps of gate_up's inputs
    assert not layer_megakernel.fits_alone(LLAMA_8B | {"INTER": 17408})  # two units of gate_up
    assert not layer_megakernel.fits_alone(LLAMA_8B | {"CTAS": 264})  # more amaxes than threads that read them


def test_a_refused_source_says_why() -> None:
    if compiler.missing() is not None:
        pytest.skip(f"needs NVRTC: {compiler.missing()}")
    with pytest.raises(compiler.NoKernel, match=r"kernel\.cu"):
        compiler.compile_cubin("layer_megakernel.cu", "sm_90a", {"TOKENS": 8})


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layer_megakernel.no_warpgroups.__globals__, vars(megakernel_layers)):
        monkeypatch.setitem(module, "missing", lambda: "there is no libnvrtc.so.13")
    assert layer_megakernel.refusal(parts(), hopper()) == "there is no libnvrtc.so.13"


def test_where_the_driver_refuses_it_the_ops_remain(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from octavo.ops import cuda

    def refuse(*_: object) -> None:
        raise compiler.NoKernel("cuModuleLoadData failed with CUDA error 218\nmore")

    monkeypatch.setattr(layer_megakernel, "refusal", lambda *_: None)
    monkeypatch.setattr(layer_megakernel, "LayerMegakernels", refuse)
    assert cuda.fuse(parts(), hopper()) == "cuModuleLoadData failed with CUDA error 218"
    assert "go op by op" in caplog.text


def decoder_of(directory: Path, shape: dict[str, Any], scheme: str = "ptpc_fp8") -> tuple[Any, Between]:
    from octavo.engine.runner import ModelRunner

    config = EngineConfig(
        model=str(write(directory, shape)), load_format="dummy", quantization=scheme, kv_cache_dtype="fp8", device="cuda",
        enforce_eager=True, max_model_len=2048, kv_cache_memory_bytes=1 << 30, max_num_seqs=64,
    )  # fmt: skip
    runner = ModelRunner(config)
    found = runner.model.model.fused
    assert isinstance(found, Between)
    return runner, found


def in_order(codes: Tensor, tokens: int, width: int) -> Tensor:
    """Codes [tokens, width] of what the kernel lays out as its matrix unit wants it."""
    steps, columns, _ = codes.shape
    token = torch.arange(columns, device=codes.device)
    chunk = torch.arange(8, device=codes.device)[None, :] ^ token[:, None] % 8
    plain = codes.view(steps, columns, 8, 16).gather(2, chunk[None, :, :, None].expand(steps, -1, -1, 16))
    return plain.reshape(steps, columns, 128).transpose(0, 1).reshape(columns, -1)[:tokens, :width].view(torch.float8_e4m3fn)


def joined(codes: Tensor) -> Tensor:
    """What each token's two columns of codes stand for, in units of its scale, FP64: [2 * tokens, K] -> [tokens, K]."""
    own, rest = codes.double().unflatten(0, (-1, 2)).unbind(1)
    return own + rest / 16


def scale_of(amax: Tensor) -> Tensor:
    return (amax / torch.full_like(amax, 448)).clamp(min=SCALE_FLOOR)  # by a number torch multiplies by its inverse


def quantized(x: Tensor, *, by_group: bool) -> tuple[Tensor, Tensor]:
    """Codes [tokens, K], and scales [tokens, 1] or [tokens, groups]."""
    if by_group:
        groups = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        scale = scale_of(groups.abs().amax(2))
        return (groups * (1 / scale)[:, :, None]).flatten(1)[:, : x.shape[1]].to(torch.float8_e4m3fn), scale
    scale = scale_of(x.float().abs().amax(1, keepdim=True))
    return (x.float() * (1 / scale)).to(torch.float8_e4m3fn), scale


def values(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes [tokens, K] stand for, in FP64."""
    of_each = scale if scale.shape[1] == 1 else scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
    return codes.double() * of_each.double()


def product(codes: Tensor, scale: Tensor, w: Any) -> Tensor:
    by_row = w.scale.view(-1, 1) if isinstance(w, PackedScaledMM) else expand_scale(w.scale, w.weight.shape)
    return (values(codes, scale) @ (w.weight.double() * by_row.double()).T).bfloat16()


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)).bfloat16() * gain


def error(out: Tensor, ref: Tensor) -> float:
    return float((out.double() - ref.double()).norm() / ref.double().norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("scheme", ["ptpc_fp8", "fp8", "fp8_block"])
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_each_phase(name: str, scheme: str, tmp_path: Path) -> None:
    """Each is compared on what the launch itself computed before it; where that is not kept, codes may fall the other way."""
    _, fused = decoder_of(tmp_path, SHAPES[name] | {"num_hidden_layers": 2}, scheme)
    p, (layer, after) = fused.parts, fused.parts.layers
    (_, o, gate_up, down), (qkv, *_) = fused.weights
    by_group, compared = scheme == "fp8_block", 0
    for tokens in (8, 8, 2, 3, 9, 16, 23, 32):
        torch.manual_seed(tokens)
        attended = torch.randn(tokens, p.heads * p.head_dim, device="cuda").bfloat16()
        attended[:, ::7] *= 30
        want, scale = quantized(attended, by_group=by_group)
        o_of = product(want, scale, o)
        before = o_of[:, torch.randperm(p.hidden, device="cuda")]  # as large
        residual, columns = before.clone(), next(n for n in layer_megakernel.COLUMNS if tokens <= n)
        for kept in fused.codes[columns]:
            kept[:, :, :].fill_(0)
        fused.grid_barriers.zero_()
        for kept in (*fused.scales[columns], fused.shares):
            kept.fill_(torch.nan)
        got = fused.between(0, attended, residual)
        codes = [
            in_order(c, tokens, w) for c, w in zip(fused.codes[columns], (attended.shape[1], p.hidden, p.inter), strict=True)
        ]
        scales = [kept[:, :tokens].T for kept in fused.scales[columns]]
        assert torch.equal(codes[0].view(torch.uint8), want.view(torch.uint8))
        assert torch.equal(scales[0], scale)
        middle = o_of + before
        both = product(*quantized(norm(middle, layer.post_norm, p.eps), by_group=by_group), gate_up).float()
        gate, up = both[:, : p.inter], both[:, p.inter :]
        act = ((gate / (1 + torch.exp(-gate))).bfloat16().float() * up).bfloat16()
        if not by_group:  # the scale of a token is not kept
            amaxes = fused.grid_barriers[0, layer_megakernel.GRID_BARRIERS :][: fused.ctas * columns].view(-1, columns)
            scales[2] = scale_of((amaxes & 0x7FFFFFFF).amax(0).view(torch.float32)[:tokens, None])
        down_of = product(codes[2], scales[2], down)
        ratio = float(middle.float().norm() / down_of.float().norm())
        if ratio > 2:  # so that what down adds is seen beside a BF16 residual
            down.scale.mul_(ratio)
            continue
        normed = values(*quantized(norm(residual, after.input_norm, p.eps), by_group=by_group))
        out = product(codes[1], scales[1], qkv)
        if after.qkv_bias is not None:
            out = out + after.qkv_bias
        errors = {
            "act": (error(values(codes[2], scales[2]), act), 0.05),  # 0.026 of it is the codes' own
            "after": (error(residual, middle + down_of) * ratio, 0.02),
            "normed": (error(values(codes[1], scales[1]), normed), 0.002),
            "qkv": (error(got, out), 0.002),
        }
        compared += 1
        print(name, scheme, tokens, {n: f"{e:.5f}" for n, (e, _) in errors.items()})
        assert all(e < bound for e, bound in errors.values()), errors
    assert compared >= 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_each_phase_of_activations_as_they_are(name: str, tmp_path: Path) -> None:
    """Each beside float64 over the values that it reads, not over their codes: as exact as products in BF16."""
    _, fused = decoder_of(tmp_path, SHAPES[name] | {"num_hidden_layers": 2}, "fp8_w8a16")
    p, (layer, after) = fused.parts, fused.parts.layers
    (_, o, gate_up, down), (qkv, *_) = fused.weights
    compared = 0
    for tokens in (4, 4, 2, 3, 8, 9, 16, 23, 32):
        torch.manual_seed(tokens)
        attended = torch.randn(tokens, p.heads * p.head_dim, device="cuda").bfloat16()
        attended[:, ::7] *= torch.logspace(-20, 3, tokens, device="cuda").bfloat16()[:, None]  # no floor of a scale is met
        attended[0] *= 2.0**-60
        one = torch.ones(tokens, 1, device="cuda")
        o_of = product(attended, one, o)
        before = o_of[:, torch.randperm(p.hidden, device="cuda")]  # as large
        residual, columns = before.clone(), next(n for n in fused.columns if tokens <= n)
        for kept in fused.codes[columns]:
            kept.fill_(0)
        fused.grid_barriers.zero_()
        for kept in (*fused.scales[columns], fused.shares):
            kept.fill_(torch.nan)
        got = fused.between(0, attended, residual)
        widths = attended.shape[1], p.hidden, p.inter
        codes = [joined(in_order(c, 2 * tokens, w)) for c, w in zip(fused.codes[columns], widths, strict=True)]
        scales = [kept[:, :tokens].T for kept in fused.scales[columns]]
        amaxes = fused.grid_barriers[0, layer_megakernel.GRID_BARRIERS :][: fused.ctas * columns].view(-1, columns)
        scales[2] = ((amaxes & 0x7FFFFFFF).amax(0).view(torch.float32)[:tokens, None] / 448).clamp(min=1e-30)
        read, normed, act = (values(*both) for both in zip(codes, scales, strict=True))
        middle = o_of + before
        both = product(norm(middle, layer.post_norm, p.eps), one, gate_up).float()
        gate, up = both[:, : p.inter], both[:, p.inter :]
        want = ((gate / (1 + torch.exp(-gate))).bfloat16().float() * up).bfloat16()
        down_of = product(act, one, down)
        ratio = float(middle.float().norm() / down_of.float().norm())
        if ratio > 2:  # so that what down adds is seen beside a BF16 residual
            down.scale.mul_(ratio)
            continue
        out = product(norm(residual, after.input_norm, p.eps), one, qkv)
        if after.qkv_bias is not None:
            out = out + after.qkv_bias
        each = (read - attended).norm(dim=1) / attended.double().norm(dim=1)
        errors = {
            "attended": (float(each.max()), 0.003),
            "act": (error(act, want), 0.012),  # behind the BF16 of o, of the residual, of the norm and of gate and up
            "after": (error(residual, middle + down_of) * ratio, 0.012),
            "normed": (error(normed, norm(residual, after.input_norm, p.eps)), 0.003),
            "qkv": (error(got, out), 0.004),
        }
        compared += 1
        print(name, tokens, {n: f"{e:.5f}" for n, (e, _) in errors.items()})
        assert all(e < bound for e, bound in errors.values()), errors
    assert compared >= 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("scheme", ["ptpc_fp8", "fp8", "fp8_block", "fp8_w8a16"])
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_each_phase_of_one_token(name: str, scheme: str, tmp_path: Path) -> None:
    """Each on what the launch itself left of the one before: the residual behind o, act, the residual behind down."""
    _, fused = decoder_of(tmp_path, SHAPES[name] | {"num_hidden_layers": 2}, scheme)
    if 1 not in fused.kernels:
        assert name == "two units a program"
        return
    p, (layer, after) = fused.parts, fused.parts.layers
    (_, o, gate_up, down), (qkv, *_) = fused.weights
    compared, one = 0, torch.ones(1, 1, device="cuda")

    def of(x: Tensor, w: Any) -> Tensor:
        return product(*((x, one) if scheme == "fp8_w8a16" else quantized(x, by_group=scheme == "fp8_block")), w)

    for seed in range(4):
        torch.manual_seed(seed)
        attended = torch.randn(1, p.heads * p.head_dim, device="cuda").bfloat16()
        attended[:, ::7] *= 30
        o_of = of(attended, o)
        before = o_of[:, torch.randperm(p.hidden, device="cuda")]  # as large
        residual = before.clone()
        fused.grid_barriers.zero_()
        for kept in (*fused.codes[1][1:], fused.shares):
            kept.fill_(torch.nan)
        got = fused.between(0, attended, residual)
        middle, act = (kept[None] for kept in fused.codes[1][1:])
        gate, up = of(norm(middle, layer.post_norm, p.eps), gate_up).float().chunk(2, 1)
        down_of = of(act, down)
        ratio = float(middle.float().norm() / down_of.float().norm())
        if ratio > 2:  # so that what down adds is seen beside a BF16 residual
            down.scale.mul_(ratio)
            continue
        out = of(norm(residual, after.input_norm, p.eps), qkv)
        if after.qkv_bias is not None:
            out = out + after.qkv_bias
        errors = {
            "middle": error(middle, o_of + before),
            "act": error(act, ((gate / (1 + torch.exp(-gate))).bfloat16().float() * up).bfloat16()),
            "after": error(residual, middle + down_of) * ratio,
            "qkv": error(got, out),
        }
        compared += 1
        print(name, scheme, {n: f"{e:.5f}" for n, e in errors.items()})
        assert all(e < 0.02 for e in errors.values()), errors
    assert compared >= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")
@pytest.mark.parametrize("scheme", ["ptpc_fp8", "fp8_block", "fp8_w8a16"])
@torch.inference_mode()
def test_whole_steps(scheme: str, tmp_path: Path) -> None:
    """Five layers, launch after launch: the same bits each time, and about what the ops give."""
    check_whole_steps(*decoder_of(tmp_path, MODELS["llama"] | {"num_hidden_layers": 5}, scheme), (1, 3, 8, 20, 32))


def check_whole_steps(runner: Any, fused: Any, numbers: Sequence[int]) -> None:
    """Steps of so many requests by one fused decoder, beside the same steps op by op."""
    from octavo.batch import Span

    for requests in numbers:
        ids = torch.randint(512, (requests, 40)).tolist()
        blocks = [range(i * 2, i * 2 + 2) for i in range(requests)]
        runner.model.model.fused = None
        runner.forward(runner._batch([Span(one[:-1], 0, own) for one, own in zip(ids, blocks, strict=True)]))
        batch = runner._batch([Span(one[-1:], 39, own) for one, own in zip(ids, blocks, strict=True)])
        want = runner.forward(batch)
        runner.model.model.fused = fused
        first = runner.forward(batch)
        assert all(torch.equal(runner.forward(batch), first) for _ in range(30))
        assert error(first, want) < 0.15
