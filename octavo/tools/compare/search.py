"""The ladder of "accuracy was lost": PTPC, then a BF16 cache, then layers in BF16, then BF16; and the search that climbs it.

Between the steps that the page has are those of the same bytes: PTPC calibrated, then activations as they are in decode (where
--decode-activations asks), then all of them, each calibrated too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from octavo.errors import OctavoError
from octavo.tools.compare.calibrated import made_by
from octavo.tools.compare.layer_errors import Sensitivity, ignore_list
from octavo.tools.compare.measure import REFERENCE, Measurement, Variant

__all__ = ["DEFAULT_BUDGET", "SCHEME_NAMES", "Budget", "decodings", "name_of", "rungs", "search", "verdict"]

# In the order of the ladder: what takes the least memory, or is the most usual, first.
SCHEME_NAMES = ("fp8", "ptpc_fp8", "fp8_block", "fp8_w8a16")
DECODED = ("fp8", "ptpc_fp8")  # those that --decode-activations is for
MENTIONED = 4  # steps that the verdict speaks of
LARGE_KL = 0.05  # nats a token; about one token in ten is then another
FIRST_KV, DENSE_KV = "fp8_e4m3", ("auto", "bfloat16")


@dataclass(frozen=True)
class Budget:
    """What may be lost: perplexity relative to BF16's, or KL in nats a token."""

    limit: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`0.3%` is of perplexity, `0.002` or `0.002 nats` is KL. Raises OctavoError for anything else.

        A number by itself that is large for a KL was more likely meant as a percentage: that asks.
        """
        number, unit = re.fullmatch(r"\s*(.*?)\s*(%|nats|)\s*", text, re.DOTALL).groups()  # type: ignore[union-attr]
        try:
            limit = float(number)
        except ValueError:
            limit = -1.0
        if not 0 <= limit < float("inf"):
            raise OctavoError(f"--auto '{text}' is no budget; give a rise in perplexity such as 0.3%, or a KL such as 0.002.")
        if not unit and limit >= LARGE_KL:
            raise OctavoError(
                f"--auto {number}: did you mean {number}%, a rise in perplexity? "
                f"As a KL, where 0.002 is usual, it is written '{number} nats'."
            )
        return cls(limit / 100 if unit == "%" else limit, unit == "%")

    def loss(self, m: Measurement) -> float:
        """What `m` loses, in the budget's unit; a perplexity under BF16's counts as no loss, one that is no number as all."""
        loss = m.change if self.relative else m.kl
        return max(0.0, loss) if math.isfinite(loss) else math.inf

    def met(self, m: Measurement) -> bool:
        return self.loss(m) <= self.limit

    def error(self, m: Measurement) -> float:
        """Half of the error bar of what `m` loses: one standard error, in the budget's unit."""
        return m.change_error if self.relative else m.kl_error

    def decided(self, m: Measurement) -> bool:
        """Whether the budget lies outside of the error bar, and the bar is not wider than the budget where `m` is within it."""
        error, loss = self.error(m), m.change if self.relative else m.kl
        if not math.isfinite(error):  # of a model that broke
            return True
        return error <= abs(loss - self.limit) and (not self.met(m) or 2 * error <= self.limit)

    def amount(self, m: Measurement) -> str:
        """What `m` loses, for a person."""
        return self.said(m.change, "+") if self.relative else self.said(m.kl)

    def said(self, value: float, sign: str = "") -> str:
        """An amount in the budget's unit."""
        return f"{100 * value:{sign}.2f}%" if self.relative else f"{value:.2g}"

    def __str__(self) -> str:
        return f"{100 * self.limit:g}% of perplexity" if self.relative else f"KL {self.limit:g}"


DEFAULT_BUDGET = Budget(0.005, relative=True)


def rungs(measured: Iterable[Measurement]) -> list[Measurement]:
    """The steps of the ladder that were measured, in its order: fp8, PTPC, PTPC calibrated, both with BF16 activations in
    decode, weights alone in FP8, a BF16 cache, layers in BF16, BF16 weights.

    Where none of them was, everything that was, the smallest first.
    """
    others = [m for m in measured if m.variant != REFERENCE]
    climbed = [m for m in others if _step(m.variant) in _STEPS]
    if not climbed:
        return sorted(others, key=lambda m: (m.weight_bytes, m.kv_bytes_per_token))
    return sorted(climbed, key=lambda m: (_STEPS.index(_step(m.variant)), len(m.variant.ignore)))


def _step(variant: Variant) -> tuple[str, str, str, bool]:
    return variant.scheme, variant.decode, variant.kv, bool(variant.calibrated)


_STEPS = [
    ("fp8", "auto", FIRST_KV, False),
    ("fp8", "bf16", FIRST_KV, False),
    *(
        (scheme, decode, kv, calibrated)
        for kv in (FIRST_KV, "auto")
        for scheme, decode in (("ptpc_fp8", "auto"), ("ptpc_fp8", "bf16"), ("fp8_w8a16", "auto"))
        for calibrated in (False, True)
    ),
    ("bf16", "auto", FIRST_KV, False),
]


def decodings(scheme: str, asked: bool) -> tuple[str, ...]:
    """The values of --decode-activations that a scheme is measured with."""
    return ("auto", "bf16") if asked and scheme in DECODED else ("auto",)


