"""A plan: every variant of a model weighed, fitted and timed; what happens to each layer; what would be refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.fit import Fit, fit
from octavo.tools.plan.model_source import Source
from octavo.tools.plan.roofline import Deployment, decode_rate, prefill_rate
from octavo.tools.plan.shapes import HEAD, TIED, Model
from octavo.tools.plan.sizes import Format, Weight, dense, distinct
from octavo.tools.plan.stored_formats import FORMATS, expert_names, matches

__all__ = ["RANKS", "Plan", "Question", "Speed", "Variant", "VariantPlan", "build", "treatment"]

Tally = Sequence[tuple[Weight, Format, int]]
RANKS = (1, 2, 4, 8)
KV_NAMES = {
    "auto": "",
    "bfloat16": "",
    "fp8_e4m3": " + FP8 KV",
    "fp8_e5m2": " + e5m2 KV",
    "fp8_per_token_head": " + per-head FP8 KV",
}
NAMES = {"bf16": "BF16", "fp8": "FP8", "ptpc_fp8": "PTPC", "fp8_block": "FP8 block"}


@dataclass(frozen=True)
class Question:
    """What is asked: the engine's options, and where they are to run. tp: ranks. context, requests: of the roofline."""

    config: EngineConfig
    source: Source
    on: Accelerator
    number: int
    tp: int
    context: int
    requests: int

    @property
    def model(self) -> Model:
        return self.source.model

    @property
    def itemsize(self) -> int:
        return 4 if self.config.dtype == "float32" else 2

    @cached_property
    def left_out(self) -> list[bool]:
        """Of each weight, whether --quantization-ignore leaves it out; leaving out one matrix leaves out its stack."""
        patterns = self.config.quantization_ignore
        if not patterns:
            return [False] * len(self.model.weights)
        return [any(matches(p, name) for name in expert_names(w) for p in patterns) for w in self.model.weights]


@dataclass(frozen=True)
class Variant:
    """A way to serve: the scheme of what is BF16 on disk, whether codes on disk are kept, the cache's dtype.

    itemsize: bytes of a value that is not quantized.
    """

    scheme: str
    native: bool
    kv: str
    itemsize: int = 2

    @property
    def weights_label(self) -> str:
        if not self.native:
            return "FP32" if self.scheme == "bf16" and self.itemsize == 4 else NAMES[self.scheme]
        return "native" if self.scheme == "bf16" else f"native, rest {NAMES[self.scheme]}"

    @property
    def label(self) -> str:
        return self.weights_label + KV_NAMES[self.kv]


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one server at most: prefill, decode of one request, decode of `requests` together."""

    prefill: float
    decode_one: float
    decode_many: float
    requests: int


@dataclass(frozen=True)
class VariantPlan:
    """Bytes. percents are of BF16's. rank_weights: by tensor-parallel size, None where a dimension does not split.

    request_percent: weights and the cache of one request of the full length. smallest: fewest ranks on which one fits.
    """

    variant: Variant
    cache_format: str
    components: dict[str, int]
    weights: int
    token_bytes: int
    weights_percent: float
    token_percent: float
    request_percent: float
    rank_weights: dict[int, int | None]
    smallest: int | None
    fit: Fit | None
    speed: Speed | None


@dataclass(frozen=True)
class Plan:
    """The answer. asked: which of the variants the options mean, or the recommended one."""

    question: Question
    variants: list[VariantPlan]
    asked: VariantPlan
    max_model_len: int
    notes: list[str] = field(default_factory=list)


def build(question: Question, asked: Variant) -> Plan:
    """Plans the usual variants and the one that is asked for."""
    native = question.source.stored.quantized
    size, fp8 = question.itemsize, "fp8_e4m3"
    usual = [Variant("bf16", False, "auto"), *(Variant("fp8", False, kv, size) for kv in ("auto", fp8))]
    usual += [Variant("ptpc_fp8", False, kv, size) for kv in ("auto", fp8)[: 1 if native else 2]]
    usual += [Variant("bf16", True, kv, size) for kv in ("auto", fp8)] if native else []
    chosen = usual if asked in usual else [*usual, asked]
    length = question.config.max_model_len or question.model.max_model_len
    base = _weigh(question, chosen[0], None, length)
    plans = [base, *(_weigh(question, variant, base, length) for variant in chosen[1:])]
    return Plan(question, plans, plans[chosen.index(asked)], length)


def _weigh(q: Question, variant: Variant, base: VariantPlan | None, length: int) -> VariantPlan:
    model, forms = q.model, formats(q, variant)
    components: Counter[str] = Counter()
    tally = distinct(model.weights, forms)
    for weight, form, count in tally:
        components[weight.component] += count * weight.nbytes(form)
    cache = model.attention.stored_as(variant.kv)
    weights, token = components.total(), model.attention.cache_bytes(cache, 1, variant.itemsize)
    base_weights, base_token = (base.weights, base.token_bytes) if base else (weights, token)
    fits = {tp: _fit(q, tally, cache, tp, variant.itemsize) for tp in sorted({*RANKS, 16, 32, q.tp})}
    fitted = fits[q.tp]
    return VariantPlan(
        variant,
        cache,
        dict(components),
        weights,
        token,
        100 * weights / base_weights,
        100 * token / base_token,
        100 * (weights + length * token) / (base_weights + length * base_token),
        {tp: (f.weights if (f := fits[tp]) else None) for tp in RANKS},
        next((tp for tp, f in fits.items() if f and f.requests >= 1 and (tp == 1 or not q.on.is_cpu)), None),
        fitted,
        _speed(q, tally, cache, fitted),
    )


def _fit(q: Question, tally: Tally, cache: str, tp: int, itemsize: int) -> Fit | None:
    try:
        weights = sum(count * w.rank_bytes(form, tp) for w, form, count in tally)
    except OctavoError:  # a dimension does not split; asked for, it is said where refusals are
        return None
    return fit(q.config, q.model, q.on, weights, q.model.attention.cache_bytes(cache, tp, itemsize))


def _speed(q: Question, tally: Tally, cache: str, fitted: Fit | None) -> Speed | None:
    if fitted is None or not fitted.max_model_len or not q.on.bandwidth:
        return None
    if not q.on.fp8 and ("fp8" in cache or any(form.is_fp8 for _, form, _ in tally)):
        return None
    deployed = Deployment(q.model, tally, cache, q.tp, q.on)
    context = min(q.context, fitted.max_model_len)
    many = max(1, min(q.requests, fitted.tokens // context))
    return Speed(prefill_rate(deployed, context), decode_rate(deployed, 1, context), decode_rate(deployed, many, context), many)


def formats(q: Question, variant: Variant) -> list[Format]:
    """The format of each weight of the model."""
    return [treatment(q, variant, i)[0] for i in range(len(q.model.weights))]


def treatment(q: Question, variant: Variant, index: int) -> tuple[Format, str]:
    """The format of the model's weight at `index`, and why."""
    weight, stored = q.model.weights[index], q.source.stored.formats[index]
    plain, scheme = dense(variant.itemsize), FORMATS[variant.scheme]
    if variant.native and stored.quantized:
        return stored, "stored so: its codes are kept bit for bit"
    if weight.kept and not (weight.kept in (HEAD, TIED) and q.config.quantize_lm_head):
        return plain, weight.kept
    if weight.kept and variant.native and not scheme.quantized:
        scheme = FORMATS[q.source.stored.scheme or "bf16"]
    if not scheme.quantized:
        return plain, "as stored"
    if q.left_out[index]:
        return plain, "left out by --quantization-ignore"
    return scheme, "quantized while it is loaded"
