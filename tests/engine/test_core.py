"""The whole engine on a tiny random checkpoint: alone or together, in parts or preempted, a request's tokens are the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import cases
from conftest import COMMON, tokens
from engine.books import check_books
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from octavo import LLM
from octavo.config import EngineConfig
from octavo.engine.block_pool import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.grammar import GrammarSpeed
from octavo.engine.scheduler import Scheduler
from octavo.engine.step_tokens import StepTokens
from octavo.errors import OctavoError
from octavo.messages import EngineRequest, EngineStats, SamplingParams, TokenOutput
from octavo.ops.cpu import library

LENGTH = 100  # max_model_len
ENGINE = dict(dtype="float32", device="cpu", threads=1, block_size=4, max_model_len=LENGTH)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    """transformers' model and where it is saved."""
    path = tmp_path_factory.mktemp("tiny")
    return saved(lambda: LlamaForCausalLM(LlamaConfig(**COMMON)), path), path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Where a model with experts in all layers but one is saved."""
    path = tmp_path_factory.mktemp("mixture")
    experts = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=16, mlp_only_layers=[1])
    saved(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON | experts)), path)
    return path


def saved(make: Callable[[], PreTrainedModel], path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)  # at the default 0.02 every output is one token over and over
    model.save_pretrained(path)
    return model


@pytest.fixture
def make(reference):
    def core(blocks: int | None = None, **options) -> EngineCore:
        made = EngineCore(EngineConfig(**dict(model=str(reference[1])) | ENGINE | options))
        if blocks is not None:
            pool = BlockPool(blocks, 4, made.scheduler.pool.prefix_caching)
            made.scheduler = Scheduler(pool, 256, made.runner.max_num_batched_tokens, LENGTH)
        return made

    return core


def request(name: str, ids: list[int], eos: tuple[int, ...] = (), grammar: str | None = None, **params) -> EngineRequest:
    return EngineRequest(name, ids, SamplingParams(**{"max_tokens": 24} | params), frozenset(eos), grammar)


def run(core: EngineCore, requests: list[EngineRequest], apart: int = 0) -> tuple[dict[str, list[TokenOutput]], EngineStats]:
    """Outputs by request, and the sums of the steps' counters. `apart`: steps between arrivals."""
    queue, outputs, sums, step = list(requests), {r.request_id: [] for r in requests}, EngineStats(), 0
    while queue or core.has_work():
        while queue and step >= apart * (len(requests) - len(queue)):
            core.add(queue.pop(0))
        found, stats = core.step()
        for output in found:
            outputs[output.request_id].append(output)
        sums.num_preemptions += stats.num_preemptions
        sums.prefix_cache_hits += stats.prefix_cache_hits
        sums.image_queries, sums.image_hits = sums.image_queries + stats.image_queries, sums.image_hits + stats.image_hits
        step += 1
        assert step < 3000
    assert not core.generations
    check_books(core.scheduler.pool, [])
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0)
    return outputs, sums


