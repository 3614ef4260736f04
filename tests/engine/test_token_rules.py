"""Tokens that a request forbids, and prefixes that it does not share, through an engine."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import LLM, SamplingParams
from octavo.demo import MODEL_DIR
from octavo.engine.block_pool import ROOT, BlockPool, block_hash, root_of
from octavo.engine.token_rules import BadWords, TokenRules
from octavo.errors import InvalidRequest
from octavo.frontend.requests import engine_requests
from octavo.messages import EngineInfo, StructuredOutput
from octavo.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(device="cpu", threads=1, cpu_kv_cache_gib=0.1)


def generated(llm: LLM, prompt="def read(self", **params):
    wanted = SamplingParams(**dict(temperature=0, max_tokens=8) | params)
    return llm.generate(prompt, wanted, use_tqdm=False)[0].outputs[0]


def test_bad_words_of_tokens_that_the_model_does_not_have(llm, monkeypatch):
    """As a tokenizer may, whose vocabulary is larger; and those that it makes no token of. They ended the engine."""
    encode, beyond = llm.tokenizer.encode, llm.info.vocab_size + 3
    known = {"<extra>": [beyond], " <extra>": [7, beyond], "\u200b": [], " \u200b": []}
    monkeypatch.setattr(
        llm.tokenizer, "encode", lambda text, *how, **more: known[text] if text in known else encode(text, *how, **more)
    )
    assert generated(llm, bad_words=["<extra>", "\u200b"]).token_ids == generated(llm).token_ids


def test_bad_words(llm):
    plain = generated(llm)
    assert " size" in plain.text
    assert "size" not in generated(llm, bad_words=[" size", "size"]).text
    assert generated(llm, bad_words=["never written"]).token_ids == plain.token_ids


def test_a_bad_word_of_several_tokens_loses_its_last_one(llm):
    encode = llm.get_tokenizer().encode
    plain = generated(llm)
    first, second = plain.token_ids[:2]
    word = llm.get_tokenizer().decode([first, second])
    assert encode(word) in ([first, second], encode(" " + word.lstrip())), "the demo model's greedy start is one word"
    banned = generated(llm, bad_words=[word])
    assert banned.token_ids[0] == first  # the beginning alone is allowed
    assert banned.token_ids[1] != second


def test_a_bad_word_of_tokens_that_the_model_does_not_have():
    """A tokenizer with added tokens has more than config.json counts. No such token is ever sampled."""
    rules = TokenRules(SamplingParams(), bad_words=[(9,), (3,), (1, 8), (1, 2)])
    logits = torch.zeros(8)
    BadWords(rules).forbid(logits, [5, 1], 1)
    assert logits.isinf().nonzero().flatten().tolist() == [2, 3]


def test_only_allowed_tokens(llm):
    for params in (dict(), dict(temperature=1, seed=3, top_k=5), dict(frequency_penalty=1.0)):
        assert set(generated(llm, allowed_token_ids=[70, 71], ignore_eos=True, **params).token_ids) <= {70, 71}


def test_a_neighbour_is_free(llm):
    both = [SamplingParams(temperature=0, max_tokens=8), SamplingParams(temperature=0, max_tokens=8, allowed_token_ids=[70])]
    free, bound = llm.generate(["def read(self"] * 2, both, use_tqdm=False)
    assert free.outputs[0].token_ids == generated(llm).token_ids
    assert bound.outputs[0].token_ids == [70] * 8


@pytest.mark.parametrize(
    "params",
    [
        dict(allowed_token_ids=[0], min_tokens=4),  # the end alone, and not before four tokens
        dict(allowed_token_ids=[70], structured=StructuredOutput("regex", "[0-9]+")),
        dict(allowed_token_ids=[70], structured=StructuredOutput("regex", "[0-9]+"), logprobs=2, temperature=1),
    ],
)
def test_where_no_token_is_left_the_request_ends_with_an_error(llm, params):
    with pytest.raises(InvalidRequest, match=r"^No token is left to choose: [^\n]+\.$"):
        generated(llm, **params)
    assert not llm._core.has_work()
    assert generated(llm).text


def test_prefixes_are_shared_within_a_salt_alone(llm):
    prompt = list(range(100, 180))

    def cached(salt):
        asked = {"prompt_token_ids": prompt} | ({} if salt is None else {"cache_salt": salt})
        return llm.generate(asked, SamplingParams(max_tokens=1), use_tqdm=False)[0].num_cached_tokens

    assert [cached(salt) for salt in (None, None, "a", "a", "b", "b", None)] == [0, 64, 0, 64, 0, 64, 64]


def test_no_block_is_named_as_a_salt_is():
    tokens = [1, 2, 3, 4]
    salts = [None, "", "a", "cache_salt:a"]
    names: list[list[bytes]] = [[] for _ in salts]
    for salt, own in zip(salts, names, strict=True):
        BlockPool(4, 2).hash_blocks(own, tokens, 2, root_of(salt))
    assert len({name for own in names for name in own}) == 2 * len(salts)
    assert names[0][0] == block_hash(ROOT, tokens[:2])


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({"prompt": "a", "cache_salt": ""}, "cache_salt must be"),
        ({"prompt": "a", "prompt_embeds": 1}, "'prompt_embeds' is not"),
    ],
)
def test_prompts_that_cannot_be(llm, prompt, sentence):
    with pytest.raises(InvalidRequest, match=sentence):
        llm.generate(prompt, use_tqdm=False)


WORDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)


@settings(deadline=None)
@given(WORDS, st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=3))
def test_bad_words_against_a_search(words, output, prompt):
    rules = TokenRules(SamplingParams(), bad_words=words)
    bad = BadWords(rules)
    for end in range(len(output) + 1):
        logits = torch.zeros(6)
        bad.forbid(logits, [*prompt, *output[:end]], len(prompt))
        completes = {word[-1] for word in words if tuple(output[max(0, end - len(word) + 1) : end]) == word[:-1]}
        assert {token for token, value in enumerate(logits.tolist()) if value == float("-inf")} == completes


class Watched(dict):
    """Says how often somebody has gone through it."""

    walks = 0

    def __iter__(self):
        self.walks += 1
        return super().__iter__()

    def items(self):
        self.walks += 1
        return super().items()

    def values(self):
        self.walks += 1
        return super().values()


def test_what_a_request_lists_is_walked_over_once_for_all_its_sequences_and_steps(llm):
    """14 s a step once, with a bias of every token and n = 128."""
    bias = Watched(dict.fromkeys(range(4096), -1.0) | {70: 9.0})
    found = generated(llm, logit_bias=bias, n=1, ignore_eos=True)
    alone = bias.walks
    params = SamplingParams(temperature=0, max_tokens=20, logit_bias=bias, n=64, ignore_eos=True)
    bias.walks = 0
    outputs = llm.generate("def read(self", params, use_tqdm=False)[0].outputs
    assert bias.walks <= alone
    assert all(output.token_ids[:8] == found.token_ids for output in outputs)


def test_the_sequences_of_a_request_share_what_it_lists():
    lists = dict(logit_bias={5: 1.0}, allowed_token_ids=[5, 6], stop_token_ids=[7, 7, 8], stop=["x"], bad_words=["y"])
    params = SamplingParams(n=3, seed=5, prompt_logprobs=2, **lists)
    info = EngineInfo(100, 4096, 10, 16, "fake")
    requests = engine_requests(info, Tokenizer(MODEL_DIR), "r", [5], params, frozenset())
    assert [request.params for request in requests] == [
        SamplingParams(n=1, seed=5 + i, prompt_logprobs=None if i else 2, **lists) for i in range(3)
    ]
    crossed = pickle.loads(pickle.dumps(("add", requests)))[1]
    assert all(getattr(one.params, name) is getattr(crossed[0].params, name) for one in crossed for name in lists), "sent once"
    assert all(one.prompt_token_ids is crossed[0].prompt_token_ids for one in crossed)
    with pytest.raises(InvalidRequest, match="stop_token_ids has 5000 entries"):
        SamplingParams(stop_token_ids=range(5000))
