"""Mixture-of-experts ops on a CPU: C kernels that read only the experts in use, as stored; without them, widened weights."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads

from octavo.batch import ForwardBatch
from octavo.ops import reference
from octavo.ops.contract import FEW_TOKENS, Dispatch, Operand, PackedStack, Routed, Router, values_of
from octavo.ops.cpu.library import KINDS, kernels
from octavo.ops.cpu.linear import Widened, exact_scale, rounded, widened
from octavo.ops.cpu.native import (
    TILE,
    Native,
    held_scale,
    is_readable,
    is_tiled,
    packed_bytes,
    struct_of,
    tiled,
    tiled_shape,
    unsupported,
)
from octavo.ops.cpu.op_recorder import launch
from octavo.platform import Platform
from octavo.quant.qtensor import QTensor

__all__ = ["NativeStack", "WidenedStack", "combine", "dispatch", "route"]


class NativeStack:
    """The C kernels' products by expert stacks."""

    def __init__(self) -> None:
        self.name = Native().name

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return unsupported(q, platform)

    def pack(self, q: QTensor, platform: Platform) -> PackedNativeStack:
        return PackedNativeStack(q)

    def take(self, q: QTensor, platform: Platform) -> PackedNativeStack:
        return PackedNativeStack(q, owned=True)


def tiled_stack(data: Tensor, k: int, owned: bool) -> Tensor:
    """`tiled` of each expert of data [E, N, K']: in `data` itself if it is owned and no expert becomes larger."""
    experts, n, _ = data.shape
    shape = tiled_shape(n, k, data.itemsize)
    in_place = owned and data.is_contiguous() and n % TILE == 0 and data.shape[2] * data.itemsize == shape[1] * TILE
    made = data.view(torch.uint8).view(experts, *shape) if in_place else data.new_empty(experts, *shape, dtype=torch.uint8)
    for e in range(experts):
        if in_place:
            made[e] = tiled(data[e])
        else:
            tiled(data[e, :, :k], made[e])
    return made


class PackedNativeStack(PackedStack):
    """Weights [E, N, K] as stored or each `tiled`, and their scales. owned: nobody else reads `q`, which may be overwritten.

    dtype and activation: as PackedNative's.
    """

    def __init__(self, q: QTensor, owned: bool = False):
        self.experts, self.n, self.k = q.shape
        self.dtype, self.activation = q.data.dtype, q.scheme.activation
        self.data, self.held_bytes = q.data, packed_bytes(q)
        self.scale = held_scale(q)
        first, of_first = q.expert(0), None if self.scale is None else self.scale[0]
        self.struct = self.few = struct_of(first, of_first, FEW_TOKENS + 1)
        if q.scheme.exact_few:
            self.few = struct_of(first, of_first, FEW_TOKENS)
        if is_tiled(q):
            self.data = tiled_stack(q.data, self.k, owned)
            for struct in (self.struct, self.few):
                struct.weight, struct.tiled = self.data.data_ptr(), 1
        scales = 0 if self.scale is None else self.scale.stride(0) * self.scale.itemsize
        self.strides = self.data.stride(0) * self.data.itemsize, scales

    def __call__(self, x: Operand, dispatch: Dispatch, *, of_tokens: bool) -> Tensor:
        x = values_of(x)
        if not is_readable(x):
            x = x.contiguous()
        y = x.new_empty(len(dispatch.order), self.n)
        first = ctypes.addressof(self.few if dispatch.tokens <= FEW_TOKENS else self.struct)
        launch(kernels().octavo_experts,
            first, *self.strides, x.data_ptr(), x.stride(0), dispatch.order.data_ptr() if of_tokens else None,
            dispatch.starts.data_ptr(), self.experts, dispatch.top_k, y.data_ptr(), KINDS[x.dtype], get_num_threads(),
        )  # fmt: skip
        return y


class WidenedStack:
    """FP8 or INT4 codes or BF16 values held in `Platform.widened_dtype`; one product per expert."""

    name = "widened codes, torch"

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        return Widened().supports(q, platform)

    def pack(self, q: QTensor, platform: Platform) -> PackedWidenedStack:
        assert platform.widened_dtype is not None
        return PackedWidenedStack(q, platform.widened_dtype)


