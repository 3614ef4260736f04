"""One layer of a model, whose linear layers are rounded by the inputs that a text gives them.

A layer is a pipeline stage of one layer, so that any architecture that the engine serves runs here by its own modules, and only
one layer is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.batch import ForwardBatch, Span, build
from octavo.convert.cache_scales import SCALES, CacheScales, cache_scale
from octavo.convert.compensated import compensated, forms, symmetric
from octavo.convert.key_rounding import Rounding, key_rounding
from octavo.convert.quantize_plan import Piece
from octavo.convert.row_quantize import peaks, search_errors, searched_scale
from octavo.distributed import TensorParallel
from octavo.kvcache import KVCache, Layout
from octavo.layers.attention import PagedAttention
from octavo.layers.linear import ColumnParallelLinear, RowParallelLinear
from octavo.layers.moe import Experts
from octavo.models import build_model
from octavo.models.interface import ModelInput, StageState
from octavo.platform import Platform
from octavo.quant import QTensor, QuantRules, dequantize
from octavo.quant.formats import WHOLE, read_weight
from octavo.quant.qtensor import expand_scale
from octavo.quant.scheme import BF16, Granularity
from octavo.weights import Loader, SafetensorsSource, load
from octavo.weights.loader import places_of, stored_modules

__all__ = ["CalibratedLayer", "Loss", "State", "together"]

BLOCK_SIZE = 16
TOGETHER = 4  # windows of text in a batch: products of 2,048 tokens take a fifth less time than four of 512 each
FEWEST = 512  # tokens that an expert is rounded by; where fewer are routed to it, others of the text are added
E4M3 = torch.float8_e4m3fn

State = ModelInput | StageState
Linear = ColumnParallelLinear | RowParallelLinear


def together(windows: Sequence[Sequence[int]], device: torch.device) -> list[ForwardBatch]:
    """Batches of TOGETHER windows of token ids each, in the blocks of a cache that each batch has for itself."""
    batches = []
    for at in range(0, len(windows), TOGETHER):
        spans, first = [], 1
        for window in windows[at : at + TOGETHER]:
            spans.append(Span(window, 0, range(first, first := first - len(window) // -BLOCK_SIZE)))
        batches.append(build(spans, BLOCK_SIZE, device))
    return batches


@dataclass(frozen=True)
class Loss:
    """Of some matrices that share their inputs x: the sums of ||x (W' - W)^T||^2, rounded plainly and rounded so, and of
    ||x W^T||^2."""

    plain: float
    calibrated: float
    size: float


class CalibratedLayer:
    """Layer `number` of the checkpoint in `directory`, in the model's own dtype, for what `together` makes of windows, each
    of at most `longest` tokens.

    `pieces`: by module, the matrices that are to be rounded. `made` holds codes e4m3fn [N, K] and scales FP32 as `peaks` shapes
    them, by module, and `losses` what they lose, by the first module of those that share their inputs. `key_rounding`: how the
    layer's keys are rounded in an FP8 cache; None of attention to latents. `cache_scales`: those that `scales` asks for, by the
    names of their tensors.
    """

    def __init__(
        self, directory: Path, config: Mapping[str, Any], number: int, longest: int, platform: Platform,
        pieces: Mapping[str, Piece], scales: CacheScales | None = None,
    ):  # fmt: skip
        self.platform, self.pieces, self.scales = platform, pieces, scales
        self.model = build_model(config, TensorParallel(), longest, range(number, number + 1))
        module = cast("nn.Module", self.model)
        load(module, Loader(SafetensorsSource(directory), platform, QuantRules(), torch.bfloat16), self.model.ignored)
        self.loader = Loader(SafetensorsSource(directory), platform, QuantRules(), torch.bfloat16)
        specs = self.model.kv_specs("auto", torch.bfloat16, platform.fp8_dtype, Layout.on(platform.is_cpu))
        self.cache = KVCache(specs, 1 - TOGETHER * (longest // -BLOCK_SIZE), BLOCK_SIZE, platform.device)
        self.model.bind_cache(self.cache.views)
        self.made: dict[str, tuple[Tensor, Tensor]] = {}
        self.losses: dict[str, Loss] = {}
        self.key_rounding: Rounding | None = None
        self.cache_scales: dict[str, Tensor] = {}

    def close(self) -> None:
        self.loader.source.close()

    @torch.inference_mode()
    def embed(self, batch: ForwardBatch) -> State:
        """What the first layer reads of a batch."""
        return self.model.embed(batch.input_ids)

    @torch.inference_mode()
    def run(self, batch: ForwardBatch, state: State) -> Tensor | State:
        """What the layer makes of a batch's state: the next layer's."""
        own = state._replace(x=state.x.clone())  # layers add to their residual in place
        if isinstance(own, StageState):
            own = own._replace(residual=own.residual.clone())
        return self.model(batch, own)

    @torch.inference_mode()
    def quantize(self, batches: Sequence[ForwardBatch], states: Sequence[State]) -> list[Tensor | State]:
        """Rounds the layer's matrices, and its keys, by what reads them in `states`. Gives what it makes of each, unrounded."""
        modules = self._modules()
        inputs = {path: _Inputs() for path in modules}
        places = places_of(cast("nn.Module", self.model))
        attention = {path: _Attention(one, self.platform.device) for path, one in places if isinstance(one, PagedAttention)}
        handles = [modules[path].register_forward_pre_hook(one.see) for path, one in inputs.items()]
        try:
            after = []
            for batch, state in zip(batches, states, strict=True):
                after.append(self.run(batch, state))
                for seen in attention.values():
                    seen.see()
        finally:
            for handle in handles:
                handle.remove()
        for path, read in attention.items():
            self.key_rounding = key_rounding(read.grams())
            if self.scales is not None and path in self.scales.heads:
                made = (cache_scale(peaks, by_head=self.scales.by_head) for peaks in read.peaks)
                self.cache_scales = {f"{path}.{name}": scale for name, scale in zip(SCALES, made, strict=True)}
        for path, module in modules.items():
            given = inputs.pop(path)
            if isinstance(module, Experts):
                self._experts(path, module, given)
            elif given.hessian is not None:
                self._linear(path, module, symmetric(given.hessian))
        return after

    def _modules(self) -> dict[str, Linear | Experts]:
        """Those that hold matrices to round."""
        return {
            path: module
            for path, module in stored_modules(cast("nn.Module", self.model))
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear, Experts)) and self._names(path, module)
        }

    def _names(self, path: str, module: Linear | Experts) -> list[str]:
        """The matrices of the module that are to be rounded."""
        parent = path.rpartition(".")[0]
        if isinstance(module, Experts):
            names = [f"{path}.{e}.{name}" for e in range(module.count) for one in module.matrices for name in one.names]
        else:
            names = [f"{parent}.{name}" for name in _parts(module)]
        return [name for name in names if name in self.pieces]

    def _linear(self, path: str, linear: Linear, hessian: Tensor) -> None:
        parent = path.rpartition(".")[0]
        self._rounded([f"{parent}.{name}" for name in _parts(linear)], _shapes(linear), hessian)

    def _experts(self, path: str, experts: Experts, inputs: _Inputs) -> None:
        """Each by the tokens that are routed to it, the down projection by what the rounded others make of them."""
        x, routed = torch.cat(inputs.rows), torch.cat(inputs.routed)
        for number in range(experts.count):
            given = _tokens_of(number, routed)
            read = x[given].float()
            for matrices in experts.matrices:
                names = [f"{path}.{number}.{name}" for name in matrices.names]
                weights = self._rounded(names, matrices.shapes, read.T @ read)
                products = [read @ dequantize(w).float().T for w in weights]
                if len(products) == 2:
                    read = torch.nn.functional.silu(products[0]).mul_(products[1]).bfloat16().float()

    def _rounded(self, names: Sequence[str], shapes: Sequence[tuple[int, int]], hessian: Tensor) -> list[QTensor]:
        """The matrices of these modules, which share their inputs. Those that are not to be rounded stay."""
        found = [read_weight(self.loader, name, shape, WHOLE) for name, shape in zip(names, shapes, strict=True)]
        chosen = [i for i, name in enumerate(names) if name in self.pieces]
        dense = {i: (dequantize(w) if isinstance(w := found[i], QTensor) else w).float() for i in chosen}
        scales = {i: _scale(dense[i], self.pieces[names[i]].granularity, hessian.diagonal()) for i in chosen}
        weights = [w if isinstance(w, QTensor) else QTensor(w.bfloat16(), None, BF16, tuple(w.shape)) for w in found]
        if not chosen:
            return weights
        w = torch.cat([dense[i] for i in chosen])
        stored = {i: _per_row(scales[i], self.pieces[names[i]], len(dense[i])) for i in chosen}
        rounded = compensated(w, torch.cat([expand_scale(stored[i], dense[i].shape) for i in chosen]), hessian)
        size = float(forms(w, hessian).sum())
        self.losses[names[chosen[0]]] = Loss(float(rounded.plain.sum()), float(rounded.loss.sum()), size)
        heights = [len(dense[i]) for i in chosen]
        for i, codes in zip(chosen, rounded.codes.view(torch.uint8).split(heights), strict=True):
            self.made[names[i]] = codes.view(E4M3), scales[i]
            scheme = self.pieces[names[i]].scheme
            assert scheme is not None
            weights[i] = QTensor(codes.view(E4M3), stored[i], scheme, (codes.shape[0], codes.shape[1]))
        return weights


