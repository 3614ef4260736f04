"""Ways to use the accelerators of several hosts, or of one: layers that are split, stages of them, engines side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace

from octavo.tools.plan.roofline import hop_seconds
from octavo.tools.plan.subject import Variant
from octavo.tools.plan.variants import Fit, Plan, Question, Speed, deployment, fit_of, speed_of

__all__ = ["Split", "smallest_split", "splits"]


@dataclass(frozen=True)
class Split:
    """Engines of tp x pp ranks, as many as there is room for. speed: of all of them, where requests are shared out evenly.

    hop: seconds of a decode step of the requests asked for that messages between stages take, once there and back.
    """

    tp: int
    pp: int
    replicas: int
    fit: Fit | None
    speed: Speed | None
    hop: float = 0.0


def splits(plan: Plan) -> list[Split]:
    """Those of the asked variant that use all accelerators; none where there is one. Layers are split over one host, over all
    hosts, or over fewer accelerators with stages or replicas of the rest."""
    q, found = plan.question, dict[tuple[int, int], Split]()
    for tp in (n for n in range(1, q.all + 1) if q.all % n == 0):
        if tp > q.number and tp % q.number:
            continue
        for pp in (n for n in range(1, q.all // tp + 1) if q.all % (tp * n) == 0):
            one = _split(plan, tp, pp, q.all // (tp * pp))
            if one.fit is not None and one.fit.max_model_len:
                found[tp, pp] = one
    return [found[key] for key in sorted(found, key=lambda key: (-key[0] * key[1], -key[0]))] if q.all > 1 else []


def _split(plan: Plan, tp: int, pp: int, replicas: int) -> Split:
    q, variant = plan.question, plan.asked.variant
    fit = fit_of(q, variant, tp, pp)
    one = _of_one(q, replicas)
    speed = speed_of(one, variant, fit, tp, pp)
    if speed is None:
        return Split(tp, pp, replicas, fit, None)
    hop = pp * hop_seconds(deployment(q, variant, tp, pp), -(-speed.requests // pp))
    every = Speed(speed.prefill * replicas, speed.decode_one, speed.decode_many * replicas, speed.requests * replicas)
    return Split(tp, pp, replicas, fit, every, hop)


def _of_one(q: Question, replicas: int) -> Question:
    """What is asked of one of the engines. Of hosts that each have whole engines nothing goes between them."""
    return replace(q, requests=-(-q.requests // replicas))


def smallest_split(q: Question, variant: Variant, most_tp: int) -> int:
    """Where layers are split over `most_tp`, the fewest stages, up to what the accelerators allow, on which a request fits."""
    for pp in range(1, q.all // most_tp + 1):
        fit = fit_of(q, variant, most_tp, pp)
        if fit is not None and fit.max_model_len:
            return pp
    return 1
