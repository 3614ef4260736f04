"""ctypes bindings of the C kernels: signatures, structs as in csrc/types.h, and dtypes as their enums."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch

from octavo.platform import cpu_kernels

__all__ = [
    "KINDS", "PACKED_INT4", "REPLAYED", "WAYS", "Cache", "Linear", "Shared", "kernels", "merged_call", "missing", "use", "used",
    "way_of",
]  # fmt: skip

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 3, torch.float8_e4m3fnuz: 4, torch.float8_e5m2: 5}
PACKED_INT4 = 2
WAYS = ("FP32", "pairs", "tiles")  # how a product may be computed: csrc/products.h


P, I64, I32, F = c_void_p, c_int64, c_int32, c_float


class Linear(Structure):
    _fields_ = [
        ("weight", P), ("scale", P), ("group_scale", P), ("n", I64), ("k", I64), ("stride", I64), ("scale_rows", I64),
        ("scale_columns", I64), ("group", I64), ("kind", I32), ("activation", I32), ("group_kind", I32), ("tiled", I32),
    ]  # fmt: skip


class Cache(Structure):
    _fields_ = [
        ("k", P), ("v", P), ("k_scale", P), ("v_scale", P), ("k_layer", P), ("v_layer", P), ("block", I64), ("token", I64),
        ("head", I64), ("scale_block", I64), ("scale_token", I64), ("k_layer_head", I64), ("v_layer_head", I64), ("kind", I32),
        ("block_size", I32), ("kv_heads", I32), ("dim", I32),
    ]  # fmt: skip


class Shared(Structure):
    _fields_ = [
        ("values", P), ("rope", P), ("scale", P), ("block", I64), ("token", I64), ("rope_block", I64), ("rope_token", I64),
        ("scale_block", I64), ("scale_token", I64), ("kind", I32), ("rope_kind", I32), ("block_size", I32), ("width", I32),
        ("rope_width", I32),
    ]  # fmt: skip


class Call(Structure):
    _fields_ = [("kernel", I64), ("word", I64 * 24)]


# The kernels that csrc/replay.h can replay, by their index there.
REPLAYED = (
    "octavo_linear", "octavo_look_up", "octavo_attention", "octavo_rms_norm", "octavo_silu_mul", "octavo_argmax",
    "octavo_rotate", "octavo_rope_write_kv", "octavo_experts", "octavo_route", "octavo_dispatch", "octavo_combine",
    "octavo_write_latent", "octavo_write_index_keys", "octavo_head_linear", "octavo_latent_attention", "octavo_select_keys",
    "octavo_round_keys",
)  # fmt: skip

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "octavo_replay": (I32, [P, I64]),
    "octavo_use": (c_char_p, [c_char_p]),
    "octavo_used": (c_char_p, []),
    "octavo_not_finite": (I32, [P, I64, I32]),
    "octavo_linear": (I32, [P, P, I64, I64, P, I32, I32]),
    "octavo_look_up": (None, [P, P, P, I64, I32, I32]),
    "octavo_way": (I32, [I32, I64]),
    "octavo_attention": (I32, [P] * 6 + [I64] * 6 + [F, F, I32, I32]),
    "octavo_rms_norm": (None, [P] * 5 + [I64] * 5 + [F, I32, I32]),
    "octavo_silu_mul": (None, [P, P, I64, I64, I64, I32, I32]),
    "octavo_argmax": (None, [P, P, I64, I64, I64, I32, I32]),
    "octavo_sample": (None, [P] * 7 + [I64, I64, I32]),
    "octavo_rotate": (None, [P] * 4 + [I64] * 6 + [I32, I32]),
    "octavo_round_columns": (None, [P] * 5 + [I64] * 4 + [I32]),
    "octavo_descend": (None, [P] * 4 + [I64] * 5 + [I32]),
    "octavo_scale_errors": (None, [P] * 5 + [I64] * 5 + [I32]),
    "octavo_round_keys": (None, [P] * 5 + [I64] * 6 + [I32] * 3),
    "octavo_add_gram": (I32, [P, P, I64, I64, I64, I32, I32]),
    "octavo_rope_write_kv": (None, [P] * 10 + [I64] * 9 + [F, I32, I32]),
    "octavo_experts": (I32, [P, I64, I64, P, I64, P, P, I64, I64, P, I32, I32]),
    "octavo_route": (I32, [P] * 8 + [I64] * 8 + [F] + [I32] * 5),
    "octavo_dispatch": (None, [P] * 4 + [I64] * 2),
    "octavo_combine": (None, [P] * 5 + [I64] * 3 + [I32] * 2),
    "octavo_write_latent": (None, [P] * 6 + [I64] * 3 + [F] + [I32] * 3),
    "octavo_write_index_keys": (None, [P] * 7 + [I64] * 3 + [F] + [I32] * 3),
    "octavo_head_linear": (None, [P] * 5 + [I64] * 12 + [I32] * 4),
    "octavo_latent_attention": (I32, [P] * 7 + [I64] * 6 + [F] + [I32] * 2),
    "octavo_select_keys": (I32, [P] * 9 + [I64] * 9 + [I32] * 3),
}


@cache
def kernels() -> ctypes.CDLL:
    """The loaded library, with the best instruction set selected. It must exist: see `missing`."""
    library = cpu_kernels()
    assert isinstance(library, ctypes.CDLL), library
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.octavo_use(None)
    return library


def merged_call(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> tuple[Any, tuple[Any, ...]]:
    """One library call that replays these calls of kernels (all in REPLAYED) with their arguments."""
    made = (Call * len(calls))()
    for call, (function, arguments) in zip(made, calls, strict=True):
        call.kernel = REPLAYED.index(function.__name__)
        call.word[: len(arguments)] = [_word(kind, value) for kind, value in zip(function.argtypes, arguments, strict=True)]
    return kernels().octavo_replay, (made, len(calls))


def _word(kind: type, value: Any) -> int:
    if kind is c_float:
        return int.from_bytes(struct.pack("<f", value), "little")
    if value is None:
        return 0
    return value if isinstance(value, int) else ctypes.addressof(value._obj)  # a number, an address, or a byref object


def missing() -> str | None:
    """None, or the reason why the kernels are not available."""
    library = cpu_kernels()
    return library if isinstance(library, str) else None


def use(instruction_set: str | None) -> str | None:
    """Select an instruction set: "amx", "avx512_bf16", "avx512", "avx2_shift", "avx2", "portable", or None for the best.

    Returns its name, or None if this CPU lacks it.
    """
    name: bytes | None = kernels().octavo_use(None if instruction_set is None else instruction_set.encode())
    return None if name is None else name.decode()


def used() -> str:
    """The selected instruction set."""
    name: bytes = kernels().octavo_used()
    return name.decode()


def way_of(dtype: torch.dtype, tokens: int) -> str:
    """How a weight of `dtype` is multiplied by so many tokens that are exact in BF16, one of WAYS."""
    return WAYS[kernels().octavo_way(KINDS[dtype], tokens)]