def search(
    budget: Budget,
    measure: Callable[[Variant], Measurement],
    rank: Callable[[str], Sequence[Sensitivity]],
    schemes: Sequence[str],
    kvs: Sequence[str],
    decodes: bool = False,
) -> Measurement | None:
    """Climbs scheme -> KV -> ignore list -> BF16 to the first configuration that was measured to meet the budget.

    schemes and kvs: what may be used, the cheapest first. rank: the layers by what keeping each in BF16 gains a byte. decodes:
    whether activations may be BF16 in decode.
    None if even BF16 weights with the last KV dtype miss it.
    """
    tried: list[Measurement] = []
    for variant in (Variant(scheme, kvs[0], decode=way) for scheme in schemes for way in decodings(scheme, decodes)):
        tried.append(measure(variant))
        if budget.met(tried[-1]):
            return tried[-1]
    best = min(tried, key=budget.loss).variant if tried else Variant("bf16")
    for kv in kvs[1:] if tried else ():
        tried.append(measure(replace(best, kv=kv)))
        if budget.met(tried[-1]):
            return tried[-1]
    found = None
    if tried:
        best = min((m for m in tried if replace(m.variant, kv=best.kv) == best), key=budget.loss).variant
        found = _shortest(budget, measure, best, rank(best.scheme))
    if found is None:
        return next((m for kv in kvs if budget.met(m := measure(Variant("bf16", kv)))), None)
    for cheaper in kvs[: kvs.index(found.variant.kv)]:  # with the worst layers out, a smaller cache may do
        if budget.met(m := measure(replace(found.variant, kv=cheaper))):
            return m
    return found


def _shortest(
    budget: Budget, measure: Callable[[Variant], Measurement], variant: Variant, ranked: Sequence[Sensitivity]
) -> Measurement | None:
    """The shortest start of `ranked` with which `variant` meets the budget when it is left in BF16, by bisection; None if only
    all of it does."""
    found: Measurement | None = None
    low, high = 1, len(ranked) - 1
    while low <= high:
        middle = (low + high) // 2
        m = measure(replace(variant, ignore=ignore_list(ranked[:middle])))
        if budget.met(m):
            found, high = m, middle - 1
        else:
            low = middle + 1
    return found


def name_of(variant: Variant) -> str:
    """A variant in words: "ptpc_fp8 with KV cache fp8_e4m3, 9 modules in BF16", or their names where these are few."""
    kv = "a BF16 KV cache" if variant.kv in DENSE_KV else f"KV cache {variant.kv}"
    names, patterns = variant.ignore, all(re.search(r"\.\d+\.", name) is None for name in variant.ignore)
    count = f"{len(names)} {'kinds of ' if patterns else ''}modules"
    kept = f", {' '.join(names) if len(names) < 3 else count} in BF16" if names else ""
    made = f", {made_by(variant.calibrated)}," if variant.calibrated else ""
    decode = ", BF16 activations in decode" if variant.decode != "auto" else ""
    return f"{variant.scheme}{made} with {kv}{decode}{kept}"


def verdict(budget: Budget, climbed: Sequence[Measurement], predictions: int = 0) -> tuple[str, Measurement | None]:
    """What to do, in words, and the measurement that it stands on: the first of `climbed` within the budget.

    Where error bars leave that open it says so, and how many tokens would tell after the `predictions` that did not.
    """
    chosen = next((m for m in climbed if budget.met(m)), None)
    over = climbed[: climbed.index(chosen)] if chosen else climbed
    said = []
    if over:
        names = [f"{_name(m)} ({budget.amount(m)})" for m in over]
        more = [f"and {len(over) - MENTIONED} more"] if len(over) > MENTIONED else []
        said.append(f"Over the budget of {budget}: {'; '.join(names[:MENTIONED] + more)}.")
    if chosen is None:
        said.append("Nothing measured is within it: serve BF16, or let --auto look for layers to keep in BF16.")
        return " ".join(said + _doubt(budget, over, predictions)), None
    noise = ", within this text's noise" if 0 < abs(chosen.change) < 2 * chosen.change_error else ""
    loss = f"{100 * chosen.change:+.2f}% of perplexity{noise}; KL {chosen.kl:.3g}; top-1 agreement {100 * chosen.top1:.1f}%"
    said.append(f"{'Use' if over else 'Accuracy held: use'} {_name(chosen)} ({loss}).")
    return " ".join(said + _doubt(budget, [*over, chosen], predictions)), chosen


def _name(m: Measurement) -> str:
    """What was measured, in words: a scheme that changes no weight is not named."""
    return name_of(replace(m.variant, scheme="the stored codes") if m.weights_as_stored else m.variant)


def _doubt(budget: Budget, decisive: Sequence[Measurement], predictions: int) -> list[str]:
    """A sentence where what `decisive` come to may be chance."""
    if not (open_ := [m for m in decisive if not budget.decided(m)]):
        return []
    widest = max(open_, key=budget.error)
    error, wide = budget.error(widest), 2 * budget.error(widest) > budget.limit
    how = "is wider than the budget" if wide else "reaches across the budget"
    said = f"But this text is too short to tell: the error bar of {_name(widest)} (±{budget.said(error)}) {how}"
    if not budget.limit or not predictions:
        return [f"{said}."]
    target = (budget.limit if wide else error) / 2  # that is then no longer so, unless the loss is the budget
    tokens = _rounded(predictions * (error / target) ** 2)
    return [f"{said}; measure on more of it, or of a longer --text: --tokens {tokens} would make that ±{budget.said(target)}."]


def _rounded(count: float) -> int:
    """Up, to two digits."""
    unit = int(10 ** max(0, math.floor(math.log10(count)) - 1))
    return math.ceil(count / unit) * unit
