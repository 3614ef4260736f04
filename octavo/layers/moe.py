"""Mixture of experts: a router sends each token to a few of many gated MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.layers.linear import GatedMLP, InnerSplit
from octavo.weights import Loader
from octavo.weights.loader import Matrices

__all__ = ["Experts", "Gate", "MixtureOfExperts"]


class Gate(nn.Module):
    """The router. Its weight stays in the model's dtype; its scores are FP32.

    `bias`: the path, from this module's parent, of the score correction used for selection; None: no correction.
    """

    reads_siblings = True

    def __init__(self, hidden: int, experts: int, router: ops.Router, *, bias: str | None = None):
        super().__init__()
        self.shape, self.router, self.bias_name = (experts, hidden), router, bias

    def load(self, loader: Loader) -> None:
        self.weight = loader.vector("gate.weight", self.shape)
        self.bias: Tensor | None = None
        if self.bias_name is not None:
            self.bias = loader.vector(self.bias_name, self.shape[:1], dtype=torch.float32)

    def forward(self, x: ops.Activation, batch: ForwardBatch) -> ops.Routed:
        return ops.route(x.values(), self.weight, self.bias, self.router, batch)


class Experts(nn.Module):
    """`count` gated MLPs, `active` of them per token. Each is split over ranks as an MLP is, or, expert-parallel, each rank has
    some of them whole; either way the output is a partial sum.

    `names`: the checkpoint's names of an expert's gate, up and down projections.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        count: int,
        active: int,
        tp: TensorParallel,
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        super().__init__()
        self.local = tp.local_experts(count)
        if not self.local:
            raise OctavoError(
                f"--enable-expert-parallel needs an expert for each rank, and {count} are fewer than {tp.size}; leave it out."
            )
        gate, up, down = names
        over = TensorParallel() if tp.expert_parallel else tp
        self.inner = InnerSplit(intermediate, (gate, up), down, (hidden, hidden), over)
        self.matrices: tuple[Matrices, ...] = ()
        self.count, self.active = count, active

    def load(self, loader: Loader) -> None:
        rows, columns = self.inner.shards(loader, [f"{e}." for e in range(self.count)])
        size, (hidden, _) = self.inner.size, self.inner.outer
        self.matrices = (
            Matrices(self.inner.into, ((size, hidden),) * 2, (rows, rows)),
            Matrices((self.inner.out,), ((hidden, size),), (columns,)),
        )
        self.gate_up, self.down = loader.experts(self.matrices, self.count, self.active, self.local)

    def forward(self, x: ops.Operand, routed: ops.Routed) -> Tensor | ops.Uncombined:
        if len(self.local) < self.count:
            own = routed.experts - self.local.start
            routed = ops.Routed(own.masked_fill((own < 0) | (own >= len(self.local)), -1), routed.weights)
        return ops.experts_uncombined(x, routed, self.gate_up, self.down)


class MixtureOfExperts(nn.Module):
    """The routed experts' weighted sum, plus the shared experts' output if there are any: [T, hidden]."""

    def __init__(self, gate: Gate, experts: Experts, tp: TensorParallel, shared: GatedMLP | None = None):
        super().__init__()
        self.gate, self.experts, self.tp = gate, experts, tp
        self.shared_experts = shared

    @property
    def readers(self) -> tuple[ops.Reader, ...]:
        """Readers of this layer's input. The router (None) reads dense values."""
        shared = self.shared_experts
        return None, self.experts.gate_up, *(() if shared is None else shared.readers)

    def forward(self, x: ops.Activation, batch: ForwardBatch) -> ops.Product:
        y: Tensor | ops.Uncombined = self.experts(x, self.gate(x, batch))
        if self.tp.size == 1 and self.shared_experts is None:
            return y
        y = ops.finished(y)
        if self.shared_experts is not None:
            y = y.add_(self.shared_experts(x))
        return y if self.tp.size == 1 else ops.Unsummed(y, self.tp)