class _Attention:
    """What a layer's queries read of keys, and the largest that its cache in the model's dtype holds, over a text."""

    def __init__(self, layer: PagedAttention, device: torch.device):
        self.layer = layer
        self.peaks = torch.zeros(2, layer.kv_heads, device=device)  # FP32, of keys and of values
        layer.query_gram = torch.zeros(layer.kv_heads, layer.head_dim, layer.head_dim, device=device)

    def see(self) -> None:
        """What the layer has just read, and what its cache still holds of before."""
        for peak, name in zip(self.peaks, "kv", strict=True):
            held = self.layer.cache.views[name].nan_to_num(0.0, 0.0, 0.0)  # as an FP8 cache stores what is not finite
            torch.maximum(peak, held.abs().amax((0, 1, 3)).float(), out=peak)

    def grams(self) -> Tensor:
        """The sums of q q^T, FP32 [heads, D, D], of which the upper triangles count. Queries are no longer summed."""
        assert self.layer.query_gram is not None
        grams, self.layer.query_gram = self.layer.query_gram, None
        return grams


class _Inputs:
    """What a module reads: of a linear layer the sum of x x^T, FP32; of experts each token and where it is routed to."""

    def __init__(self) -> None:
        self.hessian: Tensor | None = None
        self.rows: list[Tensor] = []
        self.routed: list[Tensor] = []

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].values() if isinstance(args[0], ops.Activation) else args[0]
        if isinstance(module, Experts):
            self.rows.append(x.clone())
            self.routed.append(args[1].experts.clone())
            return
        if self.hessian is None:
            self.hessian = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        ops.add_gram(self.hessian, x)


