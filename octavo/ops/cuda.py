"""What an NVIDIA GPU prefers: Triton kernels that overlap their starts, torch's library for products with many tokens."""

from __future__ import annotations

import logging

from octavo.ops.contract import DecoderParts, FusedDecoder
from octavo.ops.gpu import LINEAR, attention, decode_variant, likeliest, rms_norm, rope_write_kv, silu_mul
from octavo.ops.resident.compile import NoKernel
from octavo.ops.resident.decoder import ResidentDecoder, refusal
from octavo.ops.triton import launch
from octavo.ops.triton.launch import compile_ahead
from octavo.platform import Platform, capture

log = logging.getLogger(__name__)

__all__ = [
    "LINEAR", "attention", "capture", "compile_ahead", "configure", "decode_variant", "fuse", "likeliest", "rms_norm",
    "rope_write_kv", "silu_mul",
]  # fmt: skip


def configure(platform: Platform) -> None:
    """Programmatic dependent launch came with sm_90; deep pipelines of asynchronous copies with sm_80."""
    major = int(platform.arch.removeprefix("sm_")[:-1])
    launch.configure(platform, dependent=major >= 9, stages=8)


def fuse(parts: DecoderParts, platform: Platform) -> FusedDecoder | str:
    """The decoder as one launch a step, or why not."""
    if (reason := refusal(parts, platform)) is not None:
        return reason
    try:
        return ResidentDecoder(parts, platform)
    except NoKernel as error:
        log.warning("decode steps of few requests are not one launch: %s", error)
        return str(error).splitlines()[0]
