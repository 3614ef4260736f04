"""The one-launch decoder: which decoders csrc/decoder_megakernel.cu supports, and its arguments."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import partial

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.ops.contract import DecoderParts
from octavo.ops.gpu import PackedScaledMM, PackedWeightOnly
from octavo.ops.hopper.cache_blocks import per_token_head, scales
from octavo.ops.hopper.compile import Kernel, compile_cubin
from octavo.ops.hopper.megakernel_layers import has_two_codes, packed_weights, unfit
from octavo.ops.triton import launch
from octavo.ops.triton.decode import LOG2E
from octavo.platform import Platform

__all__ = ["DecoderMegakernel", "refusal"]

# Maximum number of tokens, as in decoder_megakernel.cu. For 2, layer_megakernel.cu is faster (2,914 µs instead of 3,075).
MAX_TOKENS = 4
LONGEST = 4096  # tokens of context; for longer ones a dedicated kernel reads the cache faster


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "o", "gate_up", "down", "qkv_scale", "o_scale", "gate_up_scale", "down_scale",
                                        "input_norm", "post_norm", "q_norm", "k_norm", "qkv_bias", "k", "v", "k_scale",
                                        "v_scale")),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("layers", "x", "residual", "qkv", "attended", "between", "after", "act", "amax",
                                        "parts", "counters", "rotary_rows", "slots", "lengths", "tables", "cos_sin")),
        *((name, c_int64) for name in ("table_stride", "block_stride", "k_token_stride", "v_token_stride", "v_head_stride",
                                       "v_dim_stride", "scale_block_stride", "scale_token_stride", "scale_head_stride")),
        ("num_layers", c_int32), ("eps", c_float), ("softmax_scale", c_float),
    ]  # fmt: skip


def refusal(parts: DecoderParts, platform: Platform) -> str | None:
    """None, or the reason why this decoder's steps do not run as one launch."""
    if not platform.has_bulk_copies:
        return f"{platform.arch} has no bulk copies that a thread need not wait for"
    if (reason := unfit(parts, (PackedScaledMM, PackedWeightOnly))) is not None:
        return reason
    first = parts.layers[0]
    views, dim, group = first.cache.views, parts.head_dim, parts.heads // parts.kv_heads
    k, v = views["k"], views["v"]
    if any(size % 64 for size in (parts.hidden, parts.inter, parts.heads * dim)):
        return "a dimension is not a multiple of 64"
    if dim not in (32, 64, 128, 256) or parts.cos_sin.shape[1] != dim or group > 8:
        return f"heads of {dim} dimensions, {parts.cos_sin.shape[1]} of them rotated, {group} a key head"
    if k.dtype not in (torch.bfloat16, torch.float8_e4m3fn) or k.shape[1] % 16:
        return "the cache is neither BF16 nor e4m3, in blocks of a multiple of 16 tokens"
    if "k_scale" not in views and max(scale.numel() for layer in parts.layers for scale in layer.cache[1:]) > 1:
        return "scales a head are Triton's"
    if len({(layer.cache.views["k"].dtype, *layer.cache.views) for layer in parts.layers}) > 1:
        return "its layers have caches of different dtypes"
    if len({layer.window for layer in parts.layers}) > 1:
        return "its layers have different windows"
    if k.dtype is not torch.bfloat16 and v.stride(1) != 1:
        return "the cache's FP8 values do not have their tokens last"
    if parts.kv_heads > platform.multiprocessors:
        return "more key heads than multiprocessors"
    if max(parts.hidden, parts.inter, parts.heads * dim) << has_two_codes(parts) > platform.shared_memory // 2:
        return "activations that leave no room for weights on a multiprocessor"
    return None


