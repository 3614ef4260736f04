"""Decode steps of a few requests through layers with a mixture of experts, in two launches a layer: attention, and everything
between two layers' attention, csrc/moe_decode.cu.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_ubyte, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.ops.contract import ExpertLayerParts, LayerParts, MixtureParts, PackedStack, PackedWeight
from octavo.ops.gpu import PackedBlocks, PackedGrouped, PackedScaledMM
from octavo.ops.hopper import few_requests
from octavo.ops.hopper.compile import no_warpgroups, tensor_map
from octavo.ops.hopper.layer_by_layer import LayerByLayer
from octavo.platform import Platform

__all__ = ["COLUMNS", "MoeMegakernels", "refusal"]

COLUMNS = (1, 4, 8)  # tokens that the kernel is compiled for; with block scales up to 4, since 8 were not timed
STEP, ROWS, STAGE_STEPS, LEAST_STAGES = 128, 16, 8, 4  # a stage of weights: rows by K steps, as in moe_decode.cu
BARRIERS = 4 * 32  # grid barriers of a launch, a cache line each


class _Between(ctypes.Structure):
    _fields_ = [
        ("maps", c_ubyte * 128 * 4), ("scales", c_void_p * 4),
        *((name, c_void_p) for name in ("attended", "residual", "middle", "out", "o_out", "down_out", "logits", "act",
                                        "post_norm", "next_norm", "router", "lengths", "grid_barriers")),
        ("tokens", c_int32), ("eps", c_float), ("router_scale", c_float), ("padding", c_ubyte * 44),  # to a multiple of 64
    ]  # fmt: skip


def refusal(parts: MixtureParts, platform: Platform) -> str | None:
    """None, or the reason why this decoder's steps are not made of such launches."""
    if (reason := no_warpgroups(platform)) is not None:
        return reason
    if parts.ranks > 1:
        return "several ranks share each layer"
    for layer in parts.layers:
        if layer.router.sigmoid or layer.router.groups > 1 or layer.correction is not None:
            return "a router that is no plain softmax"
        if not all(_fits(w) for w in layer.weights):
            return "not every weight is FP8 with scales a channel or a tile of 128x128"
        if layer.qkv_bias is not None:
            return "a bias of queries, keys and values"
    if len({_by_tile(w) for layer in parts.layers for w in layer.weights}) > 1:
        return "its weights have scales of both kinds"
    first = parts.layers[0]
    if first.input_norm.dtype is not torch.bfloat16 or first.gate.dtype is not torch.bfloat16:
        return f"the model is {first.input_norm.dtype}"
    experts = first.gate_up.experts
    if experts > platform.multiprocessors or first.router.top_k > 32:
        return "more experts than multiprocessors"
    if any(size % STEP for size in (parts.hidden, parts.inter, parts.heads * parts.head_dim)):
        return f"a dimension is not a multiple of {STEP}"
    if not columns_of(parts, platform):
        return "activations that leave no room for weights in shared memory"
    return None


