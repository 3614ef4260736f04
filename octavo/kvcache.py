"""How one token of KV cache is stored, as data, and the cache that is laid out by it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Field", "KVCache", "KVCacheSpec", "LayerCache", "Layout", "gather", "spec_for"]

Views = dict[str, Tensor]


class LayerCache(NamedTuple):
    """One layer's keys and values: typed views [num_blocks, block_size, heads, ...], and what an FP8 cache's codes are
    multiplied by: FP32 on the cache's device, [1] for the layer or [kv_heads].

    Kernels read the scales where they lie, so that a scale can change under a captured graph. A cache of another dtype, or
    with a scale of its own for each token and head (in `views`), is read without them.
    """

    views: Views
    k_scale: Tensor
    v_scale: Tensor


@dataclass(frozen=True)
class Field:
    """One array of the cache: its name, its shape for one token, its dtype.

    In memory a block's array has the axes of `shape`, and before axis `tokens_at` of them the block's tokens. The view has the
    tokens first, wherever they are.
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
    """What one token of one layer takes. In a block each field is one array; interleaved, a token's fields are adjacent."""

    fields: tuple[Field, ...]
    interleaved: bool = False

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
    MATRIX_UNIT = "plain, but FP8 values with the tokens last, over which an FP8 matrix unit sums"

    @staticmethod
    def on(cpu: bool) -> Layout:
        """What the kernels of such a device read best."""
        return Layout.BY_HEAD if cpu else Layout.MATRIX_UNIT

    def tokens_at(self, fp8: bool) -> tuple[int, int]:
        """Of keys and of values [heads, dim]."""
        if self is Layout.BY_HEAD:
            return 1, 1
        return 0, 2 if self is Layout.MATRIX_UNIT and fp8 else 0


def spec_for(
    kv_cache_dtype: str, heads: int, dim: int, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout = Layout.PLAIN
) -> KVCacheSpec:
    """The spec that a canonical `--kv-cache-dtype` names; `dtype` is the model's and `fp8_dtype` the device's.

    `fp8_per_token_head` keeps an FP32 scale for each token and head beside the codes; other FP8 has one for the keys and one
    for the values of a layer, kept outside the cache.
    """
    wide = {"auto": dtype, "bfloat16": torch.bfloat16}.get(kv_cache_dtype)
    stored = wide or (torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else fp8_dtype)
    fields = [Field(name, (heads, dim), stored, at) for name, at in zip("kv", layout.tokens_at(wide is None), strict=True)]
    if kv_cache_dtype == "fp8_per_token_head":
        fields += [Field(name, (heads,), torch.float32) for name in ("k_scale", "v_scale")]
    return KVCacheSpec(tuple(fields))


def gather(views: Views, block_ids: Tensor) -> Views:
    """Views of a copy of the blocks `block_ids` [n], all fields at once: whole blocks are copied as rows of bytes."""
    any_view = next(iter(views.values()))
    rows = torch.empty(0, dtype=torch.uint8, device=any_view.device).set_(any_view.untyped_storage())
    rows = rows.view(any_view.shape[0], -1).index_select(0, block_ids)
    return {
        name: rows.view(v.dtype).as_strided((len(block_ids), *v.shape[1:]), v.stride(), v.storage_offset())
        for name, v in views.items()
    }


class KVCache:
    """The cache of all layers: one byte buffer a layer, all indexed by the same block ids."""

    def __init__(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.buffers = [_zeros(num_blocks, block_size * spec.bytes_per_token, device) for spec in specs]
        self.views = [spec.views(buffer, block_size) for spec, buffer in zip(specs, self.buffers, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


def _zeros(rows: int, width: int, device: torch.device) -> Tensor:
    """Zeros, because attention multiplies what lies past a request's end by 0, which a stray NaN would survive."""
    if device.type != "cpu":
        return torch.zeros(rows, width, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, rows * width)  # the kernel hands out zeroed pages, and only as they are first written
    return torch.frombuffer(pages, dtype=torch.uint8).view(rows, width)
