"""KV cache formats as data: the fields of one token, and the buffers laid out by them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from octavo.errors import OctavoError

__all__ = [
    "Field", "IndexCache", "KVCache", "KVCacheSpec", "KeyRounding", "LatentCache", "LayerCache", "Layout", "gather",
    "index_spec", "latent_spec", "spec_for",
]  # fmt: skip

LATENT_GROUP = 128  # latent values per scale

Views = dict[str, Tensor]


class KeyRounding(NamedTuple):
    """How one layer's keys are rounded to FP8 codes, so that the errors cancel out in products with its queries.

    order: INT32 [kv_heads, D], the dimension that each step rounds. influence: FP32 [kv_heads, D, D]; row i holds what the
    error of step i does to each dimension, 0 for those that are rounded by then. Both on the cache's device.
    """

    influence: Tensor
    order: Tensor


class LayerCache(NamedTuple):
    """One layer's keys and values: typed views [num_blocks, block_size, heads, ...], and the dequantization scales of an FP8
    cache: FP32 on the cache's device, [1] for the layer or [kv_heads].

    Kernels read the scales from device memory, so that a scale can change under a captured graph. They ignore them for a cache
    of another dtype and for one with a scale per token and head (which is in `views`). key_rounding: None rounds to nearest;
    only a cache of FP8 codes with such scales has one.
    """

    views: Views
    k_scale: Tensor
    v_scale: Tensor
    key_rounding: KeyRounding | None = None


class LatentCache(NamedTuple):
    """One MLA layer's cache, shared by all heads: views [num_blocks, block_size, ...].

    latent: [.., R], the normed latent that keys and values are projected from, in the model's dtype or in FP8 codes.
    rope: [.., D], the rotated part of the key. scale: FP32 [.., ceil(R / 128)], the codes' dequantization scales, powers of
    two; None: the latent is not in FP8.
    """

    latent: Tensor
    rope: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, views: Views) -> Self:
        """The views of a `latent_spec`."""
        return cls(views["latent"], views["rope"], views.get("scale"))


class IndexCache(NamedTuple):
    """One sparse-attention indexer's keys: views [num_blocks, block_size, D], and the scale of each, FP32 [.., 1].

    FP8 keys went through a Hadamard transform before quantization. Keys without a scale are FP32 and untransformed.
    """

    k: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, views: Views) -> Self:
        """The views of an `index_spec`."""
        return cls(views["index_k"], views.get("index_scale"))


@dataclass(frozen=True)
class Field:
    """One array of the cache: its name, its shape per token, its dtype.

    In memory a block's array has the axes of `shape` with the block's tokens inserted as axis `tokens_at`. The view always has
    the tokens first.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tokens_at: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class KVCacheSpec:
    """The storage of one token of one layer. In a block each field is one array; interleaved, a token's fields are adjacent.

    name: the format's name, as in `--kv-cache-dtype`; "" for a part that needs no name.
    """

    fields: tuple[Field, ...]
    interleaved: bool = False
    name: str = ""

    @property
    def bytes_per_token(self) -> int:
        return sum(field.nbytes for field in self.fields)

    def views(self, buffer: Tensor, block_size: int) -> Views:
        """Typed views [num_blocks, block_size, *shape] of a byte buffer [num_blocks, block_size * bytes_per_token]."""
        out: Views = {}
        offset = 0
        for field in self.fields:
            size = field.dtype.itemsize
            start = offset if self.interleaved else offset * block_size
            axes = list(field.shape)
            axes.insert(field.tokens_at, block_size)
            inner = [prod(axes[i + 1 :]) for i in range(len(axes))]
            token_stride = inner.pop(field.tokens_at)
            strides = (self.bytes_per_token // size if self.interleaved else token_stride, *inner)
            out[field.name] = buffer.view(field.dtype).as_strided(
                (buffer.shape[0], block_size, *field.shape), (buffer.shape[1] // size, *strides), start // size
            )
            offset += field.nbytes
        return out


class Layout(Enum):
    """The order of a block's keys and values in memory."""

    PLAIN = "one token after another"
    BY_HEAD = "a head's tokens one after another, as a CPU reads them"
    TENSOR_CORE = "plain, but FP8 values with the tokens last, over which an FP8 tensor core sums, and scales too"

    @staticmethod
    def on(cpu: bool) -> Layout:
        """The layout that the device's kernels read best."""
        return Layout.BY_HEAD if cpu else Layout.TENSOR_CORE

    def tokens_at(self, fp8: bool) -> tuple[int, int]:
        """The axis of the tokens in keys and in values [heads, dim]."""
        if self is Layout.BY_HEAD:
            return 1, 1
        return 0, 2 if self is Layout.TENSOR_CORE and fp8 else 0


def spec_for(
    kv_cache_dtype: str, heads: int, dim: int, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout = Layout.PLAIN
) -> KVCacheSpec:
    """The spec of a canonical `--kv-cache-dtype`. `dtype`: the model's. `fp8_dtype`: the device's.

    `fp8_per_token_head` stores an FP32 scale per token and head beside the codes. Other FP8 formats have one scale for a
    layer's keys and one for its values, outside the cache.
    """
    if kv_cache_dtype == "fp8_ds_mla":
        raise OctavoError(
            "--kv-cache-dtype fp8_ds_mla is for MLA models, whose cache holds latents; this model's holds keys and values, "
            "so use fp8 or auto."
        )
    wide = {"auto": dtype, "bfloat16": torch.bfloat16}.get(kv_cache_dtype)
    stored = wide or (torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else fp8_dtype)
    fields = [Field(name, (heads, dim), stored, at) for name, at in zip("kv", layout.tokens_at(wide is None), strict=True)]
    if kv_cache_dtype == "fp8_per_token_head":
        at = int(layout is Layout.TENSOR_CORE)  # where a kernel copies a head's scales of a block at once
        fields += [Field(name, (heads,), torch.float32, at) for name in ("k_scale", "v_scale")]
    return KVCacheSpec(tuple(fields), name=str(dtype).removeprefix("torch.") if kv_cache_dtype == "auto" else kv_cache_dtype)


def latent_spec(kv_cache_dtype: str, rank: int, rope: int, dtype: torch.dtype, fp8_dtype: torch.dtype) -> KVCacheSpec:
    """MLA's cache, shared by all heads: a latent of `rank` values, and `rope` values of the key.

    FP8, including `fp8_e4m3`, is `fp8_ds_mla`, DeepSeek's FlashMLA format: codes, one FP32 scale per 128 values, and the rope
    part in BF16, adjacent for each token (656 bytes for 512 and 64). Raises OctavoError for other FP8 dtypes.
    """
    if kv_cache_dtype in ("fp8_e4m3", "fp8_ds_mla"):
        codes = (
            Field("latent", (rank,), fp8_dtype),
            Field("scale", (-(-rank // LATENT_GROUP),), torch.float32),
            Field("rope", (rope,), torch.bfloat16),
        )
        return KVCacheSpec(codes, interleaved=True, name="fp8_ds_mla")
    wide = {"auto": dtype, "bfloat16": torch.bfloat16}.get(kv_cache_dtype)
    if wide is None:
        raise OctavoError(
            f"--kv-cache-dtype {kv_cache_dtype} is not for MLA models, whose FP8 cache is fp8_ds_mla; use fp8, which means it."
        )
    fields = Field("latent", (rank,), wide), Field("rope", (rope,), wide)
    return KVCacheSpec(fields, interleaved=True, name=str(wide).removeprefix("torch."))


def index_spec(dim: int, fp8_dtype: torch.dtype, *, wide: bool) -> KVCacheSpec:
    """The indexer's keys: FP8 codes and a scale, 132 bytes for 128 values, all codes of a block first. `wide`: FP32 keys."""
    if wide:
        return KVCacheSpec((Field("index_k", (dim,), torch.float32),), name="float32 index keys")
    fields = Field("index_k", (dim,), fp8_dtype), Field("index_scale", (1,), torch.float32)
    return KVCacheSpec(fields, name="FP8 index keys")


def gather(views: Views, block_ids: Tensor) -> Views:
    """Views of a copy of the blocks `block_ids` [n]. Whole blocks are copied as byte rows, so all fields come at once."""
    any_view = next(iter(views.values()))
    rows = torch.empty(0, dtype=torch.uint8, device=any_view.device).set_(any_view.untyped_storage())
    rows = rows.view(any_view.shape[0], -1).index_select(0, block_ids)
    return {
        name: rows.view(v.dtype).as_strided((len(block_ids), *v.shape[1:]), v.stride(), v.storage_offset())
        for name, v in views.items()
    }


class KVCache:
    """The cache of all layers: one byte buffer per layer, all indexed by the same block ids."""

    def __init__(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.buffers = [_zeros(num_blocks, block_size * spec.bytes_per_token, device) for spec in specs]
        self.views = [spec.views(buffer, block_size) for spec, buffer in zip(specs, self.buffers, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


def _zeros(rows: int, width: int, device: torch.device) -> Tensor:
    """A zeroed buffer. Attention multiplies memory past a request's end by 0, and 0 times a stray NaN would be NaN."""
    if device.type != "cpu":
        return torch.zeros(rows, width, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, rows * width)  # the kernel provides zeroed pages, each when it is first written
    return torch.frombuffer(pages, dtype=torch.uint8).view(rows, width)
