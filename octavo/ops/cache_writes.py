"""The contracts of the ops that write keys and values to the cache; `octavo.ops` has them among the others.

Implementations of `write_kv` and `rope_write_kv` round to nearest. Where keys are to be rounded otherwise, `round_keys` has
made them values that rounding to nearest keeps, so that no writer and no reader of the cache knows of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kvcache import KeyRounding, LayerCache
from octavo.ops.bound import bound
from octavo.ops.contract import Rope

__all__ = ["CARRIED", "composed_rope_write_rounded_kv", "rope_write_kv", "round_keys", "write_kv"]

CARRIED = "keys are rounded by what queries read, which no kernel that writes and reads them does"


def write_kv(cache: LayerCache, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store keys and values [T, H, D] at `slots` [T] (block * block_size + offset) in the dtypes of the cache's views.

    An FP8 cache stores round(k / scale), clamped. The scale is per layer, per head, or, if the cache stores scales, per token
    and head. NaN and infinity are stored as 0: attention multiplies masked values by 0, so the cache must hold finite values.
    With `cache.key_rounding`, keys are rounded as `round_keys` says.
    """
    if cache.key_rounding is not None:
        k = round_keys(k, cache.key_rounding, cache.k_scale, cache.views["k"].dtype)
    bound["write_kv"](cache, slots, k, v)


def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, slots: Tensor) -> Tensor:
    """Norms of the query and key heads, `rotate`, and `write_kv` in one op, between the QKV projection and attention.

    q [T, H, D], k and v [T, H', D]; returns the rotated queries.
    """
    op = "rope_write_kv" if cache.key_rounding is None else "rope_write_rounded_kv"
    return bound[op](q, k, v, rope, cache, slots)  # type: ignore[no-any-return]


def composed_rope_write_rounded_kv(q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, slots: Tensor) -> Tensor:
    """`rope_write_kv` for a cache with `key_rounding`."""
    if (norms := rope.norms) is not None:
        q, k = _normed(q, norms.q, norms.eps), _normed(k, norms.k, norms.eps)
    q, k = (bound["rotate"](x, rope.cos_sin, rope.rows, False) for x in (q, k))
    write_kv(cache, slots, k, v)
    return q


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = bound["rms_norm"](x.reshape(-1, x.shape[2]), weight, eps)[0].values()
    return out.view(x.shape)


def round_keys(k: Tensor, rounding: KeyRounding, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys k [T, H, D] as FP8 codes of `dtype` times `scale`, FP32 [1] or [H]: [T, H, D] in k's dtype.

    A key's dimensions are rounded one after the other, in the order of its head. Step i rounds its dimension, clamped, from
    what k has there less the offset that the steps before gave; then what the result differs from k by, times row i of the
    head's influence, is added to the offsets of all. Sums are FP32; NaN and infinity count as 0. Results are in k's dtype, and
    rounding them to the nearest code gives the code again. A key's codes depend on the key alone.
    """
    return bound["round_keys"](k, rounding, scale, dtype)  # type: ignore[no-any-return]
