"""Stored FP8 weights: read from every format with their codes bit for bit, in whatever FP8 dtype the device has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import cases
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from quant.float64 import E4M3FN, array, codes_of

from octavo.errors import OctavoError
from octavo.platform import Platform
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, FP8_W8A16, QTensor, Scheme, concat, dequantize, quantize
from octavo.quant.formats import WHOLE, Shard, read_weight, stored_shape
from octavo.quant.qtensor import to_device_fp8
from octavo.quant.scheme import WeightDType

CPU = Platform(torch.device("cpu"), "test")
FNUZ = Platform(torch.device("cpu"), "test", fp8_dtype=torch.float8_e4m3fnuz)


class Stored:
    """A checkpoint of a few tensors."""

    prefix = "layer."
    weight_only = False

    def __init__(self, platform: Platform = CPU, **tensors: torch.Tensor):
        self.platform, self.tensors = platform, {f"w.{name}": tensor for name, tensor in tensors.items()}
        self.skipped: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.tensors

    def is_weight_only(self, module: str) -> bool:
        return self.weight_only

    def skip(self, name: str) -> None:
        self.skipped.add(name)

    def stored_shape(self, name: str) -> list[int]:
        return list(self.tensors[name].shape)

    def read(self, name: str, shape: Sequence[int] | None, shard: Shard = WHOLE, part: slice | None = None) -> torch.Tensor:
        tensor = self.tensors[name]
        assert shape is None or list(shape) == list(tensor.shape)
        if not tensor.shape:
            return tensor
        part = part or shard.slice(tensor.shape[shard.dim])
        return tensor.narrow(shard.dim, part.start, part.stop - part.start)


def int4(n: int, k: int, group: int) -> tuple[Stored, torch.Tensor]:
    """A matrix as compressed-tensors packs it, and its values in float64."""
    codes = torch.randint(-8, 8, (n, k))
    scale = torch.rand(n, k // group).bfloat16()
    packed = pack_to_int32(codes.to(torch.int8), 4)
    values = codes.double() * scale.double().repeat_interleave(group, 1)
    return Stored(weight_packed=packed, weight_scale=scale, weight_shape=torch.tensor([n, k])), values


def packed(**beside: torch.Tensor) -> Stored:
    """INT4 [256, 256] in groups of 128, with other tensors."""
    stored, _ = int4(256, 256, 128)
    stored.tensors |= {f"w.{name}": tensor for name, tensor in beside.items()}
    return stored


def all_codes() -> torch.Tensor:
    """[2, 127]: every finite e4m3fn code."""
    return torch.cat([torch.arange(0x7F), torch.arange(0x80, 0xFF)]).to(torch.uint8).view(2, 127).view(torch.float8_e4m3fn)


def read(stored: Stored, shape: tuple[int, int], shard: Shard = WHOLE) -> QTensor:
    found = read_weight(stored, "w", shape, shard)
    assert isinstance(found, QTensor)
    return found


@cases("dtype", [torch.float32, torch.bfloat16])
@cases(
    ("scale_shape", "scheme"),
    [((), FP8_PER_TENSOR), ((1,), FP8_PER_TENSOR), ((2,), FP8_PER_CHANNEL), ((2, 1), FP8_PER_CHANNEL)],
)
def test_scaled_weights_are_kept(scale_shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
    scale = (torch.rand(scale_shape) + 0.5).to(dtype)
    stored = Stored(weight=all_codes(), weight_scale=scale, input_scale=torch.tensor(0.3))
    q = read(stored, (2, 127))
    assert q.scheme is scheme
    assert q.scale is not None
    assert q.scale.shape == (2, 1)
    assert q.scale.dtype == torch.float32
    np.testing.assert_array_equal(codes_of(q.data), codes_of(all_codes()))
    assert torch.equal(q.scale.flatten(), scale.float().flatten().expand(2))
    assert torch.equal(dequantize(q), all_codes().float() * q.scale)
    stored.weight_only = True
    other = read(stored, (2, 127))
    assert other.scheme is FP8_W8A16
    assert torch.equal(dequantize(other), dequantize(q))


@cases("shape", [(300, 200), (300, 100), (100, 300), (1, 300)], ids=str)
@cases("spelling", ["weight_scale_inv", "weight_scale"])  # Hugging Face's and compressed-tensors'
def test_block_weights_are_kept(spelling: str, shape: tuple[int, int], seed: int) -> None:
    original = quantize(torch.randn(shape), FP8_BLOCK)
    assert original.scale is not None
    q = read(Stored(weight=original.data, **{spelling: original.scale}), shape)
    assert q.scheme is FP8_BLOCK
    np.testing.assert_array_equal(codes_of(q.data), codes_of(original.data))
    assert torch.equal(dequantize(q), dequantize(original))


@pytest.mark.parametrize(("dim", "ranks"), [(0, 1), (0, 3), (1, 2)])
def test_tiles_of_modelopt_s(dim: int, ranks: int, seed: int) -> None:
    """FP8_PB_WO: a scale for each tile, with dimensions of 1 between (NVIDIA's ModelOpt, export of block quantizers)."""
    original = quantize(torch.randn(384, 256), FP8_BLOCK)
    assert original.scale is not None
    stored = Stored(weight=original.data, weight_scale=original.scale.view(3, 1, 2, 1))
    parts = [read(stored, (384, 256), Shard(dim, rank, ranks)) for rank in range(ranks)]
    assert all(part.scheme is FP8_BLOCK for part in parts)
    assert torch.equal(torch.cat([dequantize(part) for part in parts], dim), dequantize(original))


def test_hugging_face_per_tensor_weights_are_kept() -> None:
    """`fp8` without a block size calls the matrix's scale `weight_scale_inv` too, and a static input's `activation_scale`."""
    stored = Stored(weight=all_codes(), weight_scale_inv=torch.tensor(0.7), activation_scale=torch.tensor(0.3))
    q = read(stored, (2, 127))
    assert q.scheme is FP8_PER_TENSOR
    assert torch.equal(dequantize(q), all_codes().float() * 0.7)


@cases("dim", [0, 1])
@cases("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
def test_ranks_read_their_part(scheme: Scheme, dim: int, seed: int) -> None:
    original = quantize(torch.randn(384, 256), scheme)
    assert original.scale is not None
    scale = original.scale[:1] if scheme is FP8_PER_TENSOR else original.scale
    stored = Stored(weight=original.data, **{"weight_scale_inv" if scheme is FP8_BLOCK else "weight_scale": scale})
    for ranks in (3, 4) if dim == 0 else (2,):  # parts of rows may split a tile
        parts = [read(stored, (384, 256), Shard(dim, rank, ranks)) for rank in range(ranks)]
        assert all(part.scheme is scheme for part in parts)
        assert torch.equal(torch.cat([dequantize(part) for part in parts], dim), dequantize(original))
        if dim == 0:
            assert torch.equal(dequantize(concat(parts)), dequantize(original))


@cases(("length", "unit", "parts"), [
    (768, 128, [256, 256, 128, 128]), (300, 128, [128, 128, 44, 0]), (96, 32, [32, 32, 32, 0]), (137, 16, [48, 32, 32, 25]),
    (3, 1, [1, 1, 1, 0]),
])  # fmt: skip
def test_parts_that_do_not_divide_differ_by_a_unit(length: int, unit: int, parts: list[int]) -> None:
    found = [Shard(0, rank, 4, unit=unit, balanced=True).slice(length) for rank in range(4)]
    assert [at.stop - at.start for at in found] == parts
    assert [at.start for at in found] == [sum(parts[:i]) for i in range(4)]


def test_ranks_that_share_a_head_read_the_same_part() -> None:
    assert [Shard(0, rank, 4, copies=2).slice(6) for rank in range(4)] == [slice(0, 3)] * 2 + [slice(3, 6)] * 2


@pytest.mark.parametrize("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
def test_fnuz_keeps_every_value(scheme: Scheme) -> None:
    codes = all_codes()
    scale = torch.tensor([[0.5], [2.0]]) if scheme is FP8_PER_CHANNEL else torch.full((2, 1), 0.3)
    if scheme is FP8_BLOCK:
        scale = scale[:1]
    before = QTensor(codes, scale, scheme, (2, 127))
    after = to_device_fp8(before, torch.float8_e4m3fnuz)
    assert after.data.dtype is torch.float8_e4m3fnuz
    assert not (after.data.view(torch.uint8) == 0x80).any()  # fnuz's NaN
    assert torch.equal(dequantize(after), dequantize(before))
    np.testing.assert_array_equal(codes_of(before.data), codes_of(all_codes()))  # the stored ones are as they were
    assert (before.data.view(torch.uint8) == 0x80).any()
    assert to_device_fp8(before, torch.float8_e4m3fn) is before


def test_fnuz_device_reads_stored_codes(seed: int) -> None:
    original = quantize(torch.randn(130, 140), FP8_PER_CHANNEL)
    assert original.scale is not None
    q = read(Stored(FNUZ, weight=original.data, weight_scale=original.scale), (130, 140))
    assert q.data.dtype is torch.float8_e4m3fnuz
    assert torch.equal(dequantize(q), dequantize(original))


def test_a_dense_weight_is_dense(seed: int) -> None:
    w = torch.randn(4, 6).bfloat16()
    assert torch.equal(read_weight(Stored(weight=w), "w", (4, 6), WHOLE), w)  # type: ignore[arg-type]
    assert torch.equal(read_weight(Stored(weight=w), "w", (4, 6), Shard(1, 1, 2)), w[:, 3:])  # type: ignore[arg-type]


FP8 = torch.ones(256, 256).to(torch.float8_e4m3fn)


@cases(
    ("stored", "shard", "sentence"),
    [
        (packed(weight_zero_point=torch.zeros(32, 2).int()), WHOLE, "layer.w is stored as packed INT4 with zero points"),
        (packed(weight_zero_point=torch.ones(256, 2).char()), WHOLE, "layer.w is stored as packed INT4 with zero points"),
        (packed(weight_g_idx=torch.arange(256).flip(0) // 128), WHOLE, "zero points or reordered columns"),
        (Stored(weight_packed=FP8, weight_scale=FP8), WHOLE, "layer.w: 256 packed words and 256 scales a row"),
        (Stored(weight_packed=FP8[:, :32], weight_scale=FP8[:, :3]), WHOLE, "layer.w: 32 packed words and 3 scales a row"),
        (Stored(weight=FP8), WHOLE, "layer.w.weight is stored as torch.float8_e4m3fn without a scale"),
        (Stored(weight=FP8, weight_scale=torch.ones(256, 8)), WHOLE, r"w.weight_scale has shape \[256, 8\]"),
        (Stored(weight=FP8, weight_scale=torch.ones(3)), WHOLE, r"w.weight_scale has shape \[3\]"),
        (Stored(weight=FP8, weight_scale=torch.ones(3, 1)), WHOLE, r"w.weight_scale has shape \[3, 1\]"),
        (Stored(weight=FP8, weight_scale=torch.ones(1, 1, 1)), WHOLE, r"w.weight_scale has shape \[1, 1, 1\]"),
        (Stored(weight=FP8.view(torch.uint8).view(torch.float8_e5m2), weight_scale=torch.ones(1)), WHOLE, "float8_e5m2"),
        (Stored(weight=FP8.view(torch.int8), weight_scale=torch.ones(1)), WHOLE, "torch.int8"),
        (Stored(weight=FP8, weight_scale_inv=torch.ones(2, 2)), Shard(1, 1, 4), "layer.w: a part that starts at 64 splits"),
        (Stored(weight=FP8, weight_scale=torch.ones(1)), Shard(0, 0, 3), "256 does not split over 3 ranks"),
    ],
)
def test_what_cannot_be_read_is_said(stored: Stored, shard: Shard, sentence: str) -> None:
    with pytest.raises(OctavoError, match=sentence):
        read_weight(stored, "w", (256, 256), shard)


def test_stored_values_are_those_of_the_definition() -> None:
    q = read(Stored(weight=all_codes(), weight_scale=torch.tensor(1.0)), (2, 127))
    np.testing.assert_array_equal(array(dequantize(q)), E4M3FN.values[codes_of(all_codes())])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_scales_that_are_powers_of_two(dtype: torch.dtype, seed: int) -> None:
    """DeepSeek's `ue8m0`: a byte e means 2^(e - 127)."""
    codes = torch.randn(300, 200).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 150, (3, 2), dtype=torch.uint8)
    q = read(Stored(weight=codes, weight_scale_inv=exponents.view(dtype)), (300, 200))
    assert q.scheme is FP8_BLOCK
    assert q.scale is not None
    assert torch.equal(q.scale, 2.0 ** (exponents.float() - 127))


@cases(
    "beside",
    [
        dict(weight_zero_point=torch.zeros(256, 2).char()),
        dict(weight_zero_point=pack_to_int32(torch.zeros(256, 2).char(), 4, packed_dim=0)),
        dict(weight_g_idx=torch.arange(256) // 128),
    ],
)
def test_int4_that_is_said_to_be_in_order_and_symmetric(beside: dict[str, torch.Tensor], seed: int) -> None:
    stored = packed(**beside)
    alone = Stored(**{name: stored.tensors[f"w.{name}"] for name in ("weight_packed", "weight_scale", "weight_shape")})
    assert read(stored, (256, 256)).scheme.group == 128
    assert torch.equal(dequantize(read(stored, (256, 256))), dequantize(read(alone, (256, 256))))


def expanded(stored: Stored, group: int) -> torch.Tensor:
    return stored.tensors["w.weight_scale"].double().repeat_interleave(group, 1)


@cases(("n", "k", "group"), [(3, 64, 32), (16, 96, 96), (5, 20, 4), (1, 8, 8), (7, 12, 12)])
def test_packed_int4(n: int, k: int, group: int, seed: int) -> None:
    stored, values = int4(n, k, group)
    q = read(stored, (n, k))
    assert (q.scheme.dtype, q.scheme.group, q.shape) == (WeightDType.INT4, group, (n, k))
    packed = stored.tensors["w.weight_packed"]
    assert q.data.numpy().tobytes() == packed.numpy().tobytes()
    assert torch.equal(unpack_from_int32(packed, 4, torch.Size((n, k))).double() * expanded(stored, group), values)
    assert torch.equal(dequantize(q).double(), values)  # FP32 holds the products exactly
    assert stored_shape(stored, "w") == (n, k)
    assert "w.weight_shape" in stored.skipped


@cases("ranks", [2, 4, 8])
@cases("dim", [0, 1])
@cases(("k", "group"), [(96, 32), (64, 64), (48, 4)])
def test_ranks_read_their_part_of_int4(k: int, group: int, dim: int, ranks: int, seed: int) -> None:
    """Also where a part starts within a packed word or a group."""
    stored, values = int4(16, k, group)
    found = [read_weight(stored, "w", (16, k), Shard(dim, rank, ranks)) for rank in range(ranks)]
    whole = dim == 0 or not (k // ranks % 8 or k // ranks % group)
    assert {isinstance(part, QTensor) for part in found} >= {whole}
    parts = [dequantize(part) if isinstance(part, QTensor) else part for part in found]
    assert torch.equal(torch.cat(parts, dim), values.float())
