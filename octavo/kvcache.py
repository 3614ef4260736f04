"""How one token of KV cache is stored, as data, and the cache that is laid out by it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

__all__ = ["Field", "KVCache", "KVCacheSpec", "bf16", "fp8_per_tensor", "fp8_per_token_head", "gather", "spec_for"]

Views = dict[str, Tensor]


@dataclass(frozen=True)
class Field:
    """One array of the cache: its name, its shape for one token, its dtype.

    With `tokens_last` the tokens of a block lie next to each other, each of the shape's elements after the other: as an FP8
    matrix unit takes the values, which it sums over tokens. The view's shape is the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tokens_last: bool = False

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
            token_stride = self.bytes_per_token if self.interleaved else field.nbytes
            start = offset if self.interleaved else offset * block_size
            inner = [prod(field.shape[i + 1 :]) for i in range(len(field.shape))]
            strides = (token_stride // size, *inner)
            if field.tokens_last:
                strides = (1, *(block_size * stride for stride in inner))
            out[field.name] = buffer.view(field.dtype).as_strided(
                (buffer.shape[0], block_size, *field.shape), (buffer.shape[1] // size, *strides), start // size
            )
            offset += field.nbytes
        return out


def bf16(heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> KVCacheSpec:
    """Keys and values as they are, in `dtype`."""
    return KVCacheSpec((Field("k", (heads, dim), dtype), Field("v", (heads, dim), dtype)))


def fp8_per_tensor(heads: int, dim: int, dtype: torch.dtype, tokens_last: bool = False) -> KVCacheSpec:
    """FP8 codes; one scale for the keys and one for the values of a layer, kept outside the cache."""
    return KVCacheSpec((Field("k", (heads, dim), dtype), Field("v", (heads, dim), dtype, tokens_last)))


def fp8_per_token_head(heads: int, dim: int, dtype: torch.dtype, tokens_last: bool = False) -> KVCacheSpec:
    """FP8 codes and one FP32 scale for each token and head, beside them."""
    scales = (Field("k_scale", (heads,), torch.float32), Field("v_scale", (heads,), torch.float32))
    return KVCacheSpec((*fp8_per_tensor(heads, dim, dtype, tokens_last).fields, *scales))


def spec_for(
    kv_cache_dtype: str, heads: int, dim: int, dtype: torch.dtype, fp8_dtype: torch.dtype, tokens_last: bool = False
) -> KVCacheSpec:
    """The spec that a canonical `--kv-cache-dtype` names; `dtype` is the model's and `fp8_dtype` the device's.

    `tokens_last`: FP8 values are laid out for a matrix unit (see Field).
    """
    if kv_cache_dtype == "auto":
        return bf16(heads, dim, dtype)
    if kv_cache_dtype == "bfloat16":
        return bf16(heads, dim)
    if kv_cache_dtype == "fp8_per_token_head":
        return fp8_per_token_head(heads, dim, fp8_dtype, tokens_last)
    return fp8_per_tensor(heads, dim, torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else fp8_dtype, tokens_last)


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