def columns_of(parts: MixtureParts, platform: Platform) -> list[int]:
    """Those of COLUMNS whose activations leave room for weights in shared memory."""
    first, stage = parts.layers[0], STAGE_STEPS * STEP
    scales = max(parts.hidden, parts.heads * parts.head_dim) // STEP if _by_tile(first.down) else 1

    def room(tokens: int) -> int:
        pairs = 8 * -(-tokens * first.router.top_k // 8)
        inputs = max(32 << 10, 8 * parts.hidden, pairs * stage * -(-parts.inter // stage))
        state = first.gate_up.experts * (4 * tokens + 9) + 32 * scales + pairs * (4 * parts.inter // STEP + 6) + (10 << 10)
        return platform.shared_memory - 1024 - inputs - state

    allowed = COLUMNS[:2] if _by_tile(first.down) else COLUMNS
    return [n for n in allowed if room(n) >= LEAST_STAGES * ROWS * stage]


def _fits(w: PackedWeight | PackedStack) -> bool:
    if isinstance(w, PackedGrouped):
        return w.reads is not None and w.weight.shape == (w.experts, w.n, w.k)
    return isinstance(w, PackedScaledMM | PackedBlocks) and w.n == w.weight.shape[0] and w.n % ROWS == 0


def _stored(w: PackedWeight | PackedStack) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight that `refusal` accepts."""
    assert isinstance(w, PackedGrouped | PackedScaledMM | PackedBlocks)
    assert w.scale is not None
    return w.weight, w.scale


def _by_tile(w: PackedWeight | PackedStack) -> bool:
    return w.by_tile if isinstance(w, PackedGrouped) else isinstance(w, PackedBlocks)


def dense_map(weight: Tensor) -> bytes:
    """Tensor map of codes [N, K] in boxes [STAGE_STEPS, ROWS, STEP]."""
    n, k = weight.shape
    return tensor_map(weight, (STEP, n, k // STEP), (k, STEP), (STEP, ROWS, STAGE_STEPS))


def gate_up_map(weight: Tensor) -> bytes:
    """Tensor map of codes [E, 2I, K] in boxes [STAGE_STEPS, 2, ROWS / 2, STEP] of an expert."""
    experts, n, k = weight.shape
    sizes, strides = (STEP, n // 2, 2, k // STEP, experts), (k, n // 2 * k, STEP, n * k)
    return tensor_map(weight, sizes, strides, (STEP, ROWS // 2, 2, STAGE_STEPS, 1))


def down_map(weight: Tensor) -> bytes:
    """Tensor map of codes [E, N, K] in boxes [STAGE_STEPS, ROWS, STEP] of an expert."""
    experts, n, k = weight.shape
    return tensor_map(weight, (STEP, n, k // STEP, experts), (k, STEP, n * k), (STEP, ROWS, STAGE_STEPS, 1))


class MoeMegakernels(LayerByLayer[ExpertLayerParts]):
    """A decoder's layers for steps of up to 8 one-token requests.

    `parts` must be accepted by `refusal`, with caches bound. Raises NoKernel.
    """

    name = "a launch between attentions, csrc/moe_decode.cu"

    def __init__(self, parts: MixtureParts, platform: Platform):
        super().__init__(parts, platform)
        few_requests.KERNELS.configure(platform)
        self.layers, self.columns = parts.layers, columns_of(parts, platform)
        most = self.columns[-1]
        self.qkv_rows = (parts.heads + 2 * parts.kv_heads) * parts.head_dim
        self.kernels = self.compiled("moe_decode.cu", "between_moe_attentions", self.options())
        experts, caches = self.layers[0].gate_up.experts, [layer.cache for layer in self.layers]
        self.next_caches = dict(zip(map(id, self.layers), (*caches[1:], None), strict=True))
        empty = partial(torch.empty, device=platform.device)
        self.middle, self.o_out, self.down_out = empty(3, most, parts.hidden, dtype=torch.bfloat16)
        self.logits = empty(most, experts, dtype=torch.float32)
        self.act = empty(experts, most, parts.inter, dtype=torch.bfloat16)
        self.grid_barriers = torch.zeros(len(self.layers), BARRIERS, dtype=torch.int32, device=platform.device)
        stored = [[_stored(w) for w in (layer.o, layer.gate_up, layer.down, layer.qkv)] for layer in self.layers]
        makers = dense_map, gate_up_map, down_map, dense_map
        self.maps = [[make(codes) for make, (codes, _) in zip(makers, of_layer, strict=True)] for of_layer in stored]
        self.scales = [[scale.data_ptr() for _, scale in of_layer] for of_layer in stored]

    def variant(self, requests: int, longest: int) -> int | None:
        return few_requests.splits_of(requests * self.parts.kv_heads, longest)

    def _attend(self, layer: LayerParts[Any], qkv: Tensor, batch: ForwardBatch) -> Tensor:
        found = few_requests.attend(*self.attention_of(layer, qkv, batch), max(batch.context_lens), self.next_caches[id(layer)])
        return super()._attend(layer, qkv, batch) if found is None else found.flatten(1)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return self.run(x, batch, partial(self.between, lengths=batch.seq_lens))

    def between(self, at: int, attended: Tensor, residual: Tensor, lengths: Tensor) -> Tensor:
        """Everything between the attention of layer `at` and the next: attended [tokens, heads * dim] -> the next qkv [tokens,
        ...].

        After the last layer the result is undefined. `residual` [tokens, hidden] is updated in place. lengths: INT32 [tokens]
        of the contexts; a row of length 0 pads a graph.
        """
        tokens, layer = len(residual), self.layers[at]
        after = (at + 1) % len(self.layers)  # the last layer's launch ignores the arguments of the first layer
        qkv = torch.empty(tokens, self.qkv_rows, dtype=torch.bfloat16, device=residual.device)
        maps = b"".join([*self.maps[at][:3], self.maps[after][3]])
        arguments = _Between(
            (c_ubyte * 128 * 4).from_buffer_copy(maps), (c_void_p * 4)(*self.scales[at][:3], self.scales[after][3]),
            attended.data_ptr(), residual.data_ptr(), self.middle.data_ptr(), qkv.data_ptr(), self.o_out.data_ptr(),
            self.down_out.data_ptr(), self.logits.data_ptr(), self.act.data_ptr(), layer.post_norm.data_ptr(),
            self.layers[after].input_norm.data_ptr() if after else None, layer.gate.data_ptr(), lengths.data_ptr(),
            self.grid_barriers[at].data_ptr(), tokens, self.parts.eps, layer.router.scale,
        )  # fmt: skip
        self.kernels[next(n for n in self.columns if tokens <= n)].launch(self.ctas, arguments, early=True)
        return qkv

    def options(self) -> dict[str, int | float]:
        """The compile-time constants of moe_decode.cu, without the number of tokens."""
        p, first = self.parts, self.layers[0]
        return {
            "HIDDEN": p.hidden, "INTER": p.inter, "WIDE": p.heads * p.head_dim, "QKV": self.qkv_rows,
            "EXPERTS": first.gate_up.experts, "TOP_K": first.router.top_k, "NORMALIZE": int(first.router.normalize),
            "BLOCKS": int(_by_tile(first.down)), "CTAS": self.ctas, "SHARED": self.platform.shared_memory,
        }  # fmt: skip
