"""A plan: every variant of a model weighed, fitted and timed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from octavo.config import EngineConfig
from octavo.engine.encoder import make_encoder
from octavo.engine.memory import cache_room, check_weights, plan_blocks
from octavo.errors import OctavoError
from octavo.quant.scheme import WeightDType
from octavo.tools.plan.accelerators import GIB, Accelerator
from octavo.tools.plan.operands import Walk
from octavo.tools.plan.roofline import Costs, Deployment, decode_rate, prefill_rate
from octavo.tools.plan.subject import WHOLE, Stage, Subject, Variant

__all__ = ["CONTEXT_BYTES", "EXCHANGE_BYTES", "RANKS", "Fit", "Plan", "Question", "Speed", "VariantPlan", "build"]

RANKS = (1, 2, 4, 8)
CONTEXT_BYTES = GIB // 2  # a driver's context and its libraries on each accelerator; an assumption
EXCHANGE_BYTES = GIB  # NCCL's buffers and the kernels' own on each of several: two H200s held 1.0 GB more than one does


@dataclass(frozen=True)
class Question:
    """What is asked, of how many accelerators of each host. tp: ranks that split a layer. context, requests: of the roofline.

    pp: pipeline stages. link: bytes a second that an accelerator sends to one of another host.
    """

    subject: Subject
    number: int
    tp: int
    context: int
    requests: int
    pp: int = 1
    hosts: int = 1
    link: float = 0.0

    @property
    def all(self) -> int:
        """Accelerators of all hosts."""
        return self.number * self.hosts

    @property
    def config(self) -> EngineConfig:
        return self.subject.config

    @property
    def on(self) -> Accelerator:
        return self.subject.on

    @property
    def model_len(self) -> int:
        """The longest request: what is asked for, or what the model was made for."""
        return self.config.max_model_len or self.subject.longest


@dataclass(frozen=True)
class Fit:
    """One rank's memory. weights, room, cache: bytes; room is what is left for the cache, cache what the engine takes of it.

    positions: bytes of the table of rotary embeddings, for requests of the length wanted. images: bytes kept for what the
    vision tower makes of images, and for its activations; 0 without one. tokens: that the room holds; requests: of the length
    wanted, at a time. max_model_len: the longest request that the engine would take: the length wanted, a lowered one, or 0
    where it would refuse. said: its refusal, or its notes.
    """

    weights: int
    room: int
    cache: int
    tokens: int
    requests: float
    max_model_len: int
    images: int
    positions: int
    said: tuple[str, ...] = ()


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


def build(question: Question, asked: Variant) -> Plan:
    """Plans the usual variants and the one that is asked for."""
    native = question.subject.quantized
    size = question.subject.itemsize
    kvs = question.subject.own_kv(size), "fp8_e4m3"
    usual = [Variant("bf16", False, question.subject.own_kv(2)), *(Variant("fp8", False, kv, size) for kv in kvs)]
    usual += [Variant("ptpc_fp8", False, kv, size) for kv in kvs[: 1 if native else 2]]
    usual += [Variant("bf16", True, kv, size) for kv in kvs] if native else []
    chosen = usual if asked in usual else [*usual, asked]
    question.subject.check_patterns(asked)
    base = _weigh(question, chosen[0], None)
    plans = [base, *(_weigh(question, variant, base) for variant in chosen[1:])]
    return Plan(question, plans, plans[chosen.index(asked)])


def _weigh(q: Question, variant: Variant, base: VariantPlan | None) -> VariantPlan:
    components: Counter[str] = Counter()
    for operand in q.subject.walk(variant, 1).operands:
        components[operand.component] += operand.stored
    weights, token, length = components.total(), sum(q.subject.token_bytes(variant, 1)), q.model_len
    base_weights, base_token = (base.weights, base.token_bytes) if base else (weights, token)
    ranks = {tp: _walk(q, variant, tp) for tp in RANKS}
    fitted = fit_of(q, variant, q.tp, q.pp)
    return VariantPlan(
        variant,
        q.subject.cache_format(variant),
        dict(components),
        weights,
        token,
        100 * weights / base_weights,
        100 * token / base_token,
        100 * (weights + length * token) / (base_weights + length * base_token),
        {tp: found.total("held") if found else None for tp, found in ranks.items()},
        next((tp for tp in sorted({*RANKS, 16, 32, q.tp}) if _one_fits(q, variant, tp)), None),
        fitted,
        speed_of(q, variant, fitted, q.tp, q.pp),
    )


def _walk(q: Question, variant: Variant, tp: int, stage: Stage = WHOLE) -> Walk | None:
    try:
        return q.subject.walk(variant, tp, stage)
    except OctavoError:  # a dimension does not split; asked for, it is said where refusals are
        return None


def _one_fits(q: Question, variant: Variant, tp: int) -> bool:
    found = fit_of(q, variant, tp) if tp == 1 or not q.on.is_cpu else None
    return found is not None and found.requests >= 1


def fit_of(q: Question, variant: Variant, tp: int, pp: int = 1) -> Fit | None:
    """What one of `tp` ranks of the fullest of `pp` stages holds, by the engine's own budget. None where it does not split."""
    fits = [_fit(q, variant, tp, (number, pp)) for number in sorted({0, pp - 1})]
    return min((fit for fit in fits if fit), key=lambda fit: (fit.max_model_len, fit.tokens)) if all(fits) else None


