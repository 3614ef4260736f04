"""What each linear layer loses by itself: its weight, its output, and the whole model's KL when only it is quantized.

For one layer with weight W, quantized weight W' and product y' = quantized(x) W'^T, on the BF16 model's own activations x:

    weight error   ||W' - W|| / ||W||
    output error   ||y' - y|| / ||y||,  y = x W^T
    KL             of the BF16 model with only this layer quantized, in nats a token

A layer's experts are two such weights, the stack of their gate and up projections and that of their down projections. The y of
either is what the experts give together, each token's weighted sum, so that an expert counts as much as tokens reach it.

Errors of different layers are nearly independent, and KL is quadratic in a small error, so the KLs of single layers add up to
about that of all. That makes "KL per byte" the measure of which layer to keep in BF16 first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from octavo import ops
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.loading import open_source
from octavo.engine.runner import ModelRunner
from octavo.layers.linear import ColumnParallelLinear, RowParallelLinear
from octavo.layers.moe import Experts
from octavo.quant import SCHEMES, QTensor, QuantRules, Scheme, concat, dequantize, quantize
from octavo.quant.formats import WHOLE, read_weight
from octavo.quant.qtensor import Stacker
from octavo.tools.compare.measure import REFERENCE, Text, divergence, open_core
from octavo.tools.compare.read_text import hidden_states
from octavo.weights import Loader
from octavo.weights.loader import stored_modules

__all__ = ["LayerError", "Sensitivity", "ignore_list", "layer_errors", "sensitivities", "worth_keeping"]

MAX_NAMES = 8  # of a proposed list; nobody types more
MOST = 0.5  # the part of the loss that a proposed ignore list should take away
Linear = ColumnParallelLinear | RowParallelLinear
Operand = ops.PackedWeight | ops.PackedStack
STACKS = ("gate_up", "down")  # of the experts, in the order in which they are given to ops.experts


@dataclass
class LayerError:
    """Relative errors of one layer, by scheme. `names` are the checkpoint's modules that it stacks, of experts with a `*`."""

    path: str
    names: tuple[str, ...]
    weight: dict[str, float] = field(default_factory=dict)
    output: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """One layer's part in a scheme's loss, and what keeping it in BF16 costs."""

    path: str
    names: tuple[str, ...]
    kl: float  # nats a token, with only this layer quantized
    extra_bytes: int  # its bytes in BF16 over those in FP8
    layers: int = 1  # more: all of a kind, whose path and names are the ends that theirs have in common


@dataclass
class _Weight:
    """One operand of the model: a linear layer's, or a stack of one layer's experts."""

    path: str
    names: tuple[str, ...]  # of experts with a `*` where their number stands, as --quantization-ignore takes it
    shapes: Sequence[tuple[int, int]]
    module: Linear | Experts
    attribute: str = "weight"
    experts: int = 0

    @property
    def members(self) -> list[list[str]]:
        """The checkpoint's modules, by expert where there are such."""
        numbers = map(str, range(self.experts or 1))
        return [
            [f"{number}.".join(name.rsplit("*.", 1)) if self.experts else name for name in self.names] for number in numbers
        ]

    @property
    def operand(self) -> Operand:
        found: Operand = getattr(self.module, self.attribute)
        return found

    @operand.setter
    def operand(self, operand: Operand) -> None:
        setattr(self.module, self.attribute, operand)

    def output(self, args: tuple[Any, ...], operand: Operand) -> Tensor:
        """What the layer makes of a call's arguments with `operand`, in FP32."""
        if isinstance(operand, ops.PackedWeight):
            return ops.linear(args[0], operand).float()
        stacks = {name: getattr(self.module, name) for name in STACKS} | {self.attribute: operand}
        return ops.experts(*args, *stacks.values()).float()


@dataclass
class _Quantized:
    """A layer's operand under a scheme, its bytes as stored, and ||W' - W|| / ||W||.

    `keeps_codes`: the checkpoint holds some of it quantized already, which stays as it is.
    """

    operand: Operand
    nbytes: int
    error: float
    keeps_codes: bool


class _Weights:
    """The checkpoint's matrices of a layer, under any scheme: one operand in memory at a time, experts read one by one."""

    def __init__(self, runner: ModelRunner):
        self.runner, self.platform = runner, runner.platform
        source = open_source(runner.config, runner.directory)
        self.loader = Loader(source, self.platform, QuantRules(), runner.dtype)

    def layers(self, rules: QuantRules) -> Iterator[_Weight]:
        """Each operand that `rules` quantize. One that the checkpoint holds in codes keeps those, and is none of them."""
        for path, module in stored_modules(cast("nn.Module", self.runner.model)):
            for weight in _weights_of(path, module):
                names = [name for member in weight.members for name in member]
                if rules.scheme_for(names).quantized and not all(map(self._in_codes, names)):
                    yield weight

    def _in_codes(self, name: str) -> bool:
        return any(self.loader.has(f"{name}.{end}") for end in ("weight_packed", "weight_scale", "weight_scale_inv"))

    def quantized(self, weight: _Weight, scheme: Scheme) -> _Quantized:
        """Under `scheme`, except what the checkpoint holds quantized already: its codes stay."""
        stacker, wrong, total, nbytes, keeps_codes = Stacker(len(weight.members), weight.path), 0.0, 0.0, 0, False
        for number, names in enumerate(weight.members):
            parts = []
            for name, shape in zip(names, weight.shapes, strict=True):
                w = read_weight(self.loader, name, shape, WHOLE)
                if isinstance(w, QTensor):
                    keeps_codes = True
                    parts.append(w)
                    continue
                parts.append(q := quantize(w, scheme, self.platform.fp8_dtype))
                wrong += float((dequantize(q) - w.float()).square().sum())
                total += float(w.float().square().sum())
            stored = concat(parts)
            nbytes += stored.nbytes
            one = stored.padded(self.platform.fp8_alignment)
            if weight.experts:
                stacker.put(number, one)
        q = stacker.finished() if weight.experts else one
        operand: Operand = (ops.pack_experts if weight.experts else ops.pack)(q, self.platform)
        return _Quantized(operand, nbytes, (wrong / total) ** 0.5 if total else 0.0, keeps_codes)