class DecoderMegakernel:
    """All layers of a decoder in one launch, for a step of one request and one token with a context up to LONGEST tokens.

    `parts` must be accepted by `refusal`, with caches bound. Raises NoKernel.
    """

    name = "one launch, csrc/decoder_megakernel.cu"
    attends = True

    def __init__(self, parts: DecoderParts, platform: Platform):
        self.parts, self.platform, self.device = parts, platform, platform.device
        self.ctas = platform.multiprocessors
        views = parts.layers[0].cache.views
        self.k, self.strides = views["k"], launch.cache_strides(views)
        self.table = self._layers()
        self.kernel = Kernel(compile_cubin("decoder_megakernel.cu", platform.arch, self.options()), "decode_step")
        most, group, dim = MAX_TOKENS, parts.heads // parts.kv_heads, parts.head_dim
        room, zeros = partial(torch.empty, device=self.device), partial(torch.zeros, device=self.device)
        qkv = (parts.heads + 2 * parts.kv_heads) * dim  # 8-byte packets: two values and a flag
        self.sent = [zeros(most, w // 2, dtype=torch.int64) for w in (qkv, parts.heads * dim, parts.hidden, parts.hidden)]
        self.act, self.amax = room(most, parts.inter, dtype=torch.bfloat16), zeros(4, most, dtype=torch.int32)
        self.partial = room(self.ctas * group * (dim + 2), dtype=torch.float32)
        self.counters = zeros(2 + most * parts.kv_heads, dtype=torch.int32)

    def takes(self, requests: int, longest: int) -> bool:
        """Whether a step of this many one-token requests, with contexts up to `longest`, runs as one launch."""
        return requests == 1 and longest <= LONGEST

    def variant(self, requests: int, longest: int) -> None:
        """One launch serves all contexts."""

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """The last layer's output, BF16 [requests, hidden], for embeddings x [requests, hidden]."""
        residual, x = torch.empty_like(x), x.contiguous()
        p = self.parts
        step = _Step(
            self.table.data_ptr(), x.data_ptr(), residual.data_ptr(), *(t.data_ptr() for t in self.sent), self.act.data_ptr(),
            self.amax.data_ptr(), self.partial.data_ptr(), self.counters.data_ptr(), batch.rotary_rows.data_ptr(),
            batch.slot_mapping.data_ptr(), batch.seq_lens.data_ptr(), batch.block_tables.data_ptr(), p.cos_sin.data_ptr(),
            batch.block_tables.stride(0), *self.strides, len(p.layers), p.eps, p.scale * LOG2E,
        )  # fmt: skip
        self.kernel.launch(self.ctas, step)
        return residual

    def options(self) -> dict[str, int | float]:
        """The compile-time constants of decoder_megakernel.cu."""
        p, first = self.parts, self.parts.layers[0]
        return {
            "TOKENS": 1, "TWO_CODES": int(has_two_codes(p)), "HIDDEN": p.hidden, "INTER": p.inter, "HEADS": p.heads,
            "KV_HEADS": p.kv_heads, "DIM": p.head_dim, "BLOCK_SIZE": self.k.shape[1],
            "KV_FP8": int(self.k.dtype is not torch.bfloat16), "PER_TOKEN_HEAD": int(per_token_head(first.cache)),
            "WINDOW": first.window or 0, "HEAD_NORMS": int(first.norms is not None),
            "QKV_BIAS": int(first.qkv_bias is not None), "CTAS": self.ctas, "LONGEST": LONGEST,
            "SHARED": self.platform.shared_memory,
        }  # fmt: skip

    def _layers(self) -> Tensor:
        """The table of the layers' pointers that decoder_megakernel.cu reads: bytes on the device."""
        made = [
            _Layer(
                *(w.weight.data_ptr() for w in packed_weights(layer)), *(w.scale.data_ptr() for w in packed_weights(layer)),
                *(None if t is None else t.data_ptr() for t in (
                    layer.input_norm, layer.post_norm, *(layer.norms[:2] if layer.norms else (None, None)), layer.qkv_bias,
                    layer.cache.views["k"], layer.cache.views["v"], *scales(layer.cache))),
            ) for layer in self.parts.layers
        ]  # fmt: skip
        data = b"".join(bytes(one) for one in made)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