def _fit(q: Question, variant: Variant, tp: int, stage: Stage) -> Fit | None:
    if (found := _walk(q, variant, tp, stage)) is None or (whole := _walk(q, variant, tp)) is None:
        return None
    config, machine, model, length = q.config, q.subject.machine, q.subject.model(tp, stage), q.model_len
    config = replace(config, tensor_parallel_size=tp, pipeline_parallel_size=stage[1], kv_cache_dtype=variant.kv)
    weights, positions, token = found.total("held"), found.position * length, sum(q.subject.token_bytes(variant, tp, stage))
    vocab = next(o.whole[0] for o in whole.operands if o.component == "embeddings")
    working = model.workspace_bytes(config.step_tokens_on(machine.is_cpu)) + config.sampling_bytes(vocab)
    encoder = make_encoder(model, machine)
    images = 0 if encoder is None else encoder.plan(config, length, variant.dtype)
    working += images
    exchange = q.subject.exchange if tp * stage[1] > 1 and not machine.is_cpu else 0
    loaded = replace(machine, free=machine.free - weights - positions - exchange)
    room, block = max(0, int(cache_room(config, loaded, working))), config.block_size_on(machine.is_cpu)
    tokens = room // (token * block) * block
    try:
        matrices = [o for o in found.operands if not o.is_vector]
        values = sum(o.values for o in matrices if o.scheme.dtype is not WeightDType.INT4)
        packed = sum(o.values // 2 for o in matrices if o.scheme.dtype is WeightDType.INT4)
        check_weights(machine, values, packed, fp8=variant.scheme != "bf16" or variant.native)
        fp8 = sum(q.subject.token_bytes(replace(variant, kv="fp8_e4m3"), tp, stage))
        budget = plan_blocks(config, loaded, token, length, weights, working, fp8_bytes_per_token=fp8, image_bytes=images)
    except OctavoError as error:
        return Fit(weights, room, 0, tokens, tokens / length, 0, images, positions, (str(error),))
    cache = budget.num_blocks * token * block
    return Fit(weights, room, cache, tokens, tokens / length, budget.max_model_len, images, positions, budget.notes)


def deployment(q: Question, variant: Variant, tp: int, pp: int) -> Deployment:
    """One rank's costs. Layers that are split over hosts exchange over the link between these, and so do stages there."""
    operands = q.subject.walk(variant, tp).operands
    hidden = next(o.whole[1] for o in operands if o.component == "embeddings")
    costs = Costs.of(operands, q.subject.attention, q.subject.caches(variant, tp), tp)
    on = replace(q.on, link=q.link) if tp > q.number and q.hosts > 1 else q.on
    return Deployment(costs, hidden, on, pp, q.link if q.hosts > 1 else q.on.link)


def speed_of(q: Question, variant: Variant, fitted: Fit | None, tp: int, pp: int) -> Speed | None:
    """None where nothing fits, or the accelerator's rates are not known."""
    if fitted is None or not fitted.max_model_len or not q.on.bandwidth:
        return None
    operands = q.subject.walk(variant, tp).operands
    if not q.on.has_fp8 and ("fp8" in q.subject.cache_format(variant) or any(o.is_fp8 for o in operands)):
        return None
    deployed = deployment(q, variant, tp, pp)
    context = min(q.context, fitted.max_model_len)
    many = max(1, min(q.requests, fitted.tokens // context))
    return Speed(prefill_rate(deployed, context), decode_rate(deployed, 1, context), decode_rate(deployed, many, context), many)