def _parts(linear: Linear) -> list[str]:
    return linear.names if isinstance(linear, ColumnParallelLinear) else [linear.name]


def _shapes(linear: Linear) -> list[tuple[int, int]]:
    return linear.shapes if isinstance(linear, ColumnParallelLinear) else [linear.shape]


def _scale(w: Tensor, granularity: Granularity, sizes: Tensor) -> Tensor:
    """That of the least squared error among some; a column counts by the sum of squares of its inputs, `sizes` [K]."""
    peak = peaks(w, granularity)
    return searched_scale(peak, search_errors(w, peak, granularity, sizes / sizes.mean().clamp_min(1e-30)))


def _per_row(scale: Tensor, piece: Piece, rows: int) -> Tensor:
    """A scale that `peaks` shaped as a QTensor has it."""
    return scale.expand(rows, 1).contiguous() if piece.granularity is Granularity.TENSOR else scale


def _tokens_of(expert: int, routed: Tensor) -> Tensor:
    """Indices of the tokens that an expert is rounded by: those routed to it, and if they are few the first of the others."""
    own = (routed == expert).any(1)
    given = own.nonzero()[:, 0]
    if len(given) < FEWEST:
        given = torch.cat([given, (~own).nonzero()[: FEWEST - len(given), 0]])
    return given
