"""The ops of AMD GPUs: the same Triton kernels, with short pipelines since a compute unit has 64 KiB of LDS for its tiles."""

from __future__ import annotations

from octavo.ops.gpu import (
    LINEAR,
    STACKS,
    absorbed_queries,
    argmax,
    attend,
    attention,
    captures_segments,
    combine,
    decode_variant,
    dispatch,
    expanded_attention,
    gelu,
    head_linear,
    latent_attention,
    layer_norm,
    rms_norm,
    rope_write_kv,
    rotate,
    route,
    sample,
    segment_attention,
    select_keys,
    silu_mul,
    write_index_keys,
    write_latent,
)
from octavo.ops.triton import launch
from octavo.ops.triton.launch import compile_ahead, compile_elsewhere
from octavo.ops.triton.round_keys import rope_write_rounded_kv, round_keys
from octavo.platform import Platform, capture

__all__ = [
    "LINEAR", "STACKS", "absorbed_queries", "argmax", "attend", "attention", "capture", "captures_segments", "combine",
    "compile_ahead", "compile_elsewhere", "configure", "decode_variant", "dispatch", "expanded_attention", "gelu",
    "head_linear", "latent_attention", "layer_norm", "rms_norm", "rope_write_kv", "rope_write_rounded_kv",
    "rotate", "round_keys", "route", "sample",
    "segment_attention", "select_keys", "silu_mul", "write_index_keys", "write_latent",
]  # fmt: skip


def configure(platform: Platform) -> None:
    launch.configure(platform)
