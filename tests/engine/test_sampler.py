"""Sampling against float64 numpy: what is kept, how often it is drawn, what penalties do to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import cases
from ops.sampled import drawn

from octavo import ops
from octavo.engine import sampler
from octavo.engine.sampler import logprobs_of, uniform
from octavo.engine.sampling_row import SamplingRow
from octavo.engine.token_history import Histories
from octavo.engine.token_rules import TokenRules
from octavo.messages import SamplingParams, StructuredOutput
from octavo.ops import reference
from octavo.platform import detect

PLATFORM = detect()
VOCAB, DRAWS, DEVICE = 40, 6_000, PLATFORM.device
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
INF = float("inf")


@pytest.fixture(autouse=True)
def bound() -> None:
    """Another module's tests may have bound a CPU's ops, which GPU memory would crash."""
    ops.bind(PLATFORM)


def sample(logits: torch.Tensor, rows: list[SamplingRow], *histories) -> torch.Tensor:
    return sampler.sample(logits.to(DEVICE), rows, *histories).cpu()


def row(seed: int = 0, prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), eos: tuple[int, ...] = (), **params):
    return SamplingRow(SamplingParams(**params), [*prompt, *output], len(prompt), seed, frozenset(eos))


def expected(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """Probabilities float64 [vocab] after the filters, written token by token."""
    scaled = logits.double().numpy() / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept = [i for i in order if probs[i] >= min_p * probs.max()][: top_k if top_k > 0 else None]
    total, mass, nucleus = sum(probs[i] for i in kept), 0.0, []
    for i in kept:  # the fewest tokens that reach top_p together
        nucleus.append(i)
        mass += probs[i] / total
        if mass >= top_p:
            break
    out = np.zeros(len(probs))
    out[nucleus] = probs[nucleus]
    return out / out.sum()


def assert_drawn_like(tokens: torch.Tensor, probs: np.ndarray) -> None:
    counts = np.bincount(tokens.numpy(), minlength=len(probs))
    assert not counts[probs == 0].any(), "a token outside the kept set was drawn"
    wanted = probs * counts.sum()
    common = wanted >= 5  # a count under 5 is not normal; those tokens are one cell together
    cells = [(counts[common], wanted[common]), ([counts[~common].sum()], [wanted[~common].sum()])]
    chi2 = sum(((np.array(c) - w) ** 2 / np.maximum(w, 1)).sum() for c, w in cells)
    freedom = max(common.sum(), 1)
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom), f"chi-square {chi2:.1f} with {freedom} degrees of freedom"


FILTERS = [
    {},
    dict(temperature=0.5),
    dict(temperature=2.5),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=VOCAB + 9),
    dict(top_p=0.3),
    dict(top_p=0.9),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(temperature=1.7, top_k=12, top_p=0.8),
    dict(temperature=0.7, top_p=0.95, min_p=0.05),
    dict(temperature=1.3, top_k=20, top_p=0.7, min_p=0.02),
]


@cases("filters", FILTERS, ids=str)
def test_distribution(filters):
    params = SamplingParams(**filters)
    rules = TokenRules(params, frozenset())
    rows = [SamplingRow(params, [1], 1, seed, rules=rules) for seed in range(DRAWS)]
    tokens = sample(LOGITS.repeat(DRAWS, 1), rows)
    assert_drawn_like(tokens, expected(LOGITS, **filters))


def test_distribution_along_one_request():
    """The places of one output are as independent as the seeds of many."""
    params = SamplingParams(top_p=0.9)
    history = [1] * 4000
    rows = [SamplingRow(params, history[: 1 + place], 1, 77) for place in range(len(history))]
    assert_drawn_like(sample(LOGITS.repeat(len(rows), 1), rows), expected(LOGITS, top_p=0.9))


def test_a_pending_token_has_its_place():
    """The draw, and how long an end is banned, go by the number of tokens before, whether their values are here or not."""
    history = [1, 4, 4]
    for params in (dict(), dict(top_p=0.9), dict(min_tokens=4, stop_token_ids=tuple(range(9, VOCAB))), dict(min_tokens=3)):
        known = [SamplingRow(SamplingParams(**params), [*history, 4], 1, seed, frozenset({7})) for seed in range(200)]
        pending = [SamplingRow(SamplingParams(**params), history, 1, seed, frozenset({7}), None, 1) for seed in range(200)]
        assert [r.num_output_tokens for r in pending] == [3] * 200
        drawn = [sample(LOGITS.repeat(200, 1), rows).tolist() for rows in (known, pending)]
        assert drawn[0] == drawn[1]


def test_what_holds_the_next_step_back():
    free = [dict(), dict(temperature=0), dict(top_p=0.5, seed=3), dict(logit_bias={3: 1.0}), dict(min_tokens=3)]
    free += [dict(repetition_penalty=1.1), dict(presence_penalty=0.1), dict(frequency_penalty=-0.1)]
    assert not any(row(**p).synchronous for p in free)
    assert [row(**p).plain for p in free] == [True] * 3 + [False] * 5
    assert all(row(**p).synchronous for p in (dict(logprobs=0), dict(prompt_logprobs=0)))
    bound = row(structured=StructuredOutput("json_object"))
    bound.grammar = object()
    assert (bound.synchronous, bound.plain) == (True, False)


@cases("vocab", [300, 6000])
@cases("spread", [0.2, 1.5, 4.0], ids=["flat", "some", "few"])
def test_what_is_drawn_is_what_sorting_all_would_give(vocab, spread):
    """Also of equal logits, of which BF16 has many, and where top_p keeps more tokens than are looked at first."""
    params = [{}, *FILTERS[4:], dict(top_k=vocab - 1, top_p=0.99), dict(min_p=1e-4), dict(top_k=700, min_p=1e-3)]
    params = [dict(temperature=0.8) | p for p in (*params, dict(top_p=0.999))]
    rows = [row(seed, **p) for seed in range(30) for p in params]
    logits = (torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(1)) * spread).bfloat16().float().to(DEVICE)
    tokens = sample(logits.clone(), rows).tolist()
    probs = (logits / torch.tensor([[r.params.temperature] for r in rows], device=DEVICE)).softmax(-1).cpu()
    kept = zip(*((r.params.top_k or vocab, r.params.top_p, r.params.min_p) for r in rows), strict=True)
    u = torch.tensor([uniform(r.seed, 0) for r in rows], dtype=torch.float64)
    want = drawn(probs, u, ops.Filters(*(torch.tensor(values, dtype=torch.float32) for values in kept), vocab)).tolist()
    wrong = [of.params for of, token, other in zip(rows, tokens, want, strict=True) if token != other]
    assert len(wrong) <= len(rows) // 200, wrong  # the last bit of a sum may move what top_p keeps


@pytest.mark.parametrize("draw", [ops.sample, reference.sample], ids=["here", "reference"])
def test_what_has_no_probability_is_never_drawn(draw):
    logits = torch.full((4, 1000), -INF)
    for i, at in enumerate(([999], [0], [511], [255, 256])):
        logits[i, at] = 3.0
    one = torch.ones(4, device=DEVICE)
    for u in (0.0, 1e-300, 0.5, 1 - 2**-53):
        found = draw(logits.clone().to(DEVICE), one, one.double() * u, None).tolist()
        assert found[:3] == [999, 0, 511]
        assert found[3] == (255 if u < 0.5 else 256)


def test_uniform_numbers():
    table = np.array([[uniform(seed, place) for place in range(60)] for seed in range(-100, 300)])
    assert table.min() >= 0
    assert table.max() < 1
    assert len(np.unique(table)) == table.size
    assert abs(table.mean() - 0.5) < 0.01
    assert abs(table.var() - 1 / 12) < 0.005
    for pair in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:])):  # neighbours by place, by seed
        assert abs(np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1]) < 0.03
    assert 0 <= uniform(2**64 - 1, 10**6) < 1
    assert 0 <= uniform(-(2**63), 0) < 1


def test_a_row_is_drawn_alike_whatever_is_beside_it():
    params = [dict(temperature=0), *FILTERS, dict(repetition_penalty=1.5), dict(logit_bias={3: 4.0}), dict(logprobs=2)]
    rows = [row(seed, output=(4, 5), **p) for seed in range(40) for p in params]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    alone = torch.cat([sample(logits[i : i + 1].clone(), [one]) for i, one in enumerate(rows)])
    assert sample(logits.clone(), rows).tolist() == alone.tolist()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(6))
    assert sample(logits[order].clone(), [rows[i] for i in order]).tolist() == alone[order].tolist()
    greedy = [i for i, one in enumerate(rows) if one.params.greedy]
    assert alone[greedy].tolist() == logits[greedy].argmax(-1).tolist()


def adjusted(logits: torch.Tensor, of: SamplingRow) -> np.ndarray:
    """Bias, ban, penalties in float64, token by token."""
    p, x = of.params, logits.double().numpy().copy()
    output = list(of.token_ids[of.num_prompt_tokens :])
    for token in range(len(x)):
        x[token] += (p.logit_bias or {}).get(token, 0.0)
        if len(output) < p.min_tokens and (token in of.eos_token_ids or token in p.stop_token_ids):
            x[token] = -INF
        if token in of.token_ids:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty * (token in output)
    return x


HISTORY = dict(prompt=(7, 8, 8, 9), output=(3, 9, 3, 3, 11), eos=(5, 6))
ADJUSTMENTS = [
    dict(repetition_penalty=1.8),
    dict(repetition_penalty=0.4),
    dict(presence_penalty=1.5),
    dict(frequency_penalty=-1.2),
    dict(presence_penalty=-0.7, frequency_penalty=0.9),
    dict(logit_bias={0: 5.0, 5: -100.0, 8: 2.5}),
    dict(min_tokens=6, stop_token_ids=(12, 10**6)),  # a stop token that no model has must do no harm
    dict(min_tokens=5),  # reached: nothing is banned
    dict(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 9.0, 5: 8.0}, min_tokens=9),
]


@cases("params", ADJUSTMENTS, ids=str)
def test_adjustments_against_numpy(params):
    want = adjusted(LOGITS, row(**HISTORY, **params))
    logits = torch.tensor(want)
    drawn = sample(LOGITS.repeat(3000, 1), [row(seed, **HISTORY, **params) for seed in range(3000)])
    assert_drawn_like(drawn, expected(logits))
    greedy = sample(LOGITS.repeat(2, 1), [row(**HISTORY, **params, temperature=0), row(temperature=0)])
    assert greedy.tolist() == [int(want.argmax()), int(LOGITS.argmax())]


def test_tokens_that_only_the_device_knows():
    """Penalties go by them as if the host knew them; requests come, wait, go, and outgrow their room."""
    params = [dict(repetition_penalty=1.7), dict(presence_penalty=0.9, frequency_penalty=0.4), dict(frequency_penalty=-0.3)]
    generator, histories, waiting = torch.Generator().manual_seed(2), Histories(DEVICE), {}
    told = {f"r{i}": list(range(1 + 40 * i % 300 + 400 * (i == 3))) for i in range(20)}  # prompt and output as they really are
    prompts = {name: len(ids) for name, ids in told.items()}
    for step in range(58):
        names = [name for i, name in enumerate(told) if (step + i) % 3 and step < 40 + i]
        known, pending = [], []
        for i, name in enumerate(names):
            of = SamplingParams(temperature=(step + i) % 2, **params[int(name[1:]) % 3])
            late = waiting.get(name, 0)
            ids = [token % VOCAB for token in told[name]]
            known.append(SamplingRow(of, ids, prompts[name], step))
            pending.append(SamplingRow(of, ids[: len(ids) - late], prompts[name], step, num_pending=late))
        logits = (torch.randn(len(names), VOCAB, generator=generator) * 2).to(DEVICE)
        tokens = sample(logits.clone(), pending, histories, names).tolist()
        assert tokens == sample(logits.clone(), known).tolist()
        for i, (name, token) in enumerate(zip(names, tokens, strict=True)):
            told[name].append(token)
            waiting[name] = (step + i) % 2
        if step % 10 == 9:
            histories.forget(names[0])
            waiting[names[0]] = 0
            histories.forget("nobody")


def test_extremes():
    logits = torch.full((8, VOCAB), -INF)
    logits[0, 9] = 0.0  # all mass on one token
    logits[1] = torch.arange(VOCAB) * 1e-3  # nearly even: a tiny top_p or temperature still takes the best
    logits[2], logits[3] = logits[1], logits[1]
    logits[4, [4, 30]] = torch.tensor([1.0, -1.0])
    logits[5, VOCAB - 1] = 1e30
    logits[6] = LOGITS * 1e4
    logits[7, :2] = 88.0
    params = [{}, dict(top_p=1e-9), dict(temperature=2e-5), dict(min_p=1), dict(top_k=10, top_p=0.99), {}, dict(top_p=0.5)]
    want = [9, VOCAB - 1, VOCAB - 1, VOCAB - 1, None, VOCAB - 1, int(LOGITS.argmax()), None]
    fourth, last = set(), set()
    for seed in range(60):
        tokens = sample(logits.clone(), [row(seed, **p) for p in [*params, {}]]).tolist()
        fourth.add(tokens[4])
        last.add(tokens[7])
        assert [t for t, w in zip(tokens, want, strict=True) if w is not None] == [w for w in want if w is not None]
    assert (fourth, last) == ({4, 30}, {0, 1})


def test_a_rare_token_at_either_end_is_drawn_as_often_as_it_should():
    logits = torch.zeros(VOCAB)
    logits[[0, VOCAB - 1]] = -4.0
    assert_drawn_like(sample(logits.repeat(DRAWS, 1), [row(seed) for seed in range(DRAWS)]), expected(logits))


def test_logprobs_of():
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(9)) * 5
    tokens, counts = torch.tensor([0, 39, 7, 7, int(logits[4].argmax())]), [3, 0, VOCAB + 5, 1, 2]
    exact = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    for i, (chosen, *top) in enumerate(logprobs_of(logits, tokens, counts)):
        order = exact[i].argsort(descending=True).tolist()
        assert chosen.token_id == tokens[i]
        assert chosen.rank == order.index(chosen.token_id) + 1
        assert [t.token_id for t in top] == order[: counts[i]]
        assert [t.rank for t in top] == list(range(1, len(top) + 1))
        for entry in (chosen, *top):
            assert entry.logprob == pytest.approx(float(exact[i, entry.token_id]), abs=1e-5)