def token_ids(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    assert not [o.error for each in outputs.values() for o in each if o.error]
    return {name: [token for o in each for token in o.token_ids] for name, each in outputs.items()}


SAMPLINGS = [
    dict(temperature=0),
    dict(seed=1),
    dict(seed=2, top_p=0.9, temperature=0.8),
    dict(temperature=0, repetition_penalty=1.3),
    dict(seed=3, top_k=20, presence_penalty=0.5),
    dict(seed=4, min_p=0.05, logit_bias={5: 3.0}),
]
SHARED = tokens(21, seed=99)  # a prefix of several prompts
TWELVE = [
    request(str(i), (SHARED if i % 3 == 0 else []) + tokens(n, seed=i), **SAMPLINGS[i % 6], max_tokens=20)
    for i, n in enumerate([1, 50, 7, 4, 33, 70, 16, 2, 9, 40, 3, 12])
]
SCHEMES = [(None, "auto"), ("fp8", "fp8"), ("ptpc_fp8", "fp8_e5m2"), ("fp8_block", "fp8_per_token_head")]


@pytest.mark.parametrize(("scheme", "kv"), SCHEMES)
def test_company_changes_nothing(make, scheme, kv):
    """The tokens are the same. FP8 lets one request in twelve differ: a sum taken in another order is another FP32 number by
    1e-7, and where that lies on the border of two FP8 codes the step between them is 1e-1. A wrong engine changes most."""

    def assert_same(outputs, allowed=0 if kv == "auto" else 1):
        got = token_ids(outputs)
        assert got.keys() == alone.keys()
        assert sum(got[name] != alone[name] for name in alone) <= allowed, (got, alone)

    options = dict(quantization=scheme, kv_cache_dtype=kv)
    single = make(enable_prefix_caching=False, **options)
    alone = {name: ids for one in TWELVE for name, ids in token_ids(run(single, [one])[0]).items()}
    assert all(len(ids) == 20 for ids in alone.values())
    assert len({token for ids in alone.values() for token in ids}) > 50, "outputs too dull to tell a mistake by"

    assert_same(run(single, TWELVE)[0])
    assert_same(run(make(max_num_batched_tokens=11, **options), TWELVE, apart=2)[0])  # in parts
    preempted, sums = run(make(blocks=26, max_num_batched_tokens=30, **options), TWELVE)
    assert_same(preempted)
    assert sums.num_preemptions > 3

    cached = make(**options)
    assert_same(run(cached, TWELVE)[0])
    again, sums = run(cached, TWELVE)
    assert_same(again)
    assert sums.prefix_cache_hits > 150
    for one in TWELVE:
        assert again[one.request_id][0].num_cached_tokens == (len(one.prompt_token_ids) - 1) // 4 * 4


def test_greedy_tokens_are_transformers(reference):
    model, path = reference
    llm = LLM(path, **ENGINE)
    prompts = [tokens(n, seed=n) for n in (1, 5, 30, 64)]
    for prompt, out in zip(prompts, llm.generate(prompts, SamplingParams(temperature=0, max_tokens=30)), strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
        assert out.outputs[0].token_ids == want[0, len(prompt) :].tolist()


def test_seeds(make):
    ids = tokens(10)
    drawn = [request(name, ids, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", None), ("e", None))]
    first, second = (token_ids(run(make(), drawn)[0]) for _ in range(2))
    assert first == second  # an engine can be repeated, requests without a seed among it
    assert first["a"] == first["b"]
    assert len({tuple(out) for out in first.values()}) == 4
    assert token_ids(run(make(seed=5), drawn)[0])["d"] != first["d"]


def test_n_sequences(reference):
    llm = LLM(reference[1], **ENGINE)
    (three,) = llm.generate([tokens(9)], SamplingParams(n=3, seed=5, prompt_logprobs=0))
    ones = [llm.generate([tokens(9)], SamplingParams(seed=5 + i))[0].outputs[0].token_ids for i in range(3)]
    assert [o.token_ids for o in three.outputs] == ones
    assert len(three.prompt_logprobs) == 9


def test_abort(make):
    core = make(enable_prefix_caching=False)
    alone = token_ids(run(core, TWELVE[:3])[0])
    got = {r.request_id: [] for r in TWELVE[:3]}
    for r in TWELVE[:3]:
        core.add(r)
    core.add(request("long", tokens(90)))
    core.add(request("waits", tokens(5)))
    for step in range(40):
        if step == 1:
            core.abort("waits")
        if step == 5:
            before = core.scheduler.pool.num_free
            core.abort("long")
            assert core.scheduler.pool.num_free - before == 24  # 90 prompt and 5 more tokens, 4 a block
            check_books(core.scheduler.pool, [r.block_ids for r in core.scheduler.running])
        for output in core.step()[0]:
            if output.request_id in got:
                got[output.request_id] += output.token_ids
    assert got == alone
    core.abort("long")
    core.abort("nobody")
    assert not core.has_work()
    assert not core.generations
    assert core.step()[0] == []
    assert token_ids(run(core, TWELVE[:3])[0]) == alone


def test_ends(make):
    core = make()
    ids = tokens(12, seed=4)

    def end(eos=(), prompt=ids, **params):
        outputs = run(core, [request("x", prompt, eos, **dict(temperature=0) | params)])[0]["x"]
        return [token for o in outputs for token in o.token_ids], outputs[-1].finish_reason, outputs[-1].stop_reason

    plain = end()[0]
    assert end() == (plain, "length", None)
    at = next(i for i in range(4, 24) if plain[i] not in plain[:i])
    token = plain[at]
    assert end(stop_token_ids=[token]) == (plain[: at + 1], "stop", token)
    assert end(eos=(token, 3)) == (plain[: at + 1], "stop", None)
    assert end(eos=(token,), ignore_eos=True) == (plain, "length", None)
    assert end(eos=(token,), stop_token_ids=[token], ignore_eos=True) == (plain[: at + 1], "stop", token)
    assert end(max_tokens=1) == (plain[:1], "length", None)
    for banned in (dict(eos=(token,)), dict(stop_token_ids=[token, 10**6])):
        later = end(min_tokens=at + 3, **banned)[0]
        assert later[:at] == plain[:at]
        assert token not in later[: at + 2]
        assert len(later) >= at + 3
    full, reason, _ = end(max_tokens=None)
    assert (len(ids) + len(full), reason, full[:24]) == (LENGTH, "length", plain)
    assert len(end(max_tokens=10**9)[0]) == len(full)
    assert len(end(prompt=tokens(LENGTH - 1))[0]) == 1
    (failed,) = run(core, [request("x", tokens(LENGTH))])[0]["x"]
    assert (failed.finish_reason, failed.token_ids) == ("abort", [])
    assert f"1 to {LENGTH - 1} tokens" in failed.error
    assert end()[0] == plain


# A step ahead

PLAIN = [one for i, one in enumerate(TWELVE) if i % 6 in (0, 1, 2, 5)]


def ends(outputs: dict[str, list[TokenOutput]]) -> dict[str, tuple]:
    """Tokens, finish reason and stop reason by request; tokens come one by one and nothing comes after the end."""
    assert all(len(o.token_ids) == 1 for each in outputs.values() for o in each)
    assert all([o.finish_reason for o in each[:-1]] == [None] * (len(each) - 1) for each in outputs.values())
    return {name: (token_ids(outputs)[name], each[-1].finish_reason, each[-1].stop_reason) for name, each in outputs.items()}


def run_ahead(core: EngineCore, requests: list[EngineRequest], apart: int = 0):
    """`run`, and the part of its steps that left another one on the device."""
    step, left = core.step, []

    def counted():
        found = step()
        left.append(bool(core.in_flight))
        return found

    core.depth, core.step = 2, counted
    outputs, sums = run(core, requests, apart)
    core.step = step
    return outputs, sums, sum(left) / len(left)


@pytest.mark.parametrize(
    ("options", "apart"),
    [({}, 0), (dict(max_num_batched_tokens=11), 2), (dict(blocks=26, max_num_batched_tokens=30), 0)],
    ids=str,
)
def test_ahead_the_tokens_are_the_same(make, options, apart):
    want = ends(run(make(enable_prefix_caching=False), PLAIN)[0])
    core = make(**options)
    for _ in range(2):  # then with a prefix cache
        outputs, sums, part = run_ahead(core, PLAIN, apart)
        assert ends(outputs) == want
        assert part > 0.6
        assert (sums.num_preemptions > 0) == ("blocks" in options)
    assert sums.prefix_cache_hits > (0 if "blocks" in options else 100)


def test_ahead_ends(make):
    """Those by length are foreseen. The others are seen a step late, and the token after them is dropped."""
    plain = token_ids(run(make(), PLAIN)[0])
    requests = []
    for i, one in enumerate(PLAIN):
        at = next(at for at in range(2 + i, 20) if plain[one.request_id][at] not in plain[one.request_id][:at])
        token = plain[one.request_id][at]
        kinds = [dict(eos=(token, 3)), dict(stop_token_ids=[token]), dict(eos=(token,), ignore_eos=True)]
        kinds += [dict(eos=(token,), min_tokens=at + 1 + k) for k in (0, 1, 4)] + [dict(max_tokens=1 + i)]
        for k, kind in enumerate(kinds):
            params = SAMPLINGS[int(one.request_id) % 6] | dict(max_tokens=20) | kind
            requests.append(request(f"{i}.{k}", one.prompt_token_ids, **params))
    requests.append(request("all", tokens(3), temperature=0, max_tokens=None))
    want = ends(run(make(), requests, apart=1)[0])
    for options in ({}, dict(blocks=30, max_num_batched_tokens=50)):
        outputs, sums, part = run_ahead(make(**options), requests, apart=1)
        assert ends(outputs) == want
        assert part > 0.4
    assert sums.num_preemptions
    assert {(reason, stop is None) for _, reason, stop in want.values()} == {("stop", True), ("stop", False), ("length", True)}
    assert all(want[f"{i}.0"][:2] == want[f"{i}.1"][:2] for i in range(len(PLAIN)))


class Chain:
    """Stands in for a grammar: a token's remainder by 5 is one more than that of the token before."""

    finished = False
    error = None
    speed = GrammarSpeed()

    def __init__(self, *_):
        self.last = 0

    def forbidden(self) -> torch.Tensor:
        return torch.arange(256) % 5 != (self.last + 1) % 5

    def find(self) -> None:
        pass

    def accept(self, token: int) -> None:
        self.last = token


def test_ahead_beside_rows_that_cannot(make, monkeypatch):
    """Grammars and log-probabilities hold the engine back as long as they are there, and no longer; penalties do not."""
    slow = [dict(repetition_penalty=1.4), dict(frequency_penalty=1), dict(grammar="for Chain")]
    slow += [dict(logprobs=2), dict(prompt_logprobs=1)]
    requests = list(PLAIN)
    for i, kind in enumerate(slow * 2):
        requests.insert(3 * i // 2, request(f"slow{i}", tokens(5 + 6 * i, seed=i), seed=i, max_tokens=4 + i % 3, **kind))
    requests.append(request("last", tokens(4), seed=9, max_tokens=40))
    want = None
    for options, apart in (({}, 2), (dict(max_num_batched_tokens=13), 3), (dict(blocks=30), 1)):
        for ahead in (False, True) if want is None else (True,):
            core = make(**options, enable_prefix_caching=False)
            monkeypatch.setattr(core.grammars.compiler, "compile", Chain)
            outputs, sums, part = run_ahead(core, requests, apart) if ahead else (*run(core, requests, apart), 0)
            found = ends(outputs)
            beside = {name: [(o.logprobs, o.prompt_logprobs) for o in each] for name, each in outputs.items()}
            if not ahead:
                want, entries = found, beside
                continue
            assert found == want
            assert 0.1 < part < 0.9
            for name, each in entries.items():
                assert flat(beside[name]) == pytest.approx(flat(each), abs=1e-4)
    assert sums.num_preemptions
    for name in ("slow2", "slow7"):
        chain = [0, *want[name][0]]
        assert all(b % 5 == (a + 1) % 5 for a, b in pairwise(chain))


def flat(entries) -> list[float]:
    """Tokens, ranks and log-probabilities of nested entries, one after the other."""
    if isinstance(entries, list | tuple):
        return [value for entry in entries for value in flat(entry)]
    return [] if entries is None else [entries]


@pytest.mark.parametrize("seed", range(4))
def test_ahead_aborts(make, seed):
    core, rng = make(blocks=40, enable_prefix_caching=seed % 2 == 0), random.Random(seed)
    alone = token_ids(run(core, PLAIN)[0])
    got, gone = {r.request_id: [] for r in PLAIN}, set()
    core.depth = 2
    for one in PLAIN:
        core.add(one)
    while core.has_work():
        for output in core.step()[0]:
            assert output.request_id not in gone
            got[output.request_id] += output.token_ids
        check_books(core.scheduler.pool, [r.block_ids for r in core.scheduler.running])
        if rng.random() < 0.15 and len(gone) < 5:
            name = rng.choice(PLAIN).request_id
            core.abort(name)
            gone.add(name)
    check_books(core.scheduler.pool, [])
    assert not core.generations
    assert not core.runner.histories._places
    assert all(tokens == alone[name][: len(tokens)] for name, tokens in got.items())
    assert [name for name in alone if name not in gone and got[name] != alone[name]] == []


@pytest.mark.parametrize("again", [True, False])
def test_ahead_an_abort_while_its_step_is_in_flight(make, again):
    """Also of prompt logprobs that are there and not handed out, and of an id that is used again at once."""
    core = make()
    want = token_ids(run(core, [request("x", tokens(9), seed=1)])[0])
    core.depth = 2
    core.add(request("y", tokens(7), seed=2))
    core.step()
    core.add(request("x", tokens(30), seed=2, prompt_logprobs=1))
    core.step()
    assert [item.request.request_id for item in core.in_flight[0].schedule.items] == ["y", "x"]
    core.abort("x")
    if again:
        core.add(request("x", tokens(3), seed=2))
    assert {o.request_id for o in core.step()[0]} == {"y"}
    core.step()
    core.abort("x")
    core.abort("y")
    assert core.has_work()  # though only a step whose tokens nobody wants
    core.add(request("x", tokens(LENGTH)))
    (failed,) = core.step()[0]
    assert failed.finish_reason == "abort"
    core.abort("x")
    assert not core.has_work()
    assert token_ids(run(core, [request("x", tokens(9), seed=1)])[0]) == want


@pytest.mark.parametrize("at", [1, 4])
def test_ahead_after_an_interrupt_the_engine_is_idle(make, monkeypatch, at):
    core, calls = make(blocks=26, enable_prefix_caching=False), 0
    want = token_ids(run(core, PLAIN)[0])
    core.depth, read = 2, StepTokens.to_host

    def interrupted(step):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return read(step)

    monkeypatch.setattr(StepTokens, "to_host", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(core, PLAIN)
    for one in PLAIN:
        core.abort(one.request_id)
    outputs, sums = run(core, PLAIN)
    assert token_ids(outputs) == want
    assert sums.num_preemptions


def check_logprobs(entries, log_probs: torch.Tensor, chosen: list[int], count: int) -> None:
    """`entries[i]` against row i of transformers' log-probabilities."""
    assert len(entries) == len(chosen) == len(log_probs)
    for entry, token, row in zip(entries, chosen, log_probs, strict=True):
        assert entry[0].token_id == token
        assert entry[0].rank == int((row > row[token]).sum()) + 1
        assert [e.token_id for e in entry[1:]] == row.topk(count).indices.tolist()
        assert [e.rank for e in entry[1:]] == list(range(1, count + 1))
        assert [e.logprob for e in entry] == pytest.approx([float(row[e.token_id]) for e in entry], abs=1e-3)


@pytest.mark.parametrize("options", [{}, dict(max_num_batched_tokens=5), dict(blocks=22, max_num_batched_tokens=6)], ids=str)
def test_logprobs(make, reference, options):
    """Of prompt and output, of the raw logits; also in parts, and of a prompt that is preempted half-way."""
    core = make(**options)
    several = [request("a", tokens(5, 1), temperature=0, max_tokens=50), request("b", tokens(2, 2), seed=3, max_tokens=50)]
    several.append(request("c", tokens(61, 3), seed=1, temperature=1.5, prompt_logprobs=2, logprobs=3, frequency_penalty=1))
    run(core, several)  # fills the prefix cache, which must not cost a prompt logprobs
    outputs, sums = run(core, several)
    assert (sums.num_preemptions > 0) == ("blocks" in options)
    out = outputs["c"]
    output = [o.token_ids[0] for o in out]
    ids = several[2].prompt_token_ids + output
    with torch.no_grad():
        exact = reference[0](torch.tensor([ids])).logits[0].double().log_softmax(-1)
    first, *prompt = out[0].prompt_logprobs
    assert first is None
    check_logprobs(prompt, exact[:60], ids[1:61], 2)
    check_logprobs([o.logprobs[0] for o in out], exact[60:-1], output, 3)
    assert all(o.prompt_logprobs is None for o in out[1:])
    assert all(o.logprobs is None and o.prompt_logprobs is None for o in outputs["a"])
    assert len({o.logprobs[0][0].rank for o in out}) > 3


def test_kv_scales(make):
    def scales(core):
        return [float(s) for layer in core.runner.model.attention_layers() for s in (layer.k_scale, layer.v_scale)]

    requests = [request(str(i), tokens(40, i), temperature=0, prompt_logprobs=0, max_tokens=1) for i in range(6)]

    def logprobs(core):
        outputs = run(core, requests)[0]
        return torch.tensor([[p[0].logprob for p in outputs[r.request_id][0].prompt_logprobs[1:]] for r in requests])

    unit, exact = make(kv_cache_dtype="fp8"), make()
    for kv, limit in (("fp8", 448), ("fp8_e5m2", 57344)):
        measured, again = (make(kv_cache_dtype=kv, calculate_kv_scales=True) for _ in range(2))
        assert scales(measured) == scales(again)
        assert all(0 < scale * limit < 100 for scale in scales(measured))
        assert len(set(scales(measured))) == 6
        assert "KV scales measured" in str(measured.info.report)
        assert (logprobs(measured) - logprobs(exact)).abs().mean() < (0.1 if kv == "fp8" else 0.2)
        assert measured.scheduler.pool.num_free == measured.scheduler.pool.num_blocks
    assert scales(unit) == [1.0] * 6
    assert "KV scales are 1.0" in str(unit.info.report)
    assert "KV scales" not in str(exact.info.report)
    assert "--calculate-kv-scales measured nothing: --kv-cache-dtype auto" in str(make(calculate_kv_scales=True).info.report)
    assert (logprobs(unit) - logprobs(exact)).abs().mean() < 0.1


def test_what_is_left_out_of_quantization(make):
    def schemes(**options):
        lines = make(quantization="ptpc_fp8", **options).info.report
        return {tuple(line.split()[:2]) for line in lines if line.startswith("  ")}

    other = {("embedding", "bf16"), ("norms", "bf16")}
    plain = other | {("attention", "ptpc_fp8"), ("mlp", "ptpc_fp8")}
    assert schemes() == plain | {("lm_head", "bf16")}
    assert schemes(quantize_lm_head=True) == plain | {("lm_head", "ptpc_fp8")}
    some = schemes(quantization_ignore=("re:.*self_attn", "model.layers.1.*"))
    assert some == other | {("attention", "bf16"), ("mlp", "bf16"), ("mlp", "ptpc_fp8"), ("lm_head", "bf16")}


@cases(
    ("options", "sentence"),
    [
        (dict(quantization="fp8", quantization_ignore=("no_such_proj",)), "'no_such_proj' matches no layer"),
        (dict(quantization="fp8", quantization_ignore=("re:(",)), "not a regular expression"),
        (dict(tensor_parallel_size=2), "--tensor-parallel-size is for octavo serve, chat, bench and LLM"),
        (dict(max_model_len=513), "--max-model-len 513 is over the 512 positions .* at most 512"),
        (dict(quantization="ptcp_fp8"), "did you mean 'ptpc_fp8'"),
    ],
)
def test_options_that_cannot_be(make, options, sentence):
    with pytest.raises(OctavoError, match=sentence):
        make(**options)


@pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")
@cases(("kv", "experts"), [("auto", False), ("fp8_per_token_head", False), ("auto", True)], ids=["auto", "fp8", "experts"])
@cases("scheme", [None, "ptpc_fp8", "fp8_block"])
def test_recorded_steps_give_what_the_model_gives(
    scheme: str | None, kv: str, experts: bool, make, mixture: Path, reference
) -> None:
    """Bit for bit: logprobs are compared too. Requests come and go, so that every size of 1 to 6 comes again."""
    model = str(mixture if experts else reference[1])
    options = dict(model=model, quantization=scheme, kv_cache_dtype=kv, dtype="bfloat16", max_num_seqs=6)
    found = []
    for eager in (False, True):
        core = make(enforce_eager=eager, **options)
        assert (core.runner.graphs is None) == eager
        requests = [request(f"{n}", tokens(5 + n, seed=n), logprobs=2, temperature=0, max_tokens=4 + 3 * n) for n in range(9)]
        outputs, _ = run(core, requests, apart=2)
        found.append({name: [(o.token_ids, o.logprobs) for o in each] for name, each in outputs.items()})
        if not eager:
            assert len(core.runner.graphs) >= 5
    assert found[0] == found[1]


@pytest.mark.parametrize("eager", [False, True])
def test_rotary_rows_may_be_ahead_of_positions(make, monkeypatch, eager):
    """Attention sees only how far apart rows are, so a request whose rows are all 7 ahead, in prefill and decode, gets the same
    tokens; one whose rows are ahead in prefill alone does not."""
    prompt = list(range(20, 50))
    want = token_ids(run(make(enforce_eager=eager), [request("x", prompt)])[0])["x"]
    asked = replace(request("x", prompt), rotary_delta=7)
    core = make(enforce_eager=eager)
    rows = []
    turned, layer = core.runner.model.attention_layers()[0]._rope, core.runner.model.attention_layers()[0]
    monkeypatch.setattr(
        layer, "_rope", lambda batch: (rows.append((batch.rotary_rows - batch.positions).tolist()), turned(batch))[1]
    )
    assert token_ids(run(core, [asked])[0])["x"] == want
    assert {delta for step in rows for delta in step} == {7}
    core, found = make(enforce_eager=eager), []
    core.add(asked)
    while core.has_work():
        found += [token for output in core.step()[0] for token in output.token_ids]
        for sequence in core.scheduler.running:
            sequence.rotary_delta = 0
    assert len(found) == len(want)
    assert found != want
