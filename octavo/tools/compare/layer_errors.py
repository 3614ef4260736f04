"""What each linear layer loses by itself: its weight, its output, and the whole model's KL when only it is quantized.

For one layer with weight W, quantized weight W' and product y' = quantized(x) W'^T, on the BF16 model's own activations x:

    weight error   ||W' - W|| / ||W||
    output error   ||y' - y|| / ||y||,  y = x W^T
    KL             of the BF16 model with only this layer quantized, in nats a token

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
from octavo.engine.runner import ModelRunner
from octavo.layers.linear import ColumnParallelLinear, RowParallelLinear
from octavo.quant import SCHEMES, QTensor, QuantRules, Scheme, concat, dequantize, quantize
from octavo.quant.formats import WHOLE, read_weight
from octavo.tools.compare.measure import REFERENCE, Reference, Text, divergence, hidden_states, open_core
from octavo.weights import DummySource, Loader, SafetensorsSource

__all__ = ["LayerError", "Sensitivity", "ignore_list", "layer_errors", "sensitivities", "worth_keeping"]

MOST_NAMES = 8  # of a proposed list; nobody types more
MOST = 0.5  # the part of the loss that a proposed ignore list should take away
Linear = ColumnParallelLinear | RowParallelLinear


@dataclass
class LayerError:
    """Relative errors of one layer, by scheme. `names` are the checkpoint's modules that it stacks."""

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


class _Weights:
    """The checkpoint's matrices of a layer, under any scheme, one layer in memory at a time."""

    def __init__(self, runner: ModelRunner):
        self.runner, self.platform = runner, runner.platform
        source = DummySource() if runner.config.load_format == "dummy" else SafetensorsSource(runner.directory)
        self.loader = Loader(source, self.platform, QuantRules(), runner.dtype)

    def layers(self, rules: QuantRules) -> Iterator[tuple[str, Linear, tuple[str, ...]]]:
        """(path, module, checkpoint names) of each linear layer that `rules` quantize."""
        for path, module in cast("nn.Module", self.runner.model).named_modules():
            if isinstance(module, Linear):
                parent = path.rpartition(".")[0]
                own = module.names if isinstance(module, ColumnParallelLinear) else [module.name]
                names = tuple(f"{parent}.{name}" for name in own)
                if rules.scheme_for(names).quantized:
                    yield path, module, names

    def stored(self, module: Linear, names: Sequence[str]) -> list[QTensor | Tensor]:
        shapes = module.shapes if isinstance(module, ColumnParallelLinear) else [module.shape]
        return [read_weight(self.loader, name, shape, WHOLE) for name, shape in zip(names, shapes, strict=True)]

    def quantized(self, stored: Sequence[QTensor | Tensor], scheme: Scheme) -> list[QTensor]:
        """Under `scheme`, except what the checkpoint holds quantized already: its codes stay."""
        return [w if isinstance(w, QTensor) else quantize(w, scheme, self.platform.fp8_dtype) for w in stored]

    def pack(self, parts: Sequence[QTensor]) -> tuple[ops.PackedWeight, int]:
        """The layer's operand, and its bytes as stored."""
        q = concat(parts).padded(self.platform.fp8_alignment)
        return ops.pack(q, self.platform), q.nbytes


def layer_errors(core: EngineCore, schemes: Sequence[str], window: Sequence[int]) -> list[LayerError]:
    """Errors of every layer under each scheme, in one pass of the BF16 model over `window`."""
    weights, found = _Weights(core.runner), []
    handles = []
    for path, module, names in weights.layers(QuantRules(SCHEMES["fp8"])):
        found.append(layer := LayerError(path, names))
        handles.append(module.register_forward_pre_hook(_observer(weights, layer, schemes)))
    try:
        hidden_states(core.runner, window)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _observer(weights: _Weights, layer: LayerError, schemes: Sequence[str]) -> Callable[[Any, Any], None]:
    def observe(module: Linear, args: tuple[Tensor, ...]) -> None:
        x, stored = args[0], weights.stored(module, layer.names)
        y = ops.linear(x, module.weight).float()
        for scheme in schemes:
            parts = weights.quantized(stored, SCHEMES[scheme])
            layer.weight[scheme] = _weight_error(parts, stored)
            wrong = ops.linear(x, weights.pack(parts)[0]).float()
            layer.output[scheme] = float((wrong - y).norm() / y.norm())

    return observe


def _weight_error(parts: Sequence[QTensor], stored: Sequence[QTensor | Tensor]) -> float:
    wrong = total = 0.0
    for part, w in zip(parts, stored, strict=True):
        if isinstance(w, Tensor):
            wrong += float((dequantize(part) - w.float()).square().sum())
            total += float(w.float().square().sum())
    return float((wrong / total) ** 0.5) if total else 0.0


def sensitivities(
    base: EngineConfig, scheme: str, text: Text, reference: Reference, tell: Callable[[float], None] = lambda done: None
) -> list[Sensitivity]:
    """KL of every layer that `scheme` quantizes, on the text's first window, the most KL per extra byte first.

    tell: learns which part of the layers is done.
    """
    core = open_core(base, REFERENCE, text)
    weights, found = _Weights(core.runner), []
    layers = list(weights.layers(QuantRules(SCHEMES[scheme], base.quantization_ignore)))
    for number, (path, module, names) in enumerate(layers):
        tell(number / len(layers))
        stored = weights.stored(module, names)
        if any(isinstance(w, QTensor) for w in stored):
            continue  # there is no BF16 to go back to
        values = sum(w.shape[0] * w.shape[1] for w in stored)
        dense = module.weight
        module.weight, small = weights.pack(weights.quantized(stored, SCHEMES[scheme]))
        extra = max(1, values * core.runner.dtype.itemsize - small)  # padding may outweigh the gain in a tiny matrix
        found.append(Sensitivity(path, names, _kl_of(core, text.windows[0], reference), extra))
        module.weight = dense
    return sorted(found, key=lambda layer: layer.kl / layer.extra_bytes, reverse=True)


def _kl_of(core: EngineCore, window: Sequence[int], reference: Reference) -> float:
    hidden, head = hidden_states(core.runner, window), reference.head
    return float(divergence(head, reference.hidden[0], head, hidden, window, core.runner.platform.device)[2].double().mean())


def worth_keeping(ranked: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Those that together hold MOST of the loss, in the fewest bytes: single layers, or all of a kind where these are many."""
    kept = _most(ranked)
    return kept if len(ignore_list(kept)) <= MOST_NAMES else _most(_kinds(ranked))


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
    """The names for `--quantization-ignore`: every module of every stack, so that peers read it too."""
    return tuple(name for layer in layers for name in layer.names)
