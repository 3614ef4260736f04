"""A router and the sorting of its pairs in one launch, csrc/route.cu, for up to a few hundred tokens."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_void_p

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.ops import gpu
from octavo.ops.contract import Dispatch, Routed, Router
from octavo.ops.hopper.compile import Kernels, no_warpgroups

__all__ = ["EXPERTS", "KERNELS", "choose", "refusal", "route"]

EXPERTS = 128, 256  # most experts of a variant
KERNELS = Kernels("route.cu", "route", "routing is Triton's", ("EXPERTS",), [(n,) for n in EXPERTS])
SPLITS, TOKENS = 8, 16  # CTAs and tokens of a cluster, as in route.cu
MAX_PAIRS, MAX_CHOSEN = 2048, 32  # for more pairs, Triton's two launches are faster (an H200)


class _Route(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "bias", "live", "lengths", "experts", "weights", "order", "place",
                                        "starts", "arrivals")),
        *((name, c_int32) for name in ("tokens", "count", "width", "stride", "top_k", "sigmoid", "normalize")),
        ("scale", c_float),
    ]  # fmt: skip


_arrivals: dict[torch.device, Tensor] = {}


def refusal(x: Tensor, weight: Tensor, router: Router) -> str | None:
    """None, or the reason why route.cu does not route these tokens."""
    if (reason := no_warpgroups(KERNELS.platform)) is not None:
        return reason
    if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
        return "not BF16"
    if router.groups > 1 or router.top_k > MAX_CHOSEN or len(weight) > EXPERTS[-1]:
        return f"groups of experts, more than {MAX_CHOSEN} chosen or {EXPERTS[-1]} in all"
    if not len(x) or len(x) * router.top_k > MAX_PAIRS:
        return f"not 1 to {MAX_PAIRS} pairs of token and expert"
    if x.stride(1) != 1 or x.stride(0) % 8 or x.shape[1] % 8 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return "rows that do not begin at multiples of 16 bytes"
    return None


def choose(x: Tensor, weight: Tensor, bias: Tensor | None, router: Router, batch: ForwardBatch) -> Routed | None:
    """As `ops.route`, with the pairs sorted, for what `refusal` does not refuse; None if the kernel is not available."""
    (tokens, width), count, top_k, device = x.shape, len(weight), router.top_k, x.device
    if (kernel := KERNELS.kernel((next(n for n in EXPERTS if count <= n),), device)) is None:
        return None
    if device not in _arrivals:
        _arrivals[device] = torch.zeros(1, dtype=torch.int32, device=device)  # every launch resets it
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    order, place = (torch.empty(tokens * top_k, dtype=torch.int32, device=device) for _ in range(2))
    at = Dispatch(order, place, torch.empty(count + 1, dtype=torch.int32, device=device), top_k)
    lengths = batch.seq_lens if batch.live is None and len(batch.seq_lens) == batch.num_tokens else None
    given = x, weight, bias, batch.live, lengths, experts, weights, order, place, at.starts, _arrivals[device]
    addresses = (None if t is None else t.data_ptr() for t in given)
    arguments = _Route(
        *addresses, tokens, count, width, x.stride(0), top_k, router.sigmoid, router.normalize, router.scale
    )  # fmt: skip
    kernel.launch(-(-tokens // TOKENS) * SPLITS, arguments, early=True)
    return Routed(experts, weights, at)


def route(x: Tensor, weight: Tensor, bias: Tensor | None, router: Router, batch: ForwardBatch) -> Routed:
    weight = weight.contiguous()
    if (reason := refusal(x, weight, router)) is not None:
        KERNELS.refused(reason)
        return gpu.route(x, weight, bias, router, batch)
    return choose(x, weight, bias, router, batch) or gpu.route(x, weight, bias, router, batch)
