"""Tokens that a request forbids, and prefixes that it does not share, through an engine."""

from __future__ import annotations

import pytest

from octavo import LLM, SamplingParams
from octavo.engine.block_pool import ROOT, BlockPool, block_hash, root_of
from octavo.errors import InvalidRequest
from octavo.messages import StructuredOutput


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(device="cpu", threads=1, cpu_kv_cache_gib=0.1)


def generated(llm: LLM, prompt="def read(self", **params):
    wanted = SamplingParams(**dict(temperature=0, max_tokens=8) | params)
    return llm.generate(prompt, wanted, use_tqdm=False)[0].outputs[0]


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
        BlockPool(4, 2).name_blocks(own, tokens, 2, root_of(salt))
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