class PackedWidenedStack(PackedStack):
    """Weights [E, N', K'] widened as in `widened`, and channel scales [E, N]."""

    looks_at_host = True

    def __init__(self, q: QTensor, held: torch.dtype):
        self.experts, self.n, self.k = q.shape
        self.activation, self.of_few, self.fp8_dtype = q.scheme.activation, q.scheme.activation_of(FEW_TOKENS), q.data.dtype
        for e in range(self.experts):
            weight, scale = widened(q.expert(e), held)
            if not e:
                self.weight = weight.new_empty(self.experts, *weight.shape)
                self.scale = None if scale is None else scale.new_empty(self.experts, self.n)
            self.weight[e] = weight
            if scale is not None and self.scale is not None:
                self.scale[e] = scale[0]
        self.held_bytes = self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __call__(self, x: Operand, dispatch: Dispatch, *, of_tokens: bool) -> Tensor:
        x, starts = values_of(x), dispatch.starts.tolist()
        activation = self.of_few if dispatch.tokens <= FEW_TOKENS else self.activation
        by_channel = self.scale if activation is self.activation else exact_scale(self.scale, self.fp8_dtype)
        values, by_token = rounded(x, activation, self.fp8_dtype)
        values = F.pad(values.to(self.weight.dtype), (0, self.weight.shape[2] - self.k))
        if of_tokens:
            tokens = dispatch.order // dispatch.top_k
            values, by_token = values[tokens], None if by_token is None else by_token[tokens]
        y = x.new_empty(len(values), self.n)
        for e, (start, stop) in enumerate(pairwise(starts)):
            if start < stop:
                product = F.linear(values[start:stop], self.weight[e])[:, : self.n]
                if by_channel is not None:
                    product = product.float().mul_(by_channel[e])
                if by_token is not None:
                    product = product.mul_(by_token[start:stop])
                y[start:stop] = product
        return y


def route(x: Tensor, weight: Tensor, bias: Tensor | None, router: Router, batch: ForwardBatch) -> Routed:
    if not (is_readable(x) and is_readable(weight)):
        return reference.route(x, weight, bias, router, batch)
    (tokens, width), count, k = x.shape, len(weight), router.top_k
    lengths = batch.seq_lens if len(batch.seq_lens) == tokens else None
    scores = x.new_empty(tokens, 2 * count + router.groups, dtype=torch.float32)
    found = Routed(x.new_empty(tokens, k, dtype=torch.int32), x.new_empty(tokens, k, dtype=torch.float32))
    launch(kernels().octavo_route,
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), scores.data_ptr(), found.experts.data_ptr(),
        found.weights.data_ptr(), None if batch.live is None else batch.live.data_ptr(),
        None if lengths is None else lengths.data_ptr(), tokens, width, x.stride(0), weight.stride(0), count, k, router.groups,
        router.top_groups, router.scale, router.sigmoid, router.normalize, KINDS[x.dtype], KINDS[weight.dtype],
        get_num_threads(),
    )  # fmt: skip
    return found


def dispatch(experts: Tensor, count: int) -> Dispatch:
    experts, (tokens, top_k) = experts.contiguous(), experts.shape
    order, place = (experts.new_empty(tokens * top_k) for _ in range(2))
    starts = experts.new_empty(count + 1)
    launch(kernels().octavo_dispatch,
        experts.data_ptr(), order.data_ptr(), place.data_ptr(), starts.data_ptr(), len(order), count,
    )  # fmt: skip
    return Dispatch(order, place, starts, top_k)


def combine(y: Tensor, routed: Routed, at: Dispatch) -> Tensor:
    y, experts, weights = y.contiguous(), routed.experts.contiguous(), routed.weights.contiguous()
    out = y.new_empty(len(experts), y.shape[1])
    launch(kernels().octavo_combine,
        y.data_ptr(), out.data_ptr(), experts.data_ptr(), weights.data_ptr(), at.place.data_ptr(), *experts.shape, y.shape[1],
        KINDS[y.dtype], get_num_threads(),
    )  # fmt: skip
    return out
