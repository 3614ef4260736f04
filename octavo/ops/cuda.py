"""The ops of NVIDIA GPUs: CUDA and Triton kernels with overlapped launches; torch's library for products of many tokens."""

from __future__ import annotations

import logging
from typing import Any, cast

from octavo.ops import gpu, hopper
from octavo.ops.contract import DecoderParts, DenseParts, ExpertLayerParts, FusedDecoder, MixtureParts
from octavo.ops.gpu import (
    Int4Experts,
    absorbed_queries,
    argmax,
    captures_segments,
    combine,
    combine_norm_quantize,
    dispatch,
    expanded_attention,
    gelu,
    head_linear,
    latent_attention,
    layer_norm,
    rms_norm,
    rope_write_kv,
    rotate,
    sample,
    segment_attention,
    select_keys,
    silu_mul,
    write_index_keys,
    write_latent,
)
from octavo.ops.hopper import (
    block_gate_up_silu,
    block_gemm,
    cache_blocks,
    few_tokens,
    gate_up_silu,
    layer_megakernel,
    moe_decode,
    qkv_rope_kv_write,
)
from octavo.ops.hopper.all_reduce import all_reduce, all_reduce_norm_quantize, argmax_over_ranks, connect
from octavo.ops.hopper.attention import attend, attention, decode_variant
from octavo.ops.hopper.compile import NoKernel
from octavo.ops.hopper.experts import fused_experts
from octavo.ops.hopper.gate_up_silu import gated_linear
from octavo.ops.hopper.qkv_rope_kv_write import project
from octavo.ops.hopper.route import route
from octavo.ops.triton import launch
from octavo.ops.triton.launch import compile_ahead, compile_elsewhere
from octavo.ops.triton.round_columns import round_columns
from octavo.ops.triton.round_keys import rope_write_rounded_kv, round_keys
from octavo.platform import Platform, capture
from octavo.quant import QTensor

log = logging.getLogger(__name__)

__all__ = [
    "LINEAR", "STACKS", "absorbed_queries", "all_reduce", "all_reduce_norm_quantize", "argmax", "argmax_over_ranks",
    "attend", "attention", "capture", "captures_segments", "combine", "combine_norm_quantize", "compile_ahead",
    "compile_elsewhere", "configure", "connect", "decode_variant", "dispatch", "expanded_attention", "fuse", "fused_experts",
    "gated_linear", "gelu", "head_linear", "latent_attention", "layer_norm", "project", "rms_norm", "rope_write_kv",
    "rope_write_rounded_kv", "rotate", "round_columns", "round_keys", "route", "sample", "segment_attention", "select_keys",
    "silu_mul", "write_index_keys", "write_latent",
]  # fmt: skip

OF_EXPERTS = hopper.experts.KERNELS, hopper.experts.QUANTIZE, hopper.route.KERNELS
LINEAR = [
    few_tokens.ScaledMM(),
    block_gemm.Blocks(block_gemm.KERNELS, block_gate_up_silu.KERNELS, qkv_rope_kv_write.BLOCK_KERNELS),
    *gpu.LINEAR,
]


def configure(platform: Platform) -> None:
    """Configure the launchers, and compile the kernels that depend on no model; those of experts when a model has some."""
    launch.configure(platform)
    hopper.attention.configure(platform)
    for module in (gate_up_silu, qkv_rope_kv_write):
        module.KERNELS.configure(platform)
    for kernels in OF_EXPERTS:
        kernels.configure(platform, now=False)


class Grouped(gpu.Grouped):
    """As the base class; the kernels of experts are compiled while a model's stacks are loaded."""

    def pack(self, q: QTensor, platform: Platform) -> gpu.PackedGrouped:
        for kernels in OF_EXPERTS:
            kernels.configure(platform)
        return super().pack(q, platform)


STACKS = [Grouped(), Int4Experts()]


def _compile_for_cache(parts: DecoderParts[Any], platform: Platform) -> None:
    """Start compiling what a cache with a scale for each token and head needs, which `configure` does not know of."""
    first = parts.layers[0]
    if cache_blocks.per_token_head(first.cache):
        by_tile = isinstance(first.qkv, block_gemm.PackedBlocks)
        project = qkv_rope_kv_write.PER_TOKEN_HEAD_BLOCK_KERNELS if by_tile else qkv_rope_kv_write.PER_TOKEN_HEAD_KERNELS
        for kernels in (project, hopper.attention.PER_TOKEN_HEAD_PREFILL, hopper.attention.PER_TOKEN_HEAD_DECODE):
            kernels.configure(platform)


def fuse(parts: DenseParts | MixtureParts, platform: Platform) -> FusedDecoder | str:
    """The megakernel decoder for decode steps of few requests, or the reason why these run op by op."""
    _compile_for_cache(parts, platform)
    try:
        if isinstance(parts.layers[0], ExpertLayerParts):
            mixture = cast("MixtureParts", parts)
            return moe_decode.refusal(mixture, platform) or moe_decode.MoeMegakernels(mixture, platform)
        dense = cast("DenseParts", parts)
        return layer_megakernel.refusal(dense, platform) or layer_megakernel.LayerMegakernels(dense, platform)
    except NoKernel as error:
        log.warning("decode steps of few requests go op by op: %s", error)
        return str(error).splitlines()[0]