def _weights_of(path: str, module: nn.Module) -> Iterator[_Weight]:
    """The operands of the module at `path` that a scheme may quantize."""
    parent = path.rpartition(".")[0]
    if isinstance(module, ColumnParallelLinear):
        yield _Weight(path, tuple(f"{parent}.{name}" for name in module.names), module.shapes, module)
    elif isinstance(module, RowParallelLinear):
        yield _Weight(path, (f"{parent}.{module.name}",), [module.shape], module)
    elif isinstance(module, Experts):
        for attribute, matrices in zip(STACKS, module.matrices, strict=True):
            names = tuple(f"{path}.*.{name}" for name in matrices.names)
            title = names[0] if len(names) == 1 else f"{path}.*.{attribute}_proj"
            yield _Weight(title, names, matrices.shapes, module, attribute, module.count)


def layer_errors(core: EngineCore, schemes: Sequence[str], window: Sequence[int]) -> list[LayerError]:
    """Errors of every layer under each scheme, in one pass of the BF16 model over `window`; of those that it runs.

    What an indexer chooses by computes nothing where all of a window is attended to.
    """
    weights, found = _Weights(core.runner), []
    handles = []
    for weight in weights.layers(QuantRules(SCHEMES["fp8"])):
        found.append(layer := LayerError(weight.path, weight.names))
        handles.append(weight.module.register_forward_pre_hook(_observer(weights, weight, layer, schemes)))
    try:
        hidden_states(core.runner, window)
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer in found if layer.output]


def _observer(weights: _Weights, weight: _Weight, layer: LayerError, schemes: Sequence[str]) -> Callable[[Any, Any], None]:
    def observe(module: Linear | Experts, args: tuple[Any, ...]) -> None:
        y = weight.output(args, weight.operand)
        for scheme in schemes:
            made = weights.quantized(weight, SCHEMES[scheme])
            layer.weight[scheme] = made.error
            layer.output[scheme] = float((weight.output(args, made.operand) - y).norm() / y.norm())
            del made  # before the next is made

    return observe


def sensitivities(
    base: EngineConfig, scheme: str, text: Text, tell: Callable[[float], None] = lambda done: None
) -> list[Sensitivity]:
    """KL of every layer that `scheme` quantizes, on the text's first window, all of it a prompt, the most KL per extra byte
    first.

    tell: learns which part of the layers is done.
    """
    core, window = open_core(base, REFERENCE, text), text.windows[0]
    weights, found, expected = _Weights(core.runner), [], hidden_states(core.runner, window)
    layers = list(weights.layers(QuantRules(SCHEMES[scheme], base.quantization_ignore)))
    for number, weight in enumerate(layers):
        tell(number / len(layers))
        made = weights.quantized(weight, SCHEMES[scheme])
        if made.keeps_codes:
            continue  # there is no BF16 to go back to
        values = len(weight.members) * sum(n * k for n, k in weight.shapes)
        extra = max(1, values * core.runner.dtype.itemsize - made.nbytes)  # scales may outweigh the gain in a tiny matrix
        dense, weight.operand = weight.operand, made.operand
        found.append(Sensitivity(weight.path, weight.names, _kl_of(core, window, expected), extra))
        weight.operand = dense
        del made
    return sorted(found, key=lambda layer: layer.kl / layer.extra_bytes, reverse=True)


def _kl_of(core: EngineCore, window: Sequence[int], expected: Tensor) -> float:
    hidden, head = hidden_states(core.runner, window), core.runner.model.head
    return float(divergence(head, expected, head, hidden, window, core.runner.platform.device)[2].double().mean())


def worth_keeping(ranked: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Those that together hold MOST of the loss, in the fewest bytes: single layers, or all of a kind where these are many."""
    kept = _most(ranked)
    return kept if len(ignore_list(kept)) <= MAX_NAMES else _most(_kinds(ranked))


def _kinds(ranked: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Layers that differ in their number alone as one, the most KL per extra byte first."""
    found: dict[str, list[Sensitivity]] = {}
    for layer in ranked:
        found.setdefault(_kind(layer.path), []).append(layer)
    kinds = [
        Sensitivity(
            kind, tuple(map(_kind, layers[0].names)), sum(one.kl for one in layers), sum(one.extra_bytes for one in layers),
            len(layers),
        )
        for kind, layers in found.items()
    ]  # fmt: skip
    return sorted(kinds, key=lambda kind: kind.kl / kind.extra_bytes, reverse=True)


def _kind(name: str) -> str:
    """ "self_attn.o_proj" of "model.layers.3.self_attn.o_proj", which --quantization-ignore takes for every layer's."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _most(ranked: Sequence[Sensitivity]) -> list[Sensitivity]:
    """The first of `ranked` that together hold MOST of the loss."""
    total, kept, fixed = sum(layer.kl for layer in ranked), [], 0.0
    for layer in ranked:
        if fixed >= MOST * total:
            break
        kept.append(layer)
        fixed += layer.kl
    return kept


def ignore_list(layers: Sequence[Sensitivity]) -> tuple[str, ...]:
    """The names for `--quantization-ignore`: every module of every stack, so that peers read it too; of experts a glob."""
    return tuple(name for layer in layers for name in layer.names)
