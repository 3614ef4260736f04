"""The mixture of experts of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), which GLM-4.5 also has.

After the first dense layers, experts are chosen from the best groups by sigmoid with a correction, plus shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from octavo.distributed import TensorParallel
from octavo.layers.linear import GatedMLP
from octavo.layers.moe import Experts, Gate, MixtureOfExperts
from octavo.models.config import ConfigBase, check_experts, expert_activations
from octavo.ops import Router

__all__ = ["MixtureConfig", "mlp_of"]


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(ConfigBase):
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    attention_bias: bool = False
    num_nextn_predict_layers: int = 1

    also_called: ClassVar[Mapping[str, str]] = {
        "n_routed_experts": "num_local_experts",
        "num_nextn_predict_layers": "num_mtp_layers",
    }
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"})

    def check(self) -> None:
        super().check()
        check_experts(self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group)

    def is_dense(self, layer: int) -> bool:
        """Whether the layer has an MLP instead of experts."""
        return layer < self.first_k_dense_replace

    @property
    def mlp_activations(self) -> int:
        experts = expert_activations(self.num_experts_per_tok, self.moe_intermediate_size, self.hidden_size)
        shared = 4 * self.n_shared_experts * self.moe_intermediate_size + self.hidden_size
        return max(super().mlp_activations, experts + shared)

    @property
    def unread_layers(self) -> tuple[str, ...]:
        """Globs of the multi-token-prediction layers after the last, which are not loaded."""
        last = self.num_hidden_layers
        return tuple(f"model.layers.{last + i}.*" for i in range(self.num_nextn_predict_layers))


def mlp_of(c: MixtureConfig, layer: int, tp: TensorParallel) -> GatedMLP | MixtureOfExperts:
    """The MLP or mixture of experts of a layer."""
    if c.is_dense(layer):
        return GatedMLP(c.hidden_size, c.intermediate_size, bias=False, tp=tp)
    router = Router(
        c.num_experts_per_tok, sigmoid=True, normalize=c.norm_topk_prob, scale=c.routed_scaling_factor,
        groups=c.n_group, top_groups=c.topk_group,
    )  # fmt: skip
    gate = Gate(c.hidden_size, c.n_routed_experts, router, bias="gate.e_score_correction_bias")
    experts = Experts(c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok, tp)
    shared = None
    if c.n_shared_experts:
        inner = c.n_shared_experts * c.moe_intermediate_size
        shared = GatedMLP(c.hidden_size, inner, bias=False, tp=tp, partial=True)
    return MixtureOfExperts(gate, experts, tp, shared)
